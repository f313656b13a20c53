"""What can be wrong with a workflow file, and the prompt that the frontend makes of it.

A workflow is a document of the format 0.4, definitions are ComfyUI's `/object_info`. Written from
the format, with no look at the frontend; `tests/browser` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NOTE = "MarkdownNote"
TYPES = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str}


def graph_nodes(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the nodes that the server knows: all but notes."""
    return [node for node in document["nodes"] if node["type"] != NOTE]


def specs(definition: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the inputs of a node in the order in which ComfyUI declares them."""
    parts, order = definition["input"], definition["input_order"]
    return {key: parts[part][key] for part in parts for key in order[part]}


def kind_of(spec: list[Any]) -> str:
    """Return the type of an input; ComfyUI has two ways to write COMBO."""
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def widgets(definition: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """Return what `widgets_values` holds; behind a seed stands its control, which has no name."""
    found: list[tuple[str, Any]] = []
    for key, spec in specs(definition).items():
        if kind_of(spec) in TYPES:
            found.append((key, spec))
            if spec[1].get("control_after_generate"):
                found.append(("", [["fixed"], {}]))
    return found


def faults(document: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """Return what a person who opens this workflow would have to repair."""
    found = []
    for node in graph_nodes(document):
        definition = definitions.get(node["type"])
        told = ["is no node of ComfyUI or ours"]
        if definition:
            told = [*socket_faults(node, definition), *widget_faults(node, definition)]
        found += [f"{node['type']} {node['id']} {fault}" for fault in told]
    return [*found, *link_faults(document)]


def socket_faults(node: dict[str, Any], definition: dict[str, Any]) -> Iterator[str]:
    declared = specs(definition)
    linked = {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
    for entry in node["inputs"]:
        if entry["name"] not in declared or entry["type"] != kind_of(declared[entry["name"]]):
            yield f"has no input {entry['name']} of type {entry['type']}"
    for key in definition["input"].get("required", {}):
        if kind_of(declared[key]) not in TYPES and key not in linked:
            yield f"has nothing connected to {key}"
    if [entry["type"] for entry in node["outputs"]] != definition["output"]:
        yield "has other outputs than declared"


def widget_faults(node: dict[str, Any], definition: dict[str, Any]) -> Iterator[str]:
    expected, values = widgets(definition), node.get("widgets_values", [])
    if len(values) > len(expected):
        yield "holds more values than it has widgets"
    for (key, spec), value in zip(expected, values, strict=False):
        if not is_allowed(spec, value):
            yield f"does not allow {value!r} for {key or 'control after generate'}"
    # Inputs are appended, so a file from before has fewer values; the frontend takes defaults.
    for key, _ in expected[len(values) :]:
        if key in definition["input"].get("required", {}):
            yield f"holds no value for {key}"


def is_allowed(spec: list[Any], value: Any) -> bool:
    kind, options = kind_of(spec), spec[1]
    if not isinstance(value, TYPES[kind]) or isinstance(value, bool) != (kind == "BOOLEAN"):
        return False
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    is_chosen = not choices or value in choices
    return is_chosen and options.get("min", value) <= value <= options.get("max", value)


def link_faults(document: dict[str, Any]) -> Iterator[str]:
    nodes, links = document["nodes"], document["links"]
    keys = [node["id"] for node in nodes]
    if len(set(keys)) != len(keys) or max(keys) != document["last_node_id"]:
        yield "node ids are not unique, or last_node_id is not the last"
    if len({link[0] for link in links}) != len(links):
        yield "link ids are not unique"
    starts = {
        (key, node["id"], slot, entry["type"])
        for node in nodes
        for slot, entry in enumerate(node["outputs"])
        for key in entry["links"] or []
    }
    if starts != {(key, origin, slot, kind) for key, origin, slot, _, _, kind in links}:
        yield "links and outputs disagree"
    ends = {
        (entry["link"], node["id"], slot): entry["type"]
        for node in nodes
        for slot, entry in enumerate(node["inputs"])
        if entry["link"] is not None
    }
    if ends.keys() != {(key, target, slot) for key, _, _, target, slot, _ in links}:
        yield "links and inputs disagree"
    for key, _, _, target, slot, kind in links:
        if ends.get((key, target, slot), kind) not in (kind, "*"):
            yield f"link {key} carries {kind} to an input of another type"


def prompt_of(document: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt that the frontend queues for a workflow, which is its API copy."""
    origins = {link[0]: [str(link[1]), link[2]] for link in document["links"]}
    prompt = {}
    for node in graph_nodes(document):
        definition = definitions[node["type"]]
        keys = [key for key, _ in widgets(definition)]
        inputs = dict(zip(keys, node.get("widgets_values", []), strict=False))
        inputs.pop("", None)
        linked = {entry["name"]: entry["link"] for entry in node["inputs"]}
        inputs |= {key: origins[link] for key, link in linked.items() if link is not None}
        title = node.get("title") or definition["display_name"] or node["type"]
        prompt[str(node["id"])] = {
            "inputs": inputs,
            "class_type": node["type"],
            "_meta": {"title": title},
        }
    return prompt
