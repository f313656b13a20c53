"""Translations: complete, alike in every language, and safe to show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ROOT / "locales"
LANGUAGES = ("ja", "ko", "zh")
OF_THE_FRONTEND = {
    "en",
    "zh",
    "zh-TW",
    "ja",
    "ko",
    "ru",
    "fr",
    "es",
    "ar",
    "tr",
    "pt-BR",
    "fa",
    "he",
}
NODES = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text(encoding="utf-8"))
OWN_SCRIPT = {"ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7a3]", "zh": r"[\u4e00-\u9fff]"}


def content(language: str, name: str):
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def leaves(value, path=()):
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, part in value.items() for k, v in leaves(part, (*path, key)).items()}


def test_these_languages_and_no_others_are_shipped():
    assert sorted(folder.name for folder in LOCALES.iterdir()) == sorted(LANGUAGES)
    assert set(LANGUAGES) <= OF_THE_FRONTEND


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_input_and_output_is_translated_and_nothing_else(language):
    translated = content(language, "nodeDefs")
    assert set(translated) == set(NODES)
    for node, entry in translated.items():
        declared = [name for part in NODES[node]["input_order"].values() for name in part]
        assert set(entry) == {"display_name", "description", "inputs", "outputs"}
        assert list(entry["inputs"]) == [name.replace(".", "_") for name in declared], node
        assert list(entry["outputs"]) == [str(i) for i in range(len(NODES[node]["output"]))], node
        for one in (*entry["inputs"].values(), *entry["outputs"].values()):
            assert set(one) == {"name", "tooltip"}


@pytest.mark.parametrize("name", ["nodeDefs", "main"])
def test_all_languages_have_the_same_keys(name):
    keys = [set(leaves(content(language, name))) for language in LANGUAGES]
    assert all(each == keys[0] for each in keys)


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_survive_the_frontend_s_message_format(language):
    for name in ("nodeDefs", "main"):
        for path, text in leaves(content(language, name)).items():
            assert text.strip() == text
            assert text
            if path[-1] != "tooltip":  # tooltips are shown as they are
                assert not re.search(r"[{}@|]", text), path


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_in_the_language_they_claim(language):
    for path, text in leaves(content(language, "nodeDefs")).items():
        if path[-1] in ("description", "tooltip"):
            assert re.search(OWN_SCRIPT[language], text), path


@pytest.mark.parametrize("language", LANGUAGES)
def test_choices_keep_the_names_that_widgets_show(language):
    """Options of a combo are not translated by the frontend, so texts must call them by name."""
    translated = content(language, "nodeDefs")
    for node, name, options in (
        ("SEGuidance", "branch", ("conditional", "unconditional", "free")),
        ("SEGuidance", "kernel", ("reference", "full")),
        ("SEGuidance", "rescale_mode", ("full", "partial", "snf")),
        ("SEGuidanceSAG", "mask", ("attention", "everywhere")),
        ("SEGuidanceSweep", "sigmas", ("off", "infinite")),
    ):
        for option in options:
            assert option in translated[node]["inputs"][name]["tooltip"], (node, name, option)
