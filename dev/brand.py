"""The icon and the banner that the registry shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dev.diagrams import BLUE, DARK, LIGHT
from dev.places import ROOT, made_folder
from dev.say import say

ICON = ROOT / "docs" / "icon.png"
BANNER = ROOT / "docs" / "banner.png"


def icon(side: int = 400) -> Any:
    """Draw a token grid lit by one blurred query."""
    from PIL import Image, ImageDraw

    from seg_core import gaussian_matrix

    cells, gap, radius = 7, 10, 12
    sheet = Image.new("RGB", (side, side), DARK)
    draw = ImageDraw.Draw(sheet)
    step = (side - 2 * 28 + gap) / cells
    line = gaussian_matrix(33, 1.7, kernel="full")[16][13:20]
    for row in range(cells):
        for column in range(cells):
            light = float(line[row] * line[column] / line[3] ** 2) ** 0.8
            colour = (
                _mixed("#2c3440", BLUE, light)
                if light < 0.7
                else _mixed(BLUE, "#ffffff", (light - 0.7) / 0.3)
            )
            left, top = 28 + column * step, 28 + row * step
            box = (left, top, left + step - gap, top + step - gap)
            draw.rounded_rectangle(box, radius, fill=colour)
    sheet.save(made_folder(ICON.parent) / ICON.name, optimize=True)
    say(f"{ICON.relative_to(ROOT)}: {ICON.stat().st_size // 1024} KiB")
    return sheet


def banner(columns: Mapping[str, list[Any]]) -> None:
    """Put the name beside what the demo model draws without and with the guidance, at 21:9."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = 1680, 720
    sheet = Image.new("RGB", (width, height), DARK)
    draw = ImageDraw.Draw(sheet)
    mark = Image.open(ICON).resize((180, 180))
    sheet.paste(mark, (80, 110))
    draw.text((80, 330), "Smoothed Energy", LIGHT, ImageFont.load_default(84))
    draw.text((80, 425), "Guidance", LIGHT, ImageFont.load_default(84))
    draw.text(
        (80, 550), "guidance without a prompt, in one model call", BLUE, ImageFont.load_default(35)
    )
    side, top = 238, 205
    for x, (name, words) in enumerate((("off", "without SEG"), ("infinite", "with SEG"))):
        left = 860 + x * (side * 3 // 2 + 40)
        draw.text(
            (left + side * 3 // 4, top - 22), words, LIGHT, ImageFont.load_default(40), anchor="ms"
        )
        small = side * 3 // 4 - 4
        for index, image in enumerate(columns[name][:4]):
            place = (left + index % 2 * (small + 8), top + index // 2 * (small + 8))
            sheet.paste(image.resize((small, small), Image.Resampling.LANCZOS), place)
    sheet.quantize(256, kmeans=1).save(BANNER, optimize=True)
    say(f"{BANNER.relative_to(ROOT)}: {BANNER.stat().st_size // 1024} KiB")


def _mixed(dark: str, light: str, share: float) -> tuple[int, ...]:
    share = min(1.0, max(0.0, share))
    pairs = [(int(dark[i : i + 2], 16), int(light[i : i + 2], 16)) for i in (1, 3, 5)]
    return tuple(round(a + (b - a) * share) for a, b in pairs)
