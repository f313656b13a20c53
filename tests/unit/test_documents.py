"""Documents, help pages and translations: links resolve, and every input is told of, alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES, LOCALES = ROOT / "web" / "docs", ROOT / "locales"
README = (ROOT / "README.md").read_text(encoding="utf-8")
NODES = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text(encoding="utf-8"))
FOLDERS = ("docs", "web", "tests", "benchmarks", "example_workflows")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
)
OWN_SCRIPT = {"ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7a3]", "zh": r"[\u4e00-\u9fff]"}
TRANSLATED = [(node, language) for node in NODES for language in OWN_SCRIPT]
LINK = re.compile(r"\]\(([^)\s]+)\)")
PICTURE = re.compile(r"!\[([^\]]+)\]\(([^)]+)\)")
PICTURE_LIMIT = 300 * 1024
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
ABSOLUTE = re.compile(r"(?<![\w.])/(home|root|tmp|work|usr)/|localhost|127\.0\.0\.1")


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", document.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.strip().lower()).replace(" ", "-") for one in headings}


def base(document: Path) -> Path:
    """Return the folder that links start from: one for all help pages, as the frontend has it."""
    return PAGES if PAGES in document.parents else document.parent


def page(node: str, language: str) -> str:
    place = f"{node}.md" if language == "en" else f"{node}/{language}.md"
    return (PAGES / place).read_text(encoding="utf-8")


def labels(language: str, name: str = "nodeDefs") -> dict[str, Any]:
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def inputs(node: str) -> list[str]:
    return [name for part in NODES[node]["input_order"].values() for name in part]


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, part in value.items() for k, v in leaves(part, (*path, key)).items()}


# Documents.


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = unquote(link).partition("#")
        target = (base(document) / place).resolve() if place else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("node", NODES)
def test_the_readme_links_every_node_by_the_name_that_users_see(node):
    schema = rf'node_id="{node}",\s*display_name="([^"]+)"'
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py")]
    (name,) = (name for source in sources for name in re.findall(schema, source))
    assert f"| [{name}](web/docs/{node}.md) |" in README


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(PAGES.rglob("*.md"))], ids=str)
def test_what_users_read_has_described_small_pictures_and_no_place_of_one_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not ABSOLUTE.search(text)
    assert PICTURE.search(text), "a page without a picture"
    for words, link in PICTURE.findall(text):
        assert len(words) >= 10
        assert (base(path) / link).stat().st_size < PICTURE_LIMIT, link


# Help pages.


@pytest.mark.parametrize("node", NODES)
def test_a_page_explains_every_input_and_holds_nothing_that_the_frontend_strips(node):
    for language in ("en", *OWN_SCRIPT):
        text = page(node, language)
        for name in inputs(node):
            row = re.search(rf"^\| `{name}` \| ([^|]+) \| [^|]*\|", text, re.MULTILINE)
            assert row, (language, name)
            assert len(row[1]) > 6, (language, name)
        assert not re.search(r"<(?!https?://)[a-zA-Z/]", text)
        assert "](http://" not in text


def skeleton(text: str) -> dict[str, list[str]]:
    """Return what must be the same in every language."""
    return {
        "headings": re.findall(r"^#+", text, re.MULTILINE),
        "pictures": [link for _, link in PICTURE.findall(text)],
        "equations": re.findall(r"`[a-z]+ = [^`]*[a-z(][^`]*\)`", text),
        "first cells": re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE),
    }


@pytest.mark.parametrize(("node", "language"), TRANSLATED)
def test_a_translated_page_has_the_original_s_structure_and_its_reader_s_labels(node, language):
    text, shown = page(node, language), labels(language)[node]
    assert skeleton(text) == skeleton(page(node, "en"))
    assert text.startswith(f"# {shown['display_name']}\n")
    for name, entry in shown["inputs"].items():
        assert f"| `{name}` | **{entry['name']}**" in text
    for entry in shown["outputs"].values():
        assert f"**{entry['name']}**" in text


# Labels and tooltips.


@pytest.mark.parametrize("language", OWN_SCRIPT)
def test_every_input_and_output_is_translated_and_nothing_else(language):
    assert labels(language).keys() == NODES.keys()
    for node, entry in labels(language).items():
        texts = {"inputs": [name.replace(".", "_") for name in inputs(node)]}
        texts["outputs"] = [str(place) for place in range(len(NODES[node]["output"]))]
        expected = {("display_name",), ("description",)}
        for part, names in texts.items():
            expected |= {(part, name, text) for name in names for text in ("name", "tooltip")}
        assert leaves(entry).keys() == expected
    assert leaves(labels(language, "main")).keys() == leaves(labels("zh", "main")).keys()


@pytest.mark.parametrize("language", OWN_SCRIPT)
def test_texts_survive_the_frontend_and_are_in_the_language_they_claim(language):
    for name in ("nodeDefs", "main"):
        for path, text in leaves(labels(language, name)).items():
            assert text
            assert text.strip() == text
            if path[-1] != "tooltip":  # tooltips are shown as they are
                assert not re.search(r"[{}@|]", text), path
            if path[-1] in ("description", "tooltip"):
                assert re.search(OWN_SCRIPT[language], text), path


@pytest.mark.parametrize("language", OWN_SCRIPT)
def test_choices_keep_the_names_that_widgets_show(language):
    """Options of a combo are not translated by the frontend, so texts must call them by name."""
    for node, name, options in (
        ("SEGuidance", "branch", ("conditional", "unconditional", "free")),
        ("SEGuidance", "kernel", ("reference", "full")),
        ("SEGuidance", "rescale_mode", ("full", "partial", "snf")),
        ("SEGuidanceSAG", "mask", ("attention", "everywhere")),
        ("SEGuidanceSweep", "sigmas", ("off", "infinite")),
    ):
        tooltip = labels(language)[node]["inputs"][name]["tooltip"]
        assert all(option in tooltip for option in options), (node, name)
