"""The walls: `seg_core` without ComfyUI, imports one way, the pack under any folder name."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "seg_core"
HOST = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes", "server")
BLOCKED_IMPORT = """
import sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {host!r}:
            raise ImportError(f"seg_core reached for {{name}}")

sys.meta_path.insert(0, Wall())
sys.path.append({root!r})
import seg_core
for name in {modules!r}:
    __import__("seg_core." + name)
"""
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


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_seg_core_imports_without_comfyui():
    modules = [path.stem for path in CORE.glob("*.py") if path.stem != "__init__"]
    answer = python(BLOCKED_IMPORT.format(host=HOST, root=str(ROOT), modules=modules))
    assert answer.returncode == 0, answer.stderr


HOST_SIDE = ROOT / "nodes" / "host"
# From the ground up; `show` stands beside them.
ROOMS = ["settings", "probe", "batch", "networks", "run"]


def imported_files(path):
    """Return the files of `seg_core` and the host side that a file imports, lazily or not."""
    found = set()
    for entry in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(entry, ast.ImportFrom) or not entry.level:
            continue
        base = path.parents[entry.level - 1]
        names = (entry.module or "").split(".") if entry.module else []
        places = [names] if entry.module else [[alias.name] for alias in entry.names]
        for place in places:
            target = base.joinpath(*place)
            for file in (target.with_suffix(".py"), target / "__init__.py"):
                if file.is_file() and {HOST_SIDE, CORE} & set(file.parents):
                    found.add(file)
    return found


def room_of(path):
    return path.relative_to(HOST_SIDE).parts[0]


HOST_FILES = [path for path in sorted(HOST_SIDE.rglob("*.py")) if path.parent != HOST_SIDE]


@pytest.mark.parametrize("path", HOST_FILES, ids=lambda p: str(p.relative_to(HOST_SIDE)))
def test_imports_between_rooms_only_run_down(path):
    room = room_of(path)
    allowed = [room] if room == "show" else ROOMS[: ROOMS.index(room) + 1]
    for other in (room_of(file) for file in imported_files(path) if HOST_SIDE in file.parents):
        assert other in allowed, f"{room} imports {other}"


def test_no_file_imports_itself_through_others_and_seg_core_imports_only_itself():
    files = [*sorted(HOST_SIDE.rglob("*.py")), *sorted(CORE.glob("*.py"))]
    graph = {path: imported_files(path) for path in files}
    assert sum(map(len, graph.values())) > 50, "imports are seen"
    for path in CORE.glob("*.py"):
        assert all(CORE in other.parents for other in graph[path]), path.name
    done = set()

    def visit(path, above):
        assert path not in above, [str(p.relative_to(ROOT)) for p in (*above, path)]
        if path not in done:
            for other in graph[path]:
                visit(other, (*above, path))
            done.add(path)

    for path in graph:
        visit(path, ())


def test_a_room_that_reaches_up_would_be_noticed(tmp_path, monkeypatch):
    for name in ("batch", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "run.py").write_text("", encoding="utf-8")
    up = tmp_path / "batch" / "call.py"
    up.write_text("def late():\n    from ..run.run import Run\n", encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "HOST_SIDE", tmp_path)
    with pytest.raises(AssertionError, match="batch imports run"):
        test_imports_between_rooms_only_run_down(up)


def test_the_entry_point_imports_nothing_of_comfyui(pack):
    assert pack.WEB_DIRECTORY == "./web"
    assert set(pack.__all__) == {"WEB_DIRECTORY", "comfy_entrypoint"}


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
    answer = python(code)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert len(lines) == len(folders)
    assert all("SEGuidance" in line.split() for line in lines)
