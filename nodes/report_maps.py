"""Heat maps of where guidance acted in a recorded run."""

from __future__ import annotations

import torch
from PIL import Image

from .host.probe.probe import Record
from .pictures import BACKGROUND, labelled_grid, to_image, to_pixels
from .report_plots import require_matplotlib

MOST_IMAGES = 16
MAP_SIDE = 512


def heat_maps(record: Record, image: torch.Tensor | None) -> torch.Tensor:
    """Return where guidance acted, brightest where it was strongest, as an IMAGE batch.

    For each image all guided steps together, then each third of them, over the image in grey if it
    is given. A run without guidance, or of latents without height and width, gives one frame that
    says so.
    """
    if record.heat is None:
        blank = Image.new("RGB", (MAP_SIDE, MAP_SIDE), BACKGROUND)
        return _captioned(blank, "no guidance to show")[None]
    count = record.heat.shape[1]
    shown = min(count, MOST_IMAGES)
    frames = []
    for index in (i * count // shown for i in range(shown)):
        below = _below(image, index, count)
        for words, squares in _phases(record.heat[:, index]):
            heated = _heated(squares.mean(dim=0).sqrt(), below)
            frames.append(_captioned(to_image(heated), words))
    return torch.stack(frames)


def _captioned(image: Image.Image, words: str) -> torch.Tensor:
    return to_pixels(labelled_grid([[image]], [words], [""]))


def _phases(heat: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return all steps of a map, and each third of them where there are three."""
    phases = [("all guided steps", heat)]
    if len(heat) >= 3:
        names = ("first third", "second third", "last third")
        phases += zip(names, heat.tensor_split(3), strict=True)
    return phases


def _below(image: torch.Tensor | None, index: int, count: int) -> torch.Tensor | None:
    """Return the image that belongs to a map; a video has more frames than maps."""
    if image is None:
        return None
    return image[round(index * (len(image) - 1) / max(1, count - 1)), ..., :3]


def _heated(strength: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
    """Return a map in colour, over an image in grey or over black."""
    if image is None:
        factor = max(1, MAP_SIDE // max(strength.shape))
        image = torch.zeros(*(side * factor for side in strength.shape), 3)
    level = torch.quantile(strength.flatten(), 0.995).clamp(min=1e-12)
    scaled = torch.nn.functional.interpolate(
        (strength / level).clamp(0, 1)[None, None],
        size=tuple(image.shape[:2]),
        mode="bilinear",
        align_corners=False,
    )[0, 0]
    colours = torch.from_numpy(require_matplotlib().colormaps["inferno"](scaled.numpy())[..., :3])
    grey = image.float().cpu().mean(dim=-1, keepdim=True)
    opacity = 0.25 + 0.6 * scaled[..., None]
    return (1 - opacity) * grey + opacity * colours.float()
