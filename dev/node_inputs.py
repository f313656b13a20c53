"""Write what ComfyUI declares of the nodes that we ship or use: `python -m dev.node_inputs`.

Run it after adding a node, appending an input, or using another of ComfyUI's nodes in a shipped
workflow, and read the difference. `tests/goldens/node_inputs.json` is the promise: an input that
moved or vanished there breaks every saved workflow. `tests/goldens/object_info.json` is what the
workflows are checked against.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from dev.comfy_tree import CURRENT, pinned_tree
from dev.host import Server
from dev.places import PACK_FOLDER, ROOT
from dev.say import Failure, say

GOLDENS = ROOT / "tests" / "goldens"
OF_THE_FRONTEND = {"MarkdownNote"}  # which no server knows
OPTIONS = ("default", "min", "max", "multiline", "control_after_generate", "options")


def main() -> int:
    """Ask a real ComfyUI and write both files."""
    with Server(pinned_tree(CURRENT)) as host:
        everything = host.json("/object_info")
    ours = sorted(
        name
        for name, node in everything.items()
        if node["python_module"] == f"custom_nodes.{PACK_FOLDER}"
    )
    used = used_nodes() - OF_THE_FRONTEND
    unknown = used - everything.keys()
    if unknown:
        raise Failure(f"Neither ComfyUI {CURRENT} nor this pack has {', '.join(sorted(unknown))}.")
    told = {name: definition(everything[name]) for name in sorted(used | set(ours))}
    promised = {name: {key: told[name][key] for key in ("input_order", "output")} for name in ours}
    for name, document in (("node_inputs", promised), ("object_info", told)):
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        (GOLDENS / f"{name}.json").write_text(text, encoding="utf-8", newline="\n")
        say(f"tests/goldens/{name}.json: {len(document)} nodes")
    return 0


def used_nodes() -> set[str]:
    """Return the types of all nodes in the shipped workflows."""
    paths = (ROOT / "example_workflows").glob("*.json")
    documents = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    return {node["type"] for document in documents for node in document["nodes"]}


def definition(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a node's `/object_info` what a workflow stands on."""
    parts = {part: inputs for part, inputs in node["input"].items() if part != "hidden"}
    loads = "Loader" in node["name"]
    return {
        "input": {
            part: {
                key: _input(spec, is_file=loads and key.endswith("_name"))
                for key, spec in inputs.items()
            }
            for part, inputs in parts.items()
        },
        "input_order": {part: node["input_order"][part] for part in parts},
        "output": node["output"],
        "output_name": node["output_name"],
        "display_name": node["display_name"],
    }


def _input(spec: Iterable[Any], *, is_file: bool) -> list[Any]:
    kind, *rest = spec
    options = rest[0] if rest else {}
    kept = {name: options[name] for name in OPTIONS if name in options}
    return [[] if is_file else kind, kept]  # files differ from machine to machine


if __name__ == "__main__":
    sys.exit(main())
