"""README and help pages: nothing promised that is not there, nothing there that is not told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
NODES = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text(encoding="utf-8"))
HEADINGS = [
    "Install",
    "Quick start",
    "Nodes",
    "Supported models",
    "How it works",
    "What it costs",
    "File tour",
    "What is verified, and how",
    "Limits",
    "Coming from another pack",
    "Paper against code",
    "Glossary",
    "Develop",
    "Citation, credits, licence",
]
OLDER_PACKS = {
    "SEGAttention": ["scale", "blur", "inf_blur"],
    "SmoothedEnergyGuidanceAdvanced": [
        "scale",
        "blur_sigma",
        "unet_block",
        "unet_block_id",
        "unet_block_list",
        "sigma_start",
        "sigma_end",
        "rescale",
        "rescale_mode",
    ],
}
DOT = "\N{MIDDLE DOT}"
PICTURE_LIMIT = 300 * 1024


def section(title: str) -> str:
    """Return the text under a heading of the second level."""
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def local_links(text: str) -> list[str]:
    found = re.findall(r"\]\(([^)#\s]+)\)", text)
    return [unquote(link) for link in found if not link.startswith(("http://", "https://"))]


def inputs(node: str) -> list[str]:
    return [name for part in NODES[node]["input_order"].values() for name in part]


def display_name(node: str) -> str:
    for path in (ROOT / "nodes").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        found = re.search(rf'node_id="{node}",\s*display_name="([^"]+)"', source)
        if found:
            return found.group(1)
    raise AssertionError(f"no schema of {node} under nodes/")


def test_headings_stand_in_the_house_s_order():
    assert re.findall(r"^## (.+)$", README, re.MULTILINE) == HEADINGS


def test_the_readme_says_what_it_is_and_shows_a_picture_before_anything_else():
    opening = README.split("\n## ", 1)[0]
    assert opening.startswith("# ")
    assert re.search(r"!\[[^\]]{20,}\]\(docs/[\w.-]+\)", opening)


@pytest.mark.parametrize("link", sorted(set(local_links(README))))
def test_links_of_the_readme_resolve(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_help_pages_resolve(page):
    for link in local_links(page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_pictures_are_small():
    for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / link).stat().st_size < PICTURE_LIMIT, link


@pytest.mark.parametrize("node", NODES)
def test_every_node_has_a_heading_and_tells_of_each_input(node):
    nodes = section("Nodes")
    assert f"### {display_name(node)} {DOT} `{node}`" in nodes
    told = nodes.split(f"{DOT} `{node}`", 1)[1].split("\n### ", 1)[0]
    for name in inputs(node):
        assert f"`{name}`" in told, name


@pytest.mark.parametrize("node", NODES)
def test_every_node_has_a_help_page_with_a_row_for_each_input(node):
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {display_name(node)}\n")
    for name in inputs(node):
        assert f"\n| `{name}` |" in page, name


def test_each_equation_is_linked_to_a_file_that_states_it():
    rows = [line for line in section("How it works").splitlines() if line.count("$") >= 2]
    table = [line for line in rows if line.startswith("|")]
    assert len(table) == 3
    for line in table:
        (link,) = local_links(line)
        assert "$$" in (ROOT / link).read_text(encoding="utf-8")


def test_each_claim_names_tests_that_exist():
    rows = [line for line in section("What is verified, and how").splitlines() if "](" in line]
    assert len(rows) >= 8
    for line in rows:
        links = local_links(line)
        assert links
        for link in links:
            assert re.search(r"^def test_", (ROOT / link).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_workflow_is_linked():
    for path in (ROOT / "example_workflows").glob("*.json"):
        assert f"(example_workflows/{quote(path.name)})" in README


@pytest.mark.parametrize("old", OLDER_PACKS)
def test_migration_covers_every_input_of_the_older_node(old):
    after = section("Coming from another pack").split(f"From `{old}`", 1)[1]
    table = after.split("\nFrom `", 1)[0]
    for name in OLDER_PACKS[old]:
        assert f"`{name}`" in table, name


def test_the_two_commands_are_there():
    for command in ("python dev.py demo", "python dev.py test"):
        assert command in section("Install")


@pytest.mark.parametrize("text", [README, *(page.read_text(encoding="utf-8") for page in PAGES)])
def test_nothing_of_a_single_machine_is_in_the_text(text):
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr)/|localhost|127\.0\.0\.1", text)
