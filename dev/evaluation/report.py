"""What an evaluation shows: the measured rows, their table, and the contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dev.evaluation.measures import (
    Estimate,
    Gaussian,
    bootstrap,
    contrast,
    frechet,
    mirror_parts,
    moved,
    ratio,
    saturation,
)
from dev.evaluation.settings import Setting
from dev.graphs import OFF

PM = "\N{PLUS-MINUS SIGN}"
SHOWN = 8
CELL = 128
FLOORS = 8


@dataclass(frozen=True)
class Row:
    """What was measured of one setting, on the same seeds as all others.

    Attributes:
        name: of the setting.
        method: of the setting.
        distance: Frechet distance to the data.
        matched: the same after the pictures have been brought to the data's contrast.
        mirror: mirror error.
        contrast: as a share of the data's.
        saturation: as a share of the data's.
        moved: RMS difference from the base, *off* in most tables, as a share of its contrast.
    """

    name: str
    method: str
    distance: Estimate
    matched: Estimate | None
    mirror: Estimate | None
    contrast: float
    saturation: float
    moved: float


@dataclass(frozen=True)
class Data:
    """The reference that rows are compared with.

    Attributes:
        gaussian: of the reference features.
        contrast: mean contrast of the data.
        saturation: mean saturation of the data.
        unit: what distances are divided by.
        floor: distances of independent samples of the data, of as many pictures as a row has.
        mirrored: whether a right picture is its own mirror image.
    """

    gaussian: Gaussian
    contrast: float
    saturation: float
    unit: float
    floor: tuple[float, ...] = ()
    mirrored: bool = False

    def distance(self, features: np.ndarray) -> float:
        """Return the Frechet distance in our unit."""
        return frechet(features, self.gaussian) / self.unit


def measured(
    settings: Sequence[Setting],
    images: Mapping[str, np.ndarray],
    features: Mapping[str, np.ndarray],
    data: Data,
    matched: Mapping[str, np.ndarray] | None = None,
    base: str = OFF,
) -> list[Row]:
    """Measure every setting's pictures, paired by seed with those of `base`."""
    distances = bootstrap(features, data.distance, base)
    equals = bootstrap(matched, data.distance, base) if matched else None
    mirrors = None
    if data.mirrored:
        mirrors = bootstrap({k: mirror_parts(v) for k, v in images.items()}, ratio, base)
    return [
        Row(
            setting.name,
            setting.method,
            distances[setting.name],
            equals[setting.name] if equals else None,
            mirrors[setting.name] if mirrors else None,
            float(contrast(images[setting.name]).mean() / data.contrast),
            float(saturation(images[setting.name]).mean() / data.saturation),
            moved(images[setting.name], images[base]),
        )
        for setting in settings
    ]


def table(rows: Sequence[Row], chosen: Sequence[str] = (), base: str = OFF) -> str:
    """Return the rows as a Markdown table; chosen settings are bold."""
    known = {"contrast equal": rows[0].matched, "mirror error": rows[0].mirror}
    words = base if base == OFF else "every 1"
    head = ["setting", "Frechet distance", f"change from {words}"]
    head += [name for name, estimate in known.items() if estimate is not None]
    head += ["contrast", "saturation", f"moved from {words}"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        name = f"**{row.name}**" if row.name in chosen else row.name
        cells = [name, _figure(row.distance), "" if row.name == base else _change(row.distance)]
        cells += [_figure(each) for each in (row.matched, row.mirror) if each is not None]
        cells += [f"{row.contrast:.2f}", f"{row.saturation:.2f}", f"{row.moved:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figure(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} {PM} {estimate.error:.3f}"


def _change(estimate: Estimate) -> str:
    return f"{estimate.change:+.3f} {PM} {estimate.change_error:.3f}"


def chosen(rows: Sequence[Row], candidates: Sequence[Setting]) -> dict[str, str]:
    """Return for each method the candidate of the least distance."""
    allowed = {setting.name for setting in candidates if setting.chooses}
    best: dict[str, Row] = {}
    for row in rows:
        if row.name in allowed and row.method != OFF:
            least = best.setdefault(row.method, row)
            if row.distance.value < least.distance.value:
                best[row.method] = row
    return {method: row.name for method, row in best.items()}


def verdict(rows: Sequence[Row], choice: Mapping[str, str], floor: float) -> list[str]:
    """Say for each method what its chosen setting does, with standard errors.

    Args:
        rows: measured on other seeds than those of the choice.
        choice: for each method the name of its chosen setting.
        floor: the distance of the data from itself.
    """
    by_name = {row.name: row for row in rows}
    off = by_name[OFF]
    lines = []
    for method, name in choice.items():
        row = by_name[name]
        parts = [f"{_share(row.distance, off.distance.value - floor)} of the distance"]
        if row.matched and off.matched:
            parts.append(
                f"{_share(row.matched, off.matched.value - floor)} of it at equal contrast"
            )
        if row.mirror and off.mirror:
            parts.append(f"{_share(row.mirror, off.mirror.value)} of the mirror error")
        lines.append(f"- {method}, '{name}', removes {', '.join(parts)}.")
    return lines


def _share(estimate: Estimate, whole: float) -> str:
    whole = max(whole, 1e-12)
    return f"{-estimate.change / whole:.0%} {PM} {estimate.change_error / whole:.0%}"


def contact_sheet(columns: Mapping[str, Any]) -> Any:
    """Return a picture with one labelled row of images for each setting, seeds in columns."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    font = ImageFont.load_default(18)
    gap = 4
    left = round(20 + max(font.getlength(name) for name in columns))
    count = max(len(images) for images in columns.values())
    size = (left + count * (CELL + gap), gap + len(columns) * (CELL + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for y, (name, images) in enumerate(columns.items()):
        top = gap + y * (CELL + gap)
        draw.text((10, top + CELL / 2), name, "black", font, anchor="lm")
        for x, image in enumerate(images):
            tile = Image.fromarray((np.asarray(image) * 255.0).round().astype(np.uint8))
            way = Image.Resampling.BICUBIC if tile.width < CELL else Image.Resampling.LANCZOS
            sheet.paste(ImageOps.contain(tile, (CELL, CELL), way), (left + x * (CELL + gap), top))
    return sheet
