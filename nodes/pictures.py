"""Pictures with words: captions above images, and images in a labelled grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

BACKGROUND = "#1b1b1f"
FOREGROUND = "#f0f0f0"


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Return `(height, width, 3)` in 0 to 1 as a picture."""
    values = pixels.detach().float().cpu()[..., :3].clamp(0, 1).mul(255).round()
    return Image.fromarray(values.to(torch.uint8).numpy())


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return a picture as `(height, width, 3)` in 0 to 1."""
    values = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(values)


def with_caption(image: Image.Image, words: str) -> Image.Image:
    """Return a picture with a line of words above it."""
    return labelled_grid([[image]], [words], [""])


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], across: Sequence[str], down: Sequence[str]
) -> Image.Image:
    """Return pictures of one size in rows, with a label above each column and left of each row.

    Args:
        rows: the pictures; all of one size.
        across: a label for each column.
        down: a label for each row; where all are empty there is no such column.
    """
    width, height = rows[0][0].size
    font = _fitting(across, width)
    gap = max(2, width // 128)
    head = _height(font) * 2 if any(across) else 0
    side = _widest(font, down) + 2 * gap if any(down) else 0
    size = (
        side + len(rows[0]) * (width + gap) - gap,
        head + len(rows) * (height + gap) - gap,
    )
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for x, words in enumerate(across):
        place = (side + x * (width + gap) + width / 2, head / 2)
        draw.text(place, words, FOREGROUND, font, anchor="mm")
    for y, words in enumerate(down):
        place = (side - gap * 1.5, head + y * (height + gap) + height / 2)
        draw.text(place, words, FOREGROUND, font, anchor="rm")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (side + x * (width + gap), head + y * (height + gap)))
    return sheet


def _fitting(words: Sequence[str], width: int) -> ImageFont.FreeTypeFont:
    """Return the largest font in which every word keeps to its column."""
    size = max(10, width // 14)
    while size > 10 and _widest(_font(size), words) > width * 0.94:
        size -= 1
    return _font(size)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _widest(font: ImageFont.FreeTypeFont, words: Sequence[str]) -> int:
    return max((round(font.getlength(each)) for each in words), default=0)


def _height(font: ImageFont.FreeTypeFont) -> int:
    _, top, _, bottom = font.getbbox("Ag")
    return round(bottom - top)
