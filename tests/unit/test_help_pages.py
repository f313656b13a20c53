"""Help pages and translations: every input in every language, alike, and safe to show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES, LOCALES = ROOT / "web" / "docs", ROOT / "locales"
NODES = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text(encoding="utf-8"))
OWN_SCRIPT = {"ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7a3]", "zh": r"[\u4e00-\u9fff]"}
LANGUAGES = tuple(OWN_SCRIPT)
EVERY = [(node, language) for node in NODES for language in ("en", *LANGUAGES)]
TRANSLATED = [(node, language) for node in NODES for language in LANGUAGES]
PICTURE = re.compile(r"!\[([^\]]+)\]\(([^)]+)\)")
PICTURE_LIMIT = 300 * 1024


def page(node: str, language: str) -> str:
    place = f"{node}.md" if language == "en" else f"{node}/{language}.md"
    return (PAGES / place).read_text(encoding="utf-8")


def content(language: str, name: str = "nodeDefs"):
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def inputs(node: str) -> list[str]:
    return [name for part in NODES[node]["input_order"].values() for name in part]


def leaves(value, path=()):
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, part in value.items() for k, v in leaves(part, (*path, key)).items()}


def test_there_are_these_languages_and_pages_and_no_others():
    assert sorted(folder.name for folder in LOCALES.iterdir()) == sorted(LANGUAGES)
    found = {str(path.relative_to(PAGES).as_posix()) for path in PAGES.rglob("*.md")}
    wanted = {f"{node}.md" for node in NODES}
    assert found == wanted | {f"{node}/{language}.md" for node, language in TRANSLATED}


# Pages.


@pytest.mark.parametrize(("node", "language"), EVERY)
def test_a_page_explains_every_input_and_holds_nothing_that_the_frontend_strips(node, language):
    text = page(node, language)
    for name in inputs(node):
        (row,) = re.findall(rf"^\| `{name}` \| ([^|]+) \| [^|]*\|", text, re.MULTILINE)[:1]
        assert len(row) > 6, name
    assert not re.search(r"<(?!https?://)[a-zA-Z/]", text)
    assert "](http://" not in text
    assert PICTURE.search(text), "a page without a picture"
    for words, link in PICTURE.findall(text):
        assert len(words) >= 10
        # The frontend resolves every link from the folder of all pages.
        assert (PAGES / link).stat().st_size < PICTURE_LIMIT


def skeleton(text: str) -> dict[str, list]:
    """Return what must be the same in every language."""
    lines = text.splitlines()
    return {
        "headings": [line.split(" ", 1)[0] for line in lines if line.startswith("#")],
        "pictures": [link for _, link in PICTURE.findall(text)],
        "equations": re.findall(r"`[a-z]+ = [^`]*[a-z(][^`]*\)`", text),
        "first cells": [line.split("|")[1].strip() for line in lines if line.startswith("| `")],
    }


@pytest.mark.parametrize(("node", "language"), TRANSLATED)
def test_a_translated_page_has_the_original_s_structure_and_its_reader_s_labels(node, language):
    text, labels = page(node, language), content(language)[node]
    assert skeleton(text) == skeleton(page(node, "en"))
    assert text.startswith(f"# {labels['display_name']}\n")
    for name, entry in labels["inputs"].items():
        assert f"| `{name}` | **{entry['name']}**" in text
    for entry in labels["outputs"].values():
        assert f"**{entry['name']}**" in text


# Labels and tooltips.


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_input_and_output_is_translated_and_nothing_else(language):
    translated = content(language)
    assert set(translated) == set(NODES)
    for node, entry in translated.items():
        assert set(entry) == {"display_name", "description", "inputs", "outputs"}
        assert list(entry["inputs"]) == [name.replace(".", "_") for name in inputs(node)], node
        assert list(entry["outputs"]) == [str(i) for i in range(len(NODES[node]["output"]))], node
        for one in (*entry["inputs"].values(), *entry["outputs"].values()):
            assert set(one) == {"name", "tooltip"}
    keys = [set(leaves(content(each, "main"))) for each in (language, LANGUAGES[0])]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_survive_the_frontend_and_are_in_the_language_they_claim(language):
    for name in ("nodeDefs", "main"):
        for path, text in leaves(content(language, name)).items():
            assert text
            assert text.strip() == text
            if path[-1] != "tooltip":  # tooltips are shown as they are
                assert not re.search(r"[{}@|]", text), path
            if path[-1] in ("description", "tooltip"):
                assert re.search(OWN_SCRIPT[language], text), path


@pytest.mark.parametrize("language", LANGUAGES)
def test_choices_keep_the_names_that_widgets_show(language):
    """Options of a combo are not translated by the frontend, so texts must call them by name."""
    for node, name, options in (
        ("SEGuidance", "branch", ("conditional", "unconditional", "free")),
        ("SEGuidance", "kernel", ("reference", "full")),
        ("SEGuidance", "rescale_mode", ("full", "partial", "snf")),
        ("SEGuidanceSAG", "mask", ("attention", "everywhere")),
        ("SEGuidanceSweep", "sigmas", ("off", "infinite")),
    ):
        tooltip = content(language)[node]["inputs"][name]["tooltip"]
        assert all(option in tooltip for option in options), (node, name)
