"""ComfyUI and this pack in one process, for measuring; not how either is used otherwise."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PACK = "smoothed_energy_guidance_benchmarked"


def start(device: str) -> None:
    """Import ComfyUI's foundations, with torch's own attention as on a GPU."""
    tree = Path(os.environ["COMFYUI_PATH"]).resolve()
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    sys.path[:] = [str(tree), *others, str(ROOT)]  # last: its `nodes/` must not shadow ComfyUI's
    from comfy.cli_args import args

    args.cpu = device == "cpu"
    args.use_pytorch_cross_attention = True
    args.disable_api_nodes = True
    args.base_directory = tempfile.mkdtemp(prefix="seg-benchmarks-")
    import comfy.model_management  # noqa: F401  (must see the settings above first)


def pack() -> ModuleType:
    """Return this node pack, loaded by path as ComfyUI loads it."""
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{ROOT} is not a node pack")
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK] = module
        spec.loader.exec_module(module)
    return sys.modules[PACK]


def seg_node() -> type:
    """Return the node class that is measured."""
    pack()
    return importlib.import_module(f"{PACK}.nodes.seg").SEGuidance
