"""ComfyUI in this process: its tree first on the path, on the CPU unless there is a GPU."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch


@dataclass(frozen=True)
class ComfyHost:
    """The ComfyUI that runs in this process."""

    tree: Path
    version: tuple[int, ...]


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


if os.environ.get("COMFYUI_PATH"):
    _start(Path(os.environ["COMFYUI_PATH"]).resolve())


@pytest.fixture(scope="session")
def comfy_host() -> ComfyHost:
    """Which ComfyUI the tests run on; compare `version` with a tuple such as (0, 30)."""
    version = importlib.import_module("comfyui_version").__version__
    numbers = tuple(int(part) for part in version.split("."))
    return ComfyHost(Path(os.environ["COMFYUI_PATH"]).resolve(), numbers)
