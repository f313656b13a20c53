"""The table of what can be had in which family says what the code does."""

from __future__ import annotations

import importlib
from pathlib import Path

from dit_models import TINY, available, tiny_dit
from family_oracle import guide
from host_models import PACK, shared_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
UNETS = (
    "| SD1.x, SD2.x, SDXL and other UNets | yes | no: single pictures | yes | yes | middle block |",
    "| Stable Video Diffusion | yes | yes | yes | yes | middle block |",
)


def row(family):
    """Return one row of the table, from what the code knows of a family."""
    if family.unsupported:
        return f"| {family.name} | none: {family.unsupported} | | | | |"
    time = "yes" if family.video else "no: single pictures"
    unknown = [part for part in family.parts if part not in family.carried]
    lacking = [p for p, c in family.carried.items() if c.image is None]
    shuffled = "yes"
    if unknown:
        shuffled = "no: its blocks were never run"
    elif lacking:
        shuffled = f"yes, but not in `{lacking[0]}`: the image's tokens do not enter there"
    skip = "middle range"
    if unknown:
        skip = "attention only: its blocks were never run"
    elif family.skip:
        skip = f"`{', '.join(map(str, family.skip))}`".replace("7, 8, 9", "7-9")
    mask = "no: sound and picture share a latent" if "LTX-2" in family.name else "yes"
    return f"| {family.name} | yes | {time} | {mask} | {shuffled} | {skip} |"


def test_the_page_has_a_row_for_each_family_that_says_what_the_code_does():
    families = importlib.import_module(f"{PACK}.nodes.host.networks.dit.families").FAMILIES
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line.startswith("| ") and "SEG, PAG" not in line]
    assert found == [*UNETS, *map(row, families)]


def test_what_the_page_promises_can_be_built():
    for kind in (kind for kind in TINY if available(kind)):
        model = tiny_dit(kind)
        tokens = {"blocks": "patch"} if kind == "pixeldit" else {}
        assert guide("SAG", model) is not model
        assert guide("TPG", model, **tokens) is not model
        assert guide("SLG", model) is not model
    assert guide("SEG", shared_model("svd"), axes="time") is not model
