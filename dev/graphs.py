"""API-format workflows: their nodes, and the shipped ones adapted to tests."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from dev.stock_checkpoint import CHECKPOINT, CONTROLNET

Graph = dict[str, dict[str, Any]]

GUIDANCE = "SEGuidance"
GUIDANCES = (GUIDANCE, *(f"{GUIDANCE}{name}" for name in ("SAG", "PAG", "TPG", "SSG", "SLG")))
OFF = "off"
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}  # all of sampling


def new_node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Return a node; an input from another node is a pair of its id and the output's index."""
    return {"class_type": kind, "inputs": inputs}


def ksampler(model: str, *, steps: int, cfg: float, seed: int) -> dict[str, Any]:
    """Return a KSampler (Euler) of a graph whose other nodes are `positive`, `negative`, `latent`.

    Args:
        model: id of the node whose first output is the model.
        steps: sampling steps.
        cfg: classifier-free guidance.
        seed: of the noise.
    """
    return new_node(
        "KSampler",
        model=[model, 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        seed=seed,
        steps=steps,
        cfg=cfg,
        denoise=1.0,
        sampler_name="euler",
        scheduler="normal",
    )


def of_class(graph: Graph, *names: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield id and inputs of the nodes of these classes."""
    for key, node in graph.items():
        if node["class_type"] in names:
            yield key, node["inputs"]


def links(node: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the inputs of a node that come from other nodes."""
    return {
        name: value
        for name, value in node["inputs"].items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)
    }


def for_stock_test(graph: Graph) -> Graph:
    """Return a shipped graph on the made checkpoint and ControlNet, small and of two steps."""
    changed = _with_one_loader(graph)
    made = {"ckpt_name": CHECKPOINT, "control_net_name": CONTROLNET}
    for node in changed.values():
        inputs = node["inputs"]
        for name, value in inputs.items():
            if name in made:
                inputs[name] = made[name]
            elif name in ("width", "height") and isinstance(value, int):
                inputs[name] = value // 8
            elif name == "steps" and isinstance(value, int):
                inputs[name] = 2
    return changed


def _with_one_loader(graph: Graph) -> Graph:
    """Return a graph whose separate loaders of network, encoder and VAE are one checkpoint's."""
    slots = {"UNETLoader": 0, "CLIPLoader": 1, "VAELoader": 2}
    separate = {key: slots[n["class_type"]] for key, n in graph.items() if n["class_type"] in slots}
    changed = {key: copy.deepcopy(node) for key, node in graph.items() if key not in separate}
    if separate:
        changed["checkpoint"] = new_node("CheckpointLoaderSimple", ckpt_name="")
    for node in changed.values():
        for name, link in links(node).items():
            if str(link[0]) in separate:
                node["inputs"][name] = ["checkpoint", separate[str(link[0])]]
    return changed


def without_guidance(graph: Graph) -> Graph:
    """Return the graph with every guidance node bypassed."""
    changed = copy.deepcopy(graph)
    for _, inputs in of_class(changed, "SEGuidanceSweep"):
        inputs["scales"] = "0"
    guides = {key: inputs["model"] for key, inputs in of_class(graph, *GUIDANCES)}
    for node in changed.values():
        for name, value in links(node).items():
            source = value
            while str(source[0]) in guides:
                source = guides[str(source[0])]
            node["inputs"][name] = source
    return {key: node for key, node in changed.items() if key not in guides}
