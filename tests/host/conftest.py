"""ComfyUI in this process: its tree first on the path, on the CPU unless there is a GPU."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


def _start(tree: Path) -> None:
    """Import ComfyUI's foundations in the one order that honours our settings."""
    sys.path.insert(0, str(tree))
    sys.path.append(str(Path(__file__).parent))  # host_models
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.disable_api_nodes = True
    args.base_directory = tempfile.mkdtemp(prefix="seg-host-tests-")
    atexit.register(shutil.rmtree, args.base_directory, ignore_errors=True)
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)
    import comfy.model_management  # noqa: F401  (must see the settings above first)
    import nodes

    if not hasattr(nodes, "NODE_CLASS_MAPPINGS"):
        raise RuntimeError(f"`nodes` is {nodes.__file__}, not ComfyUI's")


def _let_rotary_embeddings_take_float64() -> None:
    """Widen what newer versions say of their plain implementation, which could."""
    try:
        from comfy_kitchen.registry import registry
    except ImportError:
        return
    for (backend, _), constraints in registry._constraints.items():
        for param in constraints.params.values():
            if backend == "eager" and param.dtypes and torch.float32 in param.dtypes:
                object.__setattr__(param, "dtypes", param.dtypes | {torch.float64})


if os.environ.get("COMFYUI_PATH"):
    _start(Path(os.environ["COMFYUI_PATH"]).resolve())
    _let_rotary_embeddings_take_float64()


@pytest.fixture
def calm_previews(monkeypatch):
    """Previews are files; the tests want none."""
    from comfy_api.latest import ui

    preview = lambda image, cls: SimpleNamespace(as_dict=lambda: {"images": [image]})  # noqa: E731
    monkeypatch.setattr(ui, "PreviewImage", preview)
