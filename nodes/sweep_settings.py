"""The settings of a comparison: from lists as a person writes them to pictures and their labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .guidance_node import GuidanceNode
from .pag import SEGuidancePAG
from .sag import SEGuidanceSAG
from .seg import SEGuidance
from .slg import SEGuidanceSLG
from .ssg import SEGuidanceSSG
from .tpg import SEGuidanceTPG

OFF = 0.0
MOST = 64
WIDTHS = {"off": OFF, "infinite": math.inf, "inf": math.inf}
SCALES = {"off": OFF, "default": None}
SEG = "SEG"
METHODS: dict[str, type[GuidanceNode]] = {
    SEG: SEGuidance,
    "PAG": SEGuidancePAG,
    "SAG": SEGuidanceSAG,
    "TPG": SEGuidanceTPG,
    "SLG": SEGuidanceSLG,
    "SSG": SEGuidanceSSG,
}


@dataclass(frozen=True)
class Setting:
    """One picture of the comparison.

    Attributes:
        method: one of `METHODS`.
        sigma: width of SEG's blur; None for the other methods.
        scale: weight of the guidance; None for the method's default.
        blocks: the selector.
    """

    method: str
    sigma: float | None
    scale: float | None
    blocks: str

    @property
    def is_off(self) -> bool:
        """True if it is the picture without guidance."""
        return OFF in (self.sigma, self.scale)

    def guided(self, model: Any) -> Any:
        """Return a model that is guided so."""
        widgets: dict[str, Any] = {"blocks": self.blocks}
        if self.scale is not None:
            widgets["scale"] = self.scale
        if self.sigma is not None:
            infinite = math.isinf(self.sigma)
            widgets |= {"infinite_blur": infinite, "blur_sigma": OFF if infinite else self.sigma}
        return METHODS[self.method].execute(model, **widgets)[0]


def settings(sigmas: str, scales: str, blocks: str, methods: str = SEG) -> list[list[Setting]]:
    """Return the pictures of a comparison: methods across; blocks, then scales, downwards.

    SEG has a column for each sigma, another method one. With a single column, the next list with
    several entries runs across instead.

    Raises:
        ValueError: if a list is empty or an entry is not valid; names the list and the entry.
    """
    weights = [_number("scales", entry, SCALES) for entry in _entries("scales", scales)]
    selectors = _entries("blocks", blocks, ";")
    axes = (selectors, weights, _columns(sigmas, methods))
    every = [
        Setting(*column, scale, selector) for selector, scale, column in itertools.product(*axes)
    ]
    count = len(every)
    if count > MOST:
        raise ValueError(f"SEG Compare: these lists make {count} images; at most {MOST} are made.")
    across = next((len(axis) for axis in reversed(axes) if len(axis) > 1), 1)
    return [every[start : start + across] for start in range(0, count, across)]


def labels(rows: Sequence[Sequence[Setting]]) -> tuple[list[str], list[str]]:
    """Return the label of each column and of each row: all that differs along it."""
    across = _labels(rows[0])
    if not any(across):
        across = [_words(rows[0][0], ["sigma"])]
    return across, _labels([row[0] for row in rows])


def _labels(line: Sequence[Setting]) -> list[str]:
    names = [name for name in vars(line[0]) if len({getattr(one, name) for one in line}) > 1]
    return [_words(one, names) for one in line]


def _words(setting: Setting, names: Sequence[str]) -> str:
    values = {name: getattr(setting, name) for name in names}
    if OFF in values.values():
        return "off"
    return ", ".join(filter(None, itertools.starmap(_word, values.items())))


def _word(name: str, value: str | float | None) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "scale default" if name == "scale" else ""
    return "infinite" if math.isinf(value) else f"{name} {value:g}"


def _columns(sigmas: str, methods: str) -> list[tuple[str, float | None]]:
    """Return method and width of each column; the picture without guidance stands once, first."""
    widths = [_number("sigmas", entry, WIDTHS) for entry in _entries("sigmas", sigmas)]
    names = [entry.upper() for entry in _entries("methods", methods)]
    for name in names:
        if name not in METHODS:
            raise ValueError(
                f"SEG Compare: {name!r} in methods is none of {', '.join(METHODS)}. Separate "
                "entries with commas."
            )
    off = [(SEG, OFF)] if OFF in widths and SEG not in names else []
    return off + [(name, width) for name in names for width in (widths if name == SEG else [None])]


def _entries(name: str, text: str, separator: str = ",") -> list[str]:
    parts = (part.strip() for part in text.replace("\n", separator).split(separator))
    entries = list(dict.fromkeys(filter(None, parts)))
    if not entries:
        raise ValueError(f"SEG Compare: {name} is empty; write at least one entry.")
    return entries


def _number(name: str, entry: str, words: Mapping[str, float | None]) -> float | None:
    if entry.lower() in words:
        return words[entry.lower()]
    try:
        value = float(entry)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(
            f"SEG Compare: {entry!r} in {name} is neither a number of at least 0 nor "
            f"{' or '.join(words)}. Separate entries with commas."
        )
    return value
