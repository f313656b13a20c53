"""The help page's table of `auto` on transformers is what the table of families gives."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from host_models import PACK

from seg_core import Block, Target, describe_targets

PAGES = Path(__file__).resolve().parents[2] / "web" / "docs"
ROW = re.compile(r"^\| ([^|`]+) \| (\d+)(?: \+ (\d+))? \| `([\w., -]+)` \|$", re.MULTILINE)
NAMES = {"Flux.1": "Flux", "Z-Image": "Z-Image", "Wan 14B": "Wan", "SD3.5 Medium": "SD3.5"}


def family(model):
    families = importlib.import_module(PACK + ".nodes.host.networks.dit.families").FAMILIES
    name = NAMES.get(model.split(",")[0], model.split(",")[0])
    return next(each for each in families if name in each.name.replace(" / ", ", ").split(", "))


@pytest.mark.parametrize(
    "page", ["SEGuidance.md", *(f"SEGuidance/{n}.md" for n in ("zh", "ja", "ko"))]
)
def test_auto_is_what_the_page_says(page):
    auto_range = importlib.import_module(PACK + ".nodes.host.networks.dit.families").auto_range
    rows = ROW.findall((PAGES / page).read_text(encoding="utf-8"))
    assert len(rows) == 7
    for model, *depths, auto in rows:
        row = family(model)
        sizes = [int(depth) for depth in depths if depth]
        assert len(sizes) == len(row.parts)
        blocks = [
            Block(part, i) for part, size in zip(row.parts, sizes, strict=True) for i in range(size)
        ]
        chosen = [blocks[n] for n in auto_range(row, len(blocks))]
        targets = [Target(block.part, block.index) for block in chosen]
        assert describe_targets(targets, blocks) == auto, model
