"""Write `tests/goldens/node_inputs.json`: what ComfyUI says our nodes declare.

Run it as `.venv/bin/python dev/node_inputs.py` after adding a node or appending an input, and read
the difference: an input that moved or vanished breaks every saved workflow.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout takes this folder's place
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parents[1])]

from dev.comfy_tree import host_tree
from dev.host import Server
from dev.places import PACK_FOLDER, ROOT

GOLDEN = ROOT / "tests" / "goldens" / "node_inputs.json"

if __name__ == "__main__":
    with Server(host_tree()) as host:
        everything = host.json("/object_info")
    ours = {
        name: {
            "input_order": {k: v for k, v in info["input_order"].items() if k != "hidden"},
            "output": info["output"],
        }
        for name, info in sorted(everything.items())
        if info["python_module"] == f"custom_nodes.{PACK_FOLDER}"
    }
    GOLDEN.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
