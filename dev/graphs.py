"""API-format workflows: the shipped ones, adapted to the models that a run has at hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from dev.places import ROOT
from dev.say import Failure

Graph = dict[str, dict[str, Any]]

SHIPPED = ROOT / "example_workflows" / "api"
COMPARISON = "SEG SDXL - five widths of the blur.json"
GUIDANCE = "SEGuidance"
GUIDANCES = (GUIDANCE, *(f"{GUIDANCE}{name}" for name in ("SAG", "PAG", "TPG", "SSG", "SLG")))
OFF = "off"
INFINITE = "infinite"
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


def load(path: Any) -> Graph:
    """Return the graph in an API-format file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Failure(f"The shipped workflow {path} is missing.") from error


def comparison() -> Graph:
    """Return the shipped comparison of blur widths."""
    return load(SHIPPED / COMPARISON)


def of_class(graph: Graph, *names: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield id and inputs of the nodes of these classes."""
    for key, node in graph.items():
        if node["class_type"] in names:
            yield key, node["inputs"]


def upstream(graph: Graph, key: str) -> set[str]:
    """Return the ids of a node and of everything it depends on."""
    found: set[str] = set()
    waiting = [key]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(str(value[0]) for value in links(graph[current]).values())
    return found


def links(node: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the inputs of a node that come from other nodes."""
    return {
        name: value
        for name, value in node["inputs"].items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)
    }


def setting(graph: Graph, sampler: str) -> str:
    """Name the guidance in front of a sampler: `off`, `infinite`, or the blur sigma."""
    before = upstream({**graph, "": {"inputs": {"m": graph[sampler]["inputs"]["model"]}}}, "")
    for key, inputs in of_class(graph, GUIDANCE):
        if key in before and inputs["scale"] != 0:
            return INFINITE if inputs["infinite_blur"] else f"sigma {inputs['blur_sigma']:g}"
    return OFF


def columns(graph: Graph) -> dict[str, Graph]:
    """Split a comparison into one graph per guidance setting, each saving one picture."""
    parts = {}
    for decode, inputs in of_class(graph, "VAEDecode"):
        keys = upstream(graph, decode)
        samplers = [key for key, _ in of_class(graph, "KSampler") if key in keys]
        if samplers and samplers[0] == str(inputs["samples"][0]):
            part = {key: copy.deepcopy(graph[key]) for key in graph if key in keys}
            part["save"] = new_node("SaveImage", images=[decode, 0], filename_prefix="seg")
            parts.setdefault(setting(graph, samplers[0]), part)
    return parts


def with_sampling(graph: Graph, *, cfg: float, seed: int, steps: int | None) -> Graph:
    """Return the graph with these sampler settings."""
    changed = copy.deepcopy(graph)
    for _, inputs in of_class(changed, "KSampler"):
        inputs.update(cfg=cfg, seed=seed, steps=steps or inputs["steps"])
    return changed


def with_guidance(graph: Graph, **settings: Any) -> Graph:
    """Return the graph with these settings of its guidance node."""
    changed = copy.deepcopy(graph)
    for _, inputs in of_class(changed, GUIDANCE):
        inputs.update(settings)
    return changed


def prompt_nodes(graph: Graph) -> tuple[set[str], set[str]]:
    """Return the ids of the text encoders that feed `positive` and `negative` inputs."""
    sides: dict[str, set[str]] = {"positive": set(), "negative": set()}
    encoders = {key for key, _ in of_class(graph, "CLIPTextEncode")}
    for node in graph.values():
        for name, found in sides.items():
            if name in links(node):
                found |= encoders & upstream(graph, str(node["inputs"][name][0]))
    return sides["positive"], sides["negative"]


def for_demo_model(graph: Graph, prompt: str, *, size: int, batch: int) -> Graph:
    """Return the graph with loader, texts, latent and VAE made the demo model's."""
    changed = copy.deepcopy(graph)
    positive, _ = prompt_nodes(graph)
    for key, node in changed.items():
        inputs = node["inputs"]
        match node["class_type"]:
            case "CheckpointLoaderSimple":
                changed[key] = new_node("SEGDemoModelLoader")
            case "CLIPTextEncode":
                text = prompt if key in positive else "nothing"
                changed[key] = new_node("SEGDemoPrompt", prompt=text)
            case "EmptyLatentImage":
                changed[key] = new_node(
                    "SEGDemoEmptyLatent", width=size, height=size, batch_size=batch
                )
            case "VAEDecode":
                inputs["vae"] = ["vae", 0]
    changed["vae"] = new_node("SEGDemoVAE", scale=4, method="bicubic")
    return changed


def for_checkpoint(graph: Graph, name: str, prompt: str, size: tuple[int, int] | None) -> Graph:
    """Return the graph with a person's own checkpoint, prompt and size."""
    changed = copy.deepcopy(graph)
    positive, _ = prompt_nodes(graph)
    for _, inputs in of_class(changed, "CheckpointLoaderSimple"):
        inputs["ckpt_name"] = name
    for key, inputs in of_class(changed, "CLIPTextEncode"):
        inputs["text"] = prompt if key in positive else ""
    if size:
        for _, inputs in of_class(changed, "EmptyLatentImage"):
            inputs.update(width=size[0], height=size[1])
    return changed


def for_stock_test(graph: Graph, names: dict[str, str], *, shrink: int = 8) -> Graph:
    """Return a shipped graph at test size, on the made checkpoint, ControlNet and picture.

    Args:
        graph: the shipped workflow.
        names: file names of `checkpoint`, `controlnet` and `image`.
        shrink: what widths and heights are divided by, then brought to 64..256.
    """
    changed = _with_one_loader(graph)
    fixed = {
        "ckpt_name": names["checkpoint"],
        "control_net_name": names["controlnet"],
        "image": names["image"],
    }
    for node in changed.values():
        inputs = node["inputs"]
        for name, value in inputs.items():
            if name in fixed and isinstance(value, str):
                inputs[name] = fixed[name]
            elif name in ("width", "height") and isinstance(value, int):
                inputs[name] = min(256, max(64, value // shrink // 8 * 8))
            elif name == "steps" and isinstance(value, int):
                inputs[name] = min(value, 2)
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


def text_to_image(checkpoint: str, **guidance: Any) -> Graph:
    """Return the smallest whole workflow with the guidance node, for tests."""
    settings = {"scale": 3.0, "infinite_blur": True, "blur_sigma": 10.0, **WHOLE, **guidance}
    return {
        "checkpoint": new_node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "guidance": new_node(GUIDANCE, model=["checkpoint", 0], **settings),
        "positive": new_node("CLIPTextEncode", text="a cat", clip=["checkpoint", 1]),
        "negative": new_node("CLIPTextEncode", text="", clip=["checkpoint", 1]),
        "latent": new_node("EmptyLatentImage", width=64, height=96, batch_size=1),
        "sampler": ksampler("guidance", steps=2, cfg=4.0, seed=1),
        "decode": new_node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "save": new_node("SaveImage", images=["decode", 0], filename_prefix="seg"),
    }
