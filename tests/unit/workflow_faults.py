"""The prompt that the frontend makes of a workflow file, and what can be wrong with it.

A workflow is a document of the format 0.4, definitions are ComfyUI's `/object_info`. Written from
the format, with no look at the frontend; `tests/browser` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NOTE = "MarkdownNote"  # the one node that the server does not know
TYPES = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str}


def specs(definition: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the inputs of a node in the order in which ComfyUI declares them."""
    parts, order = definition["input"], definition["input_order"]
    return {key: parts[part][key] for part in parts for key in order[part]}


def kind_of(spec: list[Any]) -> str:
    """Return the type of an input; ComfyUI has two ways to write COMBO."""
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def widgets(definition: dict[str, Any]) -> list[str]:
    """Return what `widgets_values` holds; behind a seed stands its control, which has no name."""
    names = []
    for name, spec in specs(definition).items():
        if kind_of(spec) in TYPES:
            names += [name, ""] if spec[1].get("control_after_generate") else [name]
    return names


def prompt_of(document: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt that the frontend queues for a workflow, which is its API copy.

    Inputs are appended, so a file from before has fewer values; the frontend takes defaults.
    """
    origins = {link[0]: [str(link[1]), link[2]] for link in document["links"]}
    prompt = {}
    for node in document["nodes"]:
        if node["type"] == NOTE:
            continue
        definition = definitions[node["type"]]
        names, values = widgets(definition), node.get("widgets_values", [])
        assert len(values) <= len(names), f"{node['type']} holds more values than it has widgets"
        inputs = dict(zip(names, values, strict=False))
        assert inputs.pop("", "fixed") == "fixed", f"the seed of {node['type']} would change"
        linked = {entry["name"]: entry["link"] for entry in node["inputs"]}
        inputs |= {name: origins[link] for name, link in linked.items() if link is not None}
        title = node.get("title") or definition["display_name"] or node["type"]
        prompt[str(node["id"])] = {
            "inputs": inputs,
            "class_type": node["type"],
            "_meta": {"title": title},
        }
    return prompt


def faults(prompt: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """Yield what the server would refuse."""
    outputs = {key: definitions[node["class_type"]]["output"] for key, node in prompt.items()}
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        declared = specs(definitions[kind])
        for name in definitions[kind]["input"].get("required", {}):
            if name not in inputs:
                yield f"{kind} has nothing for {name}"
        for name, value in inputs.items():
            if name not in declared:
                yield f"{kind} has no input {name}"
            elif not is_allowed(declared[name], value, outputs):
                yield f"{kind} does not allow {value!r} for {name}"


def is_allowed(spec: list[Any], value: Any, outputs: dict[str, list[str]]) -> bool:
    """Tell whether an input takes a value, or what comes over a link: a node and its output."""
    kind, options = kind_of(spec), spec[1]
    if isinstance(value, list):
        return kind in (outputs[value[0]][value[1]], "*")
    if not isinstance(value, TYPES[kind]) or isinstance(value, bool) != (kind == "BOOLEAN"):
        return False
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    is_chosen = not choices or value in choices
    return is_chosen and options.get("min", value) <= value <= options.get("max", value)
