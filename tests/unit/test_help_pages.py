"""Help pages: every node in every language, alike in structure, with pictures that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "web" / "docs"
LANGUAGES = ("ja", "ko", "zh")
NODES = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text(encoding="utf-8"))
EVERY = [(node, language) for node in NODES for language in ("en", *LANGUAGES)]
TRANSLATED = [(node, language) for node in NODES for language in LANGUAGES]
PICTURE = re.compile(r"!\[([^\]]+)\]\(([^)]+)\)")
PICTURE_LIMIT = 300 * 1024


def page(node: str, language: str) -> str:
    place = f"{node}.md" if language == "en" else f"{node}/{language}.md"
    return (PAGES / place).read_text(encoding="utf-8")


def test_there_are_these_pages_and_no_others():
    found = {str(path.relative_to(PAGES).as_posix()) for path in PAGES.rglob("*.md")}
    wanted = {f"{node}.md" for node in NODES}
    assert found == wanted | {f"{node}/{language}.md" for node, language in TRANSLATED}


@pytest.mark.parametrize(("node", "language"), EVERY)
def test_every_input_has_a_row_with_a_meaning(node, language):
    text = page(node, language)
    for name in (name for part in NODES[node]["input_order"].values() for name in part):
        (row,) = re.findall(rf"^\| `{name}` \| ([^|]+) \| [^|]*\|", text, re.MULTILINE)[:1]
        assert len(row) > 6, name


@pytest.mark.parametrize(("node", "language"), EVERY)
def test_a_page_tells_when_it_helps_and_what_it_costs(node, language):
    text = page(node, language)
    assert text.startswith("# ")
    headings = {
        "en": ("When it helps", "Cost"),
        "zh": ("什么时候有用", "开销"),
        "ja": ("役に立つとき", "コスト"),
        "ko": ("도움이 될 때", "비용"),
    }[language]
    for heading in headings:
        assert f"\n## {heading}" in text


@pytest.mark.parametrize("node", [n for n in NODES if n not in ("SEGuidanceReport",)])
def test_a_page_states_the_equation(node):
    assert re.search(r"`guid[a-z]+ = [^`]+`", page(node, "en"))


@pytest.mark.parametrize(("node", "language"), EVERY)
def test_pictures_exist_are_small_and_are_described(node, language):
    found = PICTURE.findall(page(node, language))
    assert found, "a page without a picture"
    for words, link in found:
        # The frontend resolves every link from the folder of all pages.
        path = PAGES / link
        assert len(words) >= 10
        assert path.stat().st_size < PICTURE_LIMIT
        with Image.open(path) as picture:
            picture.verify()


@pytest.mark.parametrize("path", sorted((PAGES / "pictures").iterdir()), ids=lambda path: path.name)
def test_every_picture_is_used_and_made_by_the_script(path):
    texts = "".join(each.read_text(encoding="utf-8") for each in PAGES.rglob("*.md"))
    assert f"pictures/{path.name}" in texts
    script = (ROOT / "dev" / "help_pictures.py").read_text(encoding="utf-8")
    assert f'"{path.stem}"' in script


def skeleton(text: str) -> dict[str, list]:
    """Return what must be the same in every language."""
    lines = text.splitlines()
    return {
        "headings": [line.split(" ", 1)[0] for line in lines if line.startswith("#")],
        "pictures": [link for _, link in PICTURE.findall(text)],
        "equations": re.findall(r"`[a-z]+ = [^`]*[a-z(][^`]*\)`", text),
        "first cells": [
            line.split("|")[1].strip() for line in lines if line.startswith("| `") and "|" in line
        ],
        "columns": [line.count("|") for line in lines if line.startswith("|---")],
        "list items": [line[:1] for line in lines if re.match(r"- |\d\. ", line)],
        "slants": [line[:1] for line in lines if re.fullmatch(r"\*[^*].*[^*]\*", line)],
    }


@pytest.mark.parametrize(("node", "language"), TRANSLATED)
def test_a_translation_has_the_structure_of_the_original(node, language):
    original, translated = skeleton(page(node, "en")), skeleton(page(node, language))
    for part, wanted in original.items():
        assert translated[part] == wanted, part


@pytest.mark.parametrize(("node", "language"), TRANSLATED)
def test_a_translation_uses_the_labels_that_its_reader_sees(node, language):
    place = ROOT / "locales" / language / "nodeDefs.json"
    labels = json.loads(place.read_text(encoding="utf-8"))[node]
    text = page(node, language)
    assert text.startswith(f"# {labels['display_name']}\n")
    for name, entry in labels["inputs"].items():
        assert f"| `{name}` | **{entry['name']}**" in text
    for entry in labels["outputs"].values():
        assert f"**{entry['name']}**" in text


@pytest.mark.parametrize(("node", "language"), EVERY)
def test_pages_hold_nothing_that_the_frontend_strips(node, language):
    text = page(node, language)
    assert not re.search(r"<(?!https?://)[a-zA-Z/]", text)
    assert "](http://" not in text
