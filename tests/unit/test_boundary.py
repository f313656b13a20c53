"""The walls: imports one way, and the pack under any folder name.

All tests of this folder import `seg_core` without ComfyUI; ruff bans importing it there at all.
"""

from __future__ import annotations

import ast
import graphlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "seg_core"
# From the ground up. `show` knows none of the others, and only the nodes know it.
ROOMS = ("seg_core", "settings", "probe", "batch", "networks", "run", "show", "nodes")
LOAD = """
import asyncio, sys
sys.path.insert(0, {tree!r})
from comfy.cli_args import args
args.cpu = True
import nodes
for folder in {folders!r}:
    nodes.NODE_CLASS_MAPPINGS.clear()
    assert asyncio.run(nodes.load_custom_node(folder)), folder
    print(*nodes.NODE_CLASS_MAPPINGS)
import nodes as again
assert hasattr(again, "KSampler"), again
"""


def imported_files(path: Path) -> set[Path]:
    """Return the files of the pack that a file imports, lazily or not."""
    found = set()
    for entry in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(entry, ast.ImportFrom) or not entry.level:
            continue
        base = path.parents[entry.level - 1]
        modules = [entry.module] if entry.module else [alias.name for alias in entry.names]
        for module in modules:
            target = base.joinpath(*module.split("."))
            found |= {target.with_suffix(".py"), target / "__init__.py"}
    return {file for file in found if file.is_file()}


def room_of(path: Path) -> str:
    """Return `seg_core`, a folder or file of `nodes/host`, or `nodes` for what is above these."""
    top, *below = path.relative_to(ROOT).with_suffix("").parts
    in_host = below[:1] == ["host"] and below[1:] != ["__init__"]
    return below[1] if in_host else top


def test_imports_run_down_and_never_in_circles():
    files = [*(ROOT / "nodes").rglob("*.py"), *CORE.glob("*.py")]
    graph = {path: imported_files(path) for path in files}
    assert sum(map(len, graph.values())) > 100, "imports are seen"
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    for path, others in graph.items():
        room = room_of(path)
        allowed = ("show",) if room == "show" else ROOMS[: ROOMS.index(room) + 1]
        for other in others:
            assert room_of(other) in allowed, f"{path} imports {other}"


@pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason="needs COMFYUI_PATH")
def test_comfyui_loads_the_pack_under_any_folder_name(tmp_path):
    folders = [tmp_path / name for name in ("x-y.z", "nodes", "two words")]
    for folder in folders:
        folder.mkdir()
        shutil.copy(ROOT / "__init__.py", folder)
        for part in ("nodes", "seg_core", "web"):
            clean = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, folder / part, ignore=clean)
    code = LOAD.format(tree=os.environ["COMFYUI_PATH"], folders=[str(each) for each in folders])
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert len(lines) == len(folders)
    assert all("SEGuidance" in line.split() for line in lines)
