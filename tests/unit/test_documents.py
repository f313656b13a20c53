"""Documents: links lead somewhere, and a reader finds every node and every older pack's input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HELP = ROOT / "web" / "docs"
FOLDERS = ("docs", "web", "tests", "benchmarks", "example_workflows")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
)
NODES = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text(encoding="utf-8"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
OLDER_PACKS = {
    "SEGAttention": "scale blur inf_blur",
    "SmoothedEnergyGuidanceAdvanced": (
        "scale blur_sigma unet_block unet_block_id unet_block_list sigma_start sigma_end rescale "
        "rescale_mode"
    ),
}
PICTURE_LIMIT = 300 * 1024


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", document.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.strip().lower()).replace(" ", "-") for one in headings}


def base(document: Path) -> Path:
    """Return the folder that links start from: one for all help pages, as the frontend has it."""
    return HELP if HELP in document.parents else document.parent


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = unquote(link).partition("#")
        target = (base(document) / place).resolve() if place else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_shows_what_it_is_first_in_a_small_picture():
    opening = README.split("\n## ", 1)[0]
    assert re.search(r"!\[[^\]]{20,}\]\(docs/[\w.-]+\)", opening)
    for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / link).stat().st_size < PICTURE_LIMIT, link


@pytest.mark.parametrize("node", NODES)
def test_the_readme_links_every_node_by_the_name_that_users_see(node):
    schema = rf'node_id="{node}",\s*display_name="([^"]+)"'
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py")]
    (name,) = (name for source in sources for name in re.findall(schema, source))
    assert f"| [{name}](web/docs/{node}.md) |" in README


@pytest.mark.parametrize("old", OLDER_PACKS)
def test_migration_covers_every_input_of_the_older_node(old):
    table = README.split(f"\nFrom `{old}`", 1)[1].split("\nFrom `", 1)[0]
    for name in OLDER_PACKS[old].split():
        assert f"`{name}`" in table, name


def test_nothing_of_a_single_machine_is_in_the_text():
    text = README + "".join(page.read_text(encoding="utf-8") for page in HELP.glob("*.md"))
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr)/|localhost|127\.0\.0\.1", text)
