"""What the registry and the Manager ask for, by their own tools where these are installed.

`SEG_REGISTRY_TOOLS` is the folder with the commands `comfy` (comfy-cli) and `comfy-test`, in an
environment of their own; `dev.py test` makes it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NODES = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text(encoding="utf-8"))
SUSPICIOUS = (
    r"\bsubprocess\b|__import__|\beval\(|\bexec\(|\bpickle\b|\bbase64\b|\bsocket\b|\brequests\b"
    r"|\burllib\b|os\.system|importlib\.|(?<!re\.)\bcompile\("
)
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


def test_the_archive_is_complete_and_holds_no_development_files(archive):
    names = {path.relative_to(archive).as_posix() for path in archive.rglob("*") if path.is_file()}
    tops = {name.partition("/")[0] for name in names}
    assert not tops & NOT_FOR_USERS
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"} <= names
    assert {"nodes", "seg_core", "web", "locales", "example_workflows"} <= tops
    for node in NODES:
        assert f"web/docs/{node}.md" in names
    assert not [name for name in names if re.search(r"(^|/)(test_|conftest|\.)", name)]


def test_the_archive_is_clean_for_scanners(archive):
    for path in archive.rglob("*"):
        if path.suffix in (".py", ".toml", ".json", ".js", ".txt"):
            found = re.search(SUSPICIOUS, path.read_text(encoding="utf-8"))
            assert found is None, f"{path.relative_to(archive)}: {found.group()}"


def test_the_archive_is_small(archive):
    assert sum(path.stat().st_size for path in archive.rglob("*") if path.is_file()) < 4 * 2**20


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


# Without tools


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_icon_and_banner_have_the_registry_s_shapes():
    comfy = PROJECT["tool"]["comfy"]
    icon, banner = (ROOT / "docs" / f"{name}.png" for name in ("icon", "banner"))
    repository = PROJECT["project"]["urls"]["Repository"]
    base = repository.replace("//github.com", "//raw.githubusercontent.com") + "/main/docs"
    assert comfy["Icon"] == f"{base}/icon.png"
    assert comfy["Banner"] == f"{base}/banner.png"
    width, height = size_of(icon)
    assert width == height <= 400
    width, height = size_of(banner)
    assert abs(width / height - 21 / 9) < 0.01


def test_the_version_has_an_entry_in_the_changelog():
    version = PROJECT["project"]["version"]
    entries = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[0] == version
    assert len(entries) == len(set(entries))


def test_every_node_is_in_the_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for node in NODES:
        assert f"`{node}`" in text


def test_the_api_is_imported_as_comfyui_s_own_nodes_do():
    for path in (ROOT / "nodes").rglob("*.py"):
        for entry in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(entry, ast.ImportFrom) and (entry.module or "").startswith("comfy_api"):
                assert entry.module == "comfy_api.latest"


def test_no_input_needs_a_special_form_in_the_api():
    for path in (ROOT / "nodes").rglob("*.py"):
        assert "MultiCombo" not in path.read_text(encoding="utf-8")


def test_requirements_say_what_the_project_says():
    """The Manager installs from this file, the registry shows the other list."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    assert [line for line in lines if line] == PROJECT["project"]["dependencies"]
    for name in ("torch", "numpy"):
        assert not any(line.startswith(name) for line in lines)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem
)
def test_workflows_have_a_thumbnail_and_a_title_for_people(path):
    assert re.fullmatch(r"SEG[ _][A-Za-z0-9 _-]+", path.stem)
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) >= 400
    assert path.with_suffix(".jpg").stat().st_size < 300 * 1024
