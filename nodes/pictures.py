"""Pictures with words: images in a grid, with labels above its columns and beside its rows."""

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


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], across: Sequence[str], down: Sequence[str]
) -> Image.Image:
    """Return pictures of one size in rows, with a label above each column and left of each row.

    Where all labels of columns, or of rows, are empty, no room is left for them.
    """
    width, height = rows[0][0].size
    font = _fitting(across, width)
    _, top, _, bottom = font.getbbox("Ag")
    gap = max(2, width // 128)
    head = 2 * round(bottom - top) if any(across) else 0
    side = round(max(map(font.getlength, down))) + 2 * gap if any(down) else 0
    size = side + len(across) * (width + gap) - gap, head + len(rows) * (height + gap) - gap
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for x, words in enumerate(across):
        place = (side + x * (width + gap) + width / 2, head / 2)
        draw.text(place, words, FOREGROUND, font, anchor="mm")
    for y, (words, row) in enumerate(zip(down, rows, strict=True)):
        top = head + y * (height + gap)
        draw.text((side - 1.5 * gap, top + height / 2), words, FOREGROUND, font, anchor="rm")
        for x, image in enumerate(row):
            sheet.paste(image, (side + x * (width + gap), top))
    return sheet


def _fitting(words: Sequence[str], width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the largest font in which every word keeps to its column."""
    size = max(10, width // 14)
    widest = max(map(ImageFont.load_default(size).getlength, words))
    return ImageFont.load_default(max(10, min(size, int(size * 0.94 * width / max(widest, 1)))))
