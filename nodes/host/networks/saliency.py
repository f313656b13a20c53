"""How much attention the tokens of an image draw, and who asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ....seg_core import Target, TokenGrid, column_mass, frame_shares
from .attention import Attention, Span


@dataclass(frozen=True)
class Mass:
    """How much attention each token of an image drew in a block.

    Attributes:
        mass: in shares of the average, row-major over the grid.
        grid: the tokens of the image.
        patch: latent cells along a token's sides; None where the grid is stretched over the latent.
    """

    mass: torch.Tensor
    grid: TokenGrid
    patch: tuple[int, int, int] | None = None


def image_mass(
    attention: Attention, span: Span, patch: tuple[int, int, int] | None, rows: slice
) -> Mass:
    """Return how much attention the image's tokens draw from each other, in some rows."""
    own = attention.of(rows)
    image = span.view(own.by_heads(own.query, own.axis), 1).flatten(1, 2).flatten(2)
    key = own.of_each_head(own.key).flatten(2)
    mass = column_mass(image, key, own.heads, scale=own.scale, mask=own.mask_of(span))
    image_keys = span.view(mass, 1, span.key_offset).flatten(1, 2)
    return Mass(frame_shares(image_keys, span.grid), span.grid, patch)


@dataclass(frozen=True)
class SaliencyRequest:
    """Somebody who asks for the attention that tokens draw in some layers.

    Attributes:
        label: whose guidance it is, in messages.
        targets: the layers.
        keep: is given the layer, how many rows its tensors have for each of the batch, and a
            function that measures rows.
    """

    label: str
    targets: tuple[Target, ...]
    keep: Callable[[Target, int, Callable[[slice], Mass]], None]
