"""What the registry, the Manager and the loader ask of the pack, checked before they do."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
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
HOST_MODULES = {
    *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes", "server"),
    *("latent_preview", "node_helpers", "execution"),
}
ALLOWED = {*sys.stdlib_module_names, *HOST_MODULES, "torch", "numpy", "PIL", "typing_extensions"}
DECLARED_LAZY = {"matplotlib", "jaxtyping"}  # imported where used, and done without when absent
SUSPICIOUS = (
    r"\bsubprocess\b|__import__|\beval\(|\bexec\(|\bpickle\b|\bbase64\b|\bsocket\b|\brequests\."
    r"|\burllib\b|os\.system|importlib\.|(?<!re\.)\bcompile\("
)
SOURCES = [ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"), *(ROOT / "seg_core").glob("*.py")]


def packed_files() -> list[Path]:
    """Return what `comfy node pack` would ship: the files of git less `.comfyignore`."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    names = answer.stdout.splitlines() if answer.returncode == 0 else []
    ignored = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line]
    return [ROOT / name for name in names if not any(covers(rule, name) for rule in ignored)]


def covers(rule: str, name: str) -> bool:
    return name.startswith(rule) if rule.endswith("/") else fnmatch(name, rule)


def parts_of(path: Path, kind: type[ast.AST]) -> Iterator[ast.AST]:
    """Return the parts of a source of one kind, wherever they stand."""
    walk = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return (entry for entry in walk if isinstance(entry, kind))


def literal_ids() -> set[str]:
    """Find node ids as the Manager's static scanner does: direct base, literal id."""
    found = set()
    for path in (ROOT / "nodes").rglob("*.py"):
        for entry in parts_of(path, ast.ClassDef):
            if any(ast.unparse(base).endswith("ComfyNode") for base in entry.bases):
                found |= set(re.findall(r"node_id='(\w+)'", ast.unparse(entry)))
    return found


# The project.


def test_project_fields_satisfy_the_registry():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]*(?:[-_][A-Za-z0-9]+)*", project["name"])
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert 0 < len(project["description"]) <= 1000
    assert project["classifiers"] == ["Operating System :: OS Independent"]
    assert (ROOT / project["license"]["file"]).exists()
    assert {"Repository", "Homepage", "Documentation", "Issues"} <= set(project["urls"])
    assert comfy["PublisherId"]
    assert comfy["DisplayName"] == "Smoothed Energy Guidance"
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert "web" not in comfy
    assert "build-system" not in PROJECT


def test_only_matplotlib_is_installed_with_the_pack():
    """The Manager reads `requirements.txt`; no other PyTorch or numpy comes than ComfyUI has."""
    assert PROJECT["project"]["dependencies"] == ["matplotlib>=3.7"]
    assert (ROOT / "requirements.txt").read_text().split() == ["matplotlib>=3.7"]
    assert not (ROOT / "install.py").exists()


def test_icon_and_banner_have_the_registry_s_shapes():
    repository = PROJECT["project"]["urls"]["Repository"]
    base = repository.replace("//github.com", "//raw.githubusercontent.com") + "/main/docs"
    shapes = {}
    for name in ("icon", "banner"):
        assert PROJECT["tool"]["comfy"][name.title()] == f"{base}/{name}.png"
        with Image.open(ROOT / "docs" / f"{name}.png") as picture:
            shapes[name] = picture.size
    assert shapes["icon"][0] == shapes["icon"][1] <= 400
    assert abs(shapes["banner"][0] / shapes["banner"][1] - 21 / 9) < 0.01


def test_the_changelog_has_the_version_and_every_node():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## (\S+)", text, re.MULTILINE)
    assert entries[0] == PROJECT["project"]["version"]
    assert len(entries) == len(set(entries))
    assert all(f"`{node}`" in text for node in NODES)


# Sources.


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_what_comfyui_brings_is_imported_and_by_the_latest_api(path):
    for entry in parts_of(path, (ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in entry.names]
        if isinstance(entry, ast.ImportFrom):
            names = [] if entry.level else [entry.module or ""]
        allowed = ALLOWED if entry.col_offset == 0 else ALLOWED | DECLARED_LAZY
        for name in names:
            assert name.partition(".")[0] in allowed, f"line {entry.lineno} imports {name}"
            assert not name.startswith("comfy_api") or name == "comfy_api.latest"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_are_ascii_and_portable(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert "custom_nodes" not in text  # the folder's name and place are the user's
    assert not re.search(r"\.cuda\(|\.to\(.cuda|torch\.autocast", text)
    assert "NODE_CLASS_MAPPINGS" not in text  # it would hide the entry point
    assert "MultiCombo" not in text  # it has a form of its own in prompts of the API


def test_node_ids_are_literal_and_all_promised():
    assert literal_ids() == set(NODES)
    assert all(re.fullmatch(r"SEG[A-Za-z0-9_]+", name) for name in NODES)


# The archive.


def test_the_archive_holds_what_users_need_and_nothing_a_scanner_flags():
    files = packed_files()
    if not files:
        pytest.skip("not a git checkout: there is no archive to look at")
    tops = {path.relative_to(ROOT).parts[0] for path in files}
    assert {"__init__.py", "nodes", "seg_core", "web", "pyproject.toml", "LICENSE"} <= tops
    assert not tops & {"tests", "dev", "dev.py", "benchmarks", ".github", ".ci", "node.zip"}
    for path in files:
        if path.suffix in (".py", ".toml", ".json", ".js", ".txt") and path.exists():
            found = re.search(SUSPICIOUS, path.read_text(encoding="utf-8"))
            assert found is None, f"{path.relative_to(ROOT)}: {found.group()}"
