"""What all tests share: the import order, the pack under a private name, and which tests run."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "seg_pack_under_test"
NEEDS_COMFYUI = ("host", "server", "browser")


def _order_import_path() -> None:
    """Put the repository last: in front, its `nodes/` would shadow ComfyUI's `nodes.py`."""
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    ours = (ROOT, ROOT / "tests", ROOT / "tests" / "unit")  # for `choice`, and for `oracles`
    sys.path[:] = [*others, *map(str, ours)]


def _leave_in_order_when_terminated() -> None:
    """Let SIGTERM unwind like Ctrl-C, so that fixtures stop their servers."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


_order_import_path()
_leave_in_order_when_terminated()


def load_pack(folder: Path, name: str) -> ModuleType:
    """Load a node pack by path, as ComfyUI does, under the given module name."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if PACKAGE not in sys.modules:
    load_pack(ROOT, PACKAGE)


class _Skipped(pytest.Item):
    def runtest(self):
        pytest.skip("needs ComfyUI: run `python dev.py test`, or set COMFYUI_PATH")


class _NeedsComfyUI(pytest.File):
    def collect(self):
        yield _Skipped.from_parent(self, name="needs_comfyui")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector):
    """Without a ComfyUI, show the files that need one as skipped instead of importing them."""
    if not os.environ.get("COMFYUI_PATH") and module_path.parent.name in NEEDS_COMFYUI:
        return _NeedsComfyUI.from_parent(parent, path=module_path)
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the long tests run too."""
    parser.addoption("--all", action="store_true", help="run also what is marked `long`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long tests unless they are asked for."""
    if config.getoption("--all"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("long")]
