"""What the registry, the Manager and the loader ask of the pack, checked before they do.

The last tests use the registry's own tool. `SEG_REGISTRY_TOOLS` is the folder with the command
`comfy` (comfy-cli), in an environment of its own; `dev.py test` makes it.
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
from collections.abc import Iterator
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
SOURCES = [ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"), *(ROOT / "seg_core").glob("*.py")]
HOST_MODULES = {
    *("comfyui_version", "comfy", "comfy_api", "comfy_execution", "comfy_extras"),
    *("folder_paths", "nodes", "server", "latent_preview", "node_helpers", "execution"),
}
ALLOWED = {*sys.stdlib_module_names, *HOST_MODULES, "torch", "numpy", "PIL", "typing_extensions"}
DECLARED_LAZY = {"matplotlib", "jaxtyping"}  # imported where used, and done without when absent
SUSPICIOUS = (
    r"\bsubprocess\b|__import__|\beval\(|\bexec\(|\bpickle\b|\bbase64\b|os\.system|importlib\."
    r"|(?<!re\.)\bcompile\(|\bsocket\b|\brequests\.|\burllib\b|\bhttp\.client\b|\bftplib\b"
)
# The folder's name and the device are the user's; old mappings would hide the entry point; and a
# MultiCombo has a form of its own in prompts of the API.
UNPORTABLE = r"custom_nodes|NODE_CLASS_MAPPINGS|MultiCombo|\.cuda\(|\.to\(.cuda|torch\.autocast"
NEEDED = {
    *("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"),
    *(path.relative_to(ROOT).as_posix() for path in SOURCES),
    *(f"web/docs/{node}.md" for node in NODES),
}
NOT_FOR_USERS = {"tests", "dev", "dev.py", "benchmarks", ".github", ".ci", "node.zip", ".venv"}


def parts_of(path: Path, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    """Return the parts of a source of some kinds, wherever they stand."""
    walk = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return (entry for entry in walk if isinstance(entry, kinds))


def said(folder: Path, *command: str) -> str:
    """Run a command that must succeed; return what it says."""
    answer = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "DO_NOT_TRACK": "1", "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """What git holds, or would with the next commit."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no archive to look at")
    listed = said(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


# The project.


def test_project_fields_satisfy_the_registry():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]*(?:[-_][A-Za-z0-9]+)*", project["name"])
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert 0 < len(project["description"]) <= 1000
    assert (ROOT / project["license"]["file"]).exists()
    assert comfy["PublisherId"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == project["version"]


def test_icon_and_banner_have_the_registry_s_shapes():
    shapes = {}
    for name in ("Icon", "Banner"):
        with Image.open(ROOT / "docs" / Path(PROJECT["tool"]["comfy"][name]).name) as picture:
            shapes[name] = picture.size
    assert shapes["Icon"][0] == shapes["Icon"][1] <= 400
    assert abs(shapes["Banner"][0] / shapes["Banner"][1] - 21 / 9) < 0.01


def test_only_matplotlib_is_installed_with_the_pack():
    """The Manager reads `requirements.txt`; no other PyTorch or numpy comes than ComfyUI has."""
    assert PROJECT["project"]["dependencies"] == ["matplotlib>=3.7"]
    assert (ROOT / "requirements.txt").read_text().split() == ["matplotlib>=3.7"]
    assert not (ROOT / "install.py").exists()


# Sources.


def test_only_what_comfyui_brings_is_imported_and_by_the_latest_api():
    for path in SOURCES:
        for entry in parts_of(path, ast.Import, ast.ImportFrom):
            names = [alias.name for alias in entry.names]
            if isinstance(entry, ast.ImportFrom):
                names = [] if entry.level else [entry.module or ""]
            allowed = ALLOWED if entry.col_offset == 0 else ALLOWED | DECLARED_LAZY
            for name in names:
                assert name.partition(".")[0] in allowed, f"{path}:{entry.lineno} imports {name}"
                assert not name.startswith("comfy_api") or name == "comfy_api.latest", path


def test_sources_are_ascii_and_portable():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), path
        assert not re.search(UNPORTABLE, text), path


def test_node_ids_are_literal_and_all_promised():
    """Look as the Manager's static scanner does: for a direct base and a literal id."""
    found = set()
    for path in (ROOT / "nodes").rglob("*.py"):
        for entry in parts_of(path, ast.ClassDef):
            if any(ast.unparse(base).endswith("ComfyNode") for base in entry.bases):
                found |= set(re.findall(r"node_id='(SEG[A-Za-z0-9_]+)'", ast.unparse(entry)))
    assert found == set(NODES)


# The archive.


@pytest.fixture(scope="module")
def comfy() -> str:
    """The registry's tool."""
    found = shutil.which("comfy", path=os.environ.get("SEG_REGISTRY_TOOLS") or "nowhere")
    return found or pytest.skip("needs SEG_REGISTRY_TOOLS: `python dev.py test` sees to that")


@pytest.fixture(scope="module")
def checkout(comfy, tracked, tmp_path_factory) -> Path:
    """A copy of what git would hold, in a repository of its own: the tool looks at git."""
    folder = tmp_path_factory.mktemp("registry")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    said(folder, "git", "init", "-q")
    said(folder, "git", "add", "-A")
    return folder


def test_the_registry_packs_what_users_need_and_nothing_that_a_scanner_flags(comfy, checkout):
    words = said(checkout, comfy, "--skip-prompt", "node", "validate")
    assert "passed" in words
    assert not re.search(r"warning|error|S102|S307|E702", words, re.IGNORECASE), words
    said(checkout, comfy, "--skip-prompt", "node", "pack")
    with zipfile.ZipFile(checkout / "node.zip") as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    assert sum(map(len, files.values())) < 4 * 2**20
    assert files.keys() >= NEEDED
    assert not {name.partition("/")[0] for name in files} & NOT_FOR_USERS
    assert not [name for name in files if re.search(r"(^|/)(test_|conftest|\.)", name)]
    for name, content in files.items():
        if name.endswith((".py", ".toml", ".json", ".js", ".txt")):
            found = re.search(SUSPICIOUS, content.decode())
            assert found is None, f"{name}: {found.group()}"


def test_ids_are_unique_in_the_manager_s_map(comfy):
    """The map that lies in the wheel of comfyui-manager, if that is in the tool's environment."""
    maps = [*Path(comfy).parent.parent.rglob("extension-node-map.json")]
    if not maps:
        pytest.skip("comfyui-manager is not in the tool's environment")
    everywhere = json.loads(maps[0].read_text(encoding="utf-8"))
    taken = {name for names, *_ in everywhere.values() for name in names}
    ours = {key for key in everywhere if "seg-guidance/" in key}
    assert ours or not taken & set(NODES)
