"""What `dev.py demo` shows: the labelled picture, and the figures in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dev.evaluation.measures import moved
from dev.evaluation.render import Plan
from dev.graphs import OFF
from dev.places import made_folder
from dev.say import disk_errors, say

WIDTH = 26


@dataclass
class Row:
    """One row of the picture: how it is sampled, and the images of each column."""

    label: str
    caption: str
    plan: Plan
    images: dict[str, list[Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def _moved(images: list[Any], off: list[Any]) -> float:
    import numpy as np

    return moved(*(np.stack([np.asarray(image) for image in each]) for each in (images, off)))


def report(rows: list[Row]) -> None:
    """Say how long each column took and how far it moved."""
    say("\nseconds per image (the first column of the first row also loads the model),")
    say("and how far the column moved from *off*: RMS difference / contrast of *off*")
    say(f"{'':<18}" + "".join(f"{column:>{WIDTH}}" for column in rows[0].images))
    for row in rows:
        off = row.images[OFF]
        cells = (
            f"{row.seconds[column]:8.2f} s {_moved(images, off):7.1%}"
            for column, images in row.images.items()
        )
        say(f"{row.label:<18}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))


def write_picture(rows: list[Row], out: Path, title: str) -> None:
    """Draw the columns side by side, labelled, and write the picture."""
    from PIL import Image, ImageDraw, ImageFont

    sheets = [[_sheet(images) for images in row.images.values()] for row in rows]
    width, height = sheets[0][0].size
    scale = max(1, round(300 / max(width, height)))
    width, height = width * scale, height * scale
    font, small = (ImageFont.load_default(size) for size in (22, 18))
    gap, head, strip = 12, 84, 34
    size = (gap + len(sheets[0]) * (width + gap), head + len(rows) * (height + strip + gap))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((gap, 10), _fitted(draw, title, size[0] - 2 * gap, font), "black", font)
    for x, column in enumerate(rows[0].images):
        left = gap + x * (width + gap)
        draw.text((left + width / 2, head - 14), column, "black", font, anchor="ms")
        for y, row in enumerate(rows):
            top = head + y * (height + strip + gap)
            picture.paste(
                sheets[y][x].resize((width, height), Image.Resampling.NEAREST), (left, top)
            )
            away = _moved(row.images[column], row.images[OFF])
            note = row.caption if x == 0 else f"differs from off by {away:.0%}"
            draw.text((left, top + height + 6), _fitted(draw, note, width, small), "black", small)
    with disk_errors(out):
        made_folder(out.parent)
        picture.save(out, quality=92, subsampling=0, optimize=True)  # if a JPEG is asked for


def _fitted(draw: Any, text: str, width: int, font: Any) -> str:
    while draw.textlength(text, font) > width and len(text) > 4:
        text = text[:-4].rstrip() + "..."
    return text


def _sheet(images: list[Any]) -> Any:
    """Return the images of one batch side by side, as nearly square as they go."""
    from PIL import Image

    across = next(n for n in range(1, len(images) + 1) if n * n >= len(images))
    down = -(-len(images) // across)
    width, height = images[0].size
    sheet = Image.new("RGB", (across * (width + 2) - 2, down * (height + 2) - 2), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % across * (width + 2), index // across * (height + 2)))
    return sheet
