"""What the registry and the Manager ask for, by their own tools where these are installed.

`SEG_REGISTRY_TOOLS` is the folder with the commands `comfy` (comfy-cli) and `comfy-test`, in an
environment of their own; `dev.py test` makes it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text(encoding="utf-8"))
NOT_FOR_USERS = {"tests", "dev", "dev.py", "benchmarks", ".github", ".ci", "node.zip", ".venv"}
STATIC_LEVELS = (
    '[test]\nname = "smoothed-energy-guidance"\nlevels = ["syntax","warnings","hazards"]\n'
)


def tool(name: str) -> Path:
    folder = os.environ.get("SEG_REGISTRY_TOOLS")
    if not folder:
        pytest.skip("SEG_REGISTRY_TOOLS is not set: `python dev.py test` sets it")
    for suffix in ("", ".exe"):
        place = Path(folder) / (name + suffix)
        if place.exists():
            return place
    pytest.skip(f"{name} is not in {folder}")


def said(command: list[object], folder: Path, **settings: str) -> tuple[int, str]:
    answer = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "DO_NOT_TRACK": "1", "PYTHONIOENCODING": "utf-8", **settings},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    return answer.returncode, answer.stdout + answer.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what git would hold, in a repository of its own: the tools look at git."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("registry") / "checkout"
    for name in answer.stdout.split("\0"):
        source = ROOT / name
        if name and source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def archive(checkout: Path) -> Path:
    """What `comfy node pack` makes, unpacked."""
    status, words = said([tool("comfy"), "--skip-prompt", "node", "pack"], checkout)
    assert status == 0, words
    folder = checkout.parent / "smoothed-energy-guidance"
    with zipfile.ZipFile(checkout / "node.zip") as packed:
        packed.extractall(folder)
    (checkout / "node.zip").unlink()
    return folder


def test_comfy_node_validate_has_nothing_to_say(checkout):
    status, words = said([tool("comfy"), "--skip-prompt", "node", "validate"], checkout)
    assert status == 0, words
    assert "passed" in words
    assert not re.search(r"warning|error|S102|S307|E702", words, re.IGNORECASE), words


def test_the_archive_is_complete_small_and_holds_no_development_files(archive):
    files = [path for path in archive.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4 * 2**20
    names = {path.relative_to(archive).as_posix() for path in files}
    tops = {name.partition("/")[0] for name in names}
    assert not tops & NOT_FOR_USERS
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"} <= names
    assert {"nodes", "seg_core", "web", "locales", "example_workflows"} <= tops
    for node in NODES:
        assert f"web/docs/{node}.md" in names
    assert not [name for name in names if re.search(r"(^|/)(test_|conftest|\.)", name)]


def test_comfy_test_s_static_levels_pass(archive, tmp_path):
    (archive / "comfy-test.toml").write_text(STATIC_LEVELS, encoding="utf-8")
    folders = {"COMFY_TEST_LOGS_DIR": tmp_path / "logs", "COMFY_TEST_WORKSPACE_DIR": tmp_path / "w"}
    for folder in folders.values():
        folder.mkdir()
    settings = {name: str(folder) for name, folder in folders.items()}
    try:
        status, words = said([tool("comfy-test"), "run"], archive, **settings)
    finally:
        (archive / "comfy-test.toml").unlink()
    assert status == 0, words
    for level in ("SYNTAX", "WARNINGS", "HAZARDS"):
        assert f"[{level}] PASSED" in words


def test_ids_are_unique_in_the_manager_s_map():
    """The map that lies in the wheel of comfyui-manager, if that is in the tools' environment."""
    maps = [*tool("comfy").parent.parent.rglob("extension-node-map.json")]
    if not maps:
        pytest.skip("comfyui-manager is not in the tools' environment")
    everywhere = json.loads(maps[0].read_text(encoding="utf-8"))
    taken = {name for names, *_ in everywhere.values() for name in names}
    ours = {key for key in everywhere if "seg-guidance/" in key}
    assert ours or not taken & set(NODES)
