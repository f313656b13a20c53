"""What the registry, the Manager and the loader ask of the pack, checked before they do."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INPUTS = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text())
HOST_MODULES = {
    *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes", "server"),
    *("latent_preview", "node_helpers", "execution"),
}
ALLOWED = {*sys.stdlib_module_names, *HOST_MODULES, "torch", "numpy", "PIL", "typing_extensions"}
DECLARED_LAZY = {"matplotlib", "jaxtyping"}  # imported where used, and done without when absent
SUSPICIOUS = (
    r"\bsubprocess\b|__import__|\beval\(|\bexec\(|\bpickle\b|\bbase64\b|\bsocket\b|\brequests\b"
    r"|\burllib\b|os\.system|(?<!re\.)\bcompile\("
)


def packed_files() -> list[Path]:
    """Return what `comfy node pack` would ship: the files of git less `.comfyignore`."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    names = answer.stdout.splitlines() if answer.returncode == 0 else []
    ignored = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line]
    return [ROOT / name for name in names if not any(covers(rule, name) for rule in ignored)]


def covers(rule: str, name: str) -> bool:
    return name.startswith(rule) if rule.endswith("/") else fnmatch(name, rule)


def sources() -> list[Path]:
    return [
        ROOT / "__init__.py",
        *(ROOT / "nodes").rglob("*.py"),
        *(ROOT / "seg_core").glob("*.py"),
    ]


def node_classes() -> dict[str, ast.ClassDef]:
    """Find nodes as the Manager's static scanner does: direct base, literal id."""
    found = {}
    for path in (ROOT / "nodes").rglob("*.py"):
        for entry in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(entry, ast.ClassDef) and any(
                ast.unparse(base) in ("io.ComfyNode", "ComfyNode") for base in entry.bases
            ):
                found[literal_id(entry)] = entry
    return found


def literal_id(node: ast.ClassDef) -> str:
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Schema"):
            for keyword in call.keywords:
                if keyword.arg == "node_id" and isinstance(keyword.value, ast.Constant):
                    return keyword.value.value
    raise AssertionError(f"{node.name} has no Schema call with a literal node_id")


def test_project_fields_satisfy_the_registry():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]*(?:[-_][A-Za-z0-9]+)*", project["name"])
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert 0 < len(project["description"]) <= 1000
    assert (ROOT / project["license"]["file"]).exists()
    assert {"Repository", "Homepage", "Documentation", "Issues"} <= set(project["urls"])
    assert comfy["PublisherId"]
    assert comfy["DisplayName"] == "Smoothed Energy Guidance"
    assert "web" not in comfy
    assert "build-system" not in PROJECT


def test_the_comfyui_floor_is_one_plain_version():
    assert re.fullmatch(r">=\d+\.\d+\.\d+", PROJECT["tool"]["comfy"]["requires-comfyui"])


def test_no_accelerator_is_asked_for():
    assert PROJECT["project"]["classifiers"] == ["Operating System :: OS Independent"]


def test_only_matplotlib_is_installed_with_the_pack():
    """It serves the report's plots, and needs no other PyTorch or numpy than ComfyUI has."""
    assert PROJECT["project"]["dependencies"] == ["matplotlib>=3.7"]
    assert (ROOT / "requirements.txt").read_text().split() == ["matplotlib>=3.7"]
    assert not (ROOT / "install.py").exists()


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_what_comfyui_brings_is_imported(path):
    for entry in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(entry, ast.Import):
            names = [alias.name for alias in entry.names]
        elif isinstance(entry, ast.ImportFrom) and not entry.level:
            names = [entry.module or ""]
        else:
            continue
        allowed = ALLOWED if entry.col_offset == 0 else ALLOWED | DECLARED_LAZY
        for name in names:
            assert name.partition(".")[0] in allowed, f"line {entry.lineno} imports {name}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_are_ascii_and_portable(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert "custom_nodes" not in text  # the folder's name and place are the user's
    assert not re.search(r"\.cuda\(|\.to\(.cuda|torch\.autocast", text)


def test_no_v1_mapping_hides_the_entry_point():
    for path in sources():
        assert "NODE_CLASS_MAPPINGS" not in path.read_text(encoding="utf-8")


def test_the_archive_holds_what_users_need_and_no_more():
    files = {str(path.relative_to(ROOT)).replace("\\", "/") for path in packed_files()}
    if not files:
        pytest.skip("not a git checkout: there is no archive to look at")
    tops = {name.partition("/")[0] for name in files}
    assert {"__init__.py", "nodes", "seg_core", "web", "pyproject.toml", "LICENSE"} <= tops
    assert not tops & {"tests", "dev", "dev.py", "benchmarks", ".github", ".ci", "node.zip"}


def test_the_archive_holds_nothing_a_scanner_flags():
    for path in packed_files():
        if path.suffix in (".py", ".toml", ".json", ".js") and path.exists():
            found = re.search(SUSPICIOUS, path.read_text(encoding="utf-8"))
            assert found is None, f"{path.relative_to(ROOT)}: {found.group()}"


def test_node_ids_are_literal_and_all_promised():
    assert set(node_classes()) == set(INPUTS)
    for name in INPUTS:
        assert re.fullmatch(r"SEG[A-Za-z0-9_]+", name)


def test_every_node_has_a_help_page_that_names_its_inputs():
    for node, declared in INPUTS.items():
        page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
        for name in (name for part in declared["input_order"].values() for name in part):
            assert f"`{name}`" in page


@pytest.mark.parametrize("name", ["publish", "test"])
def test_workflow_files_parse(name):
    assert yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())["jobs"]


def test_publishing_is_guarded_and_follows_the_version():
    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text()
    action = yaml.safe_load(text)
    assert action[True]["push"]["paths"] == ["pyproject.toml"]  # YAML 1.1 reads `on` as true
    assert "github.repository_owner ==" in action["jobs"]["publish"]["if"]
    assert action["permissions"]["issues"] == "write"


def test_no_registry_address_is_written_down():
    lock = (ROOT / "dev" / "requirements.txt").read_text()
    assert "://" not in lock
    assert "--" not in lock
