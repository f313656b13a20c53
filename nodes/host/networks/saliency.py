"""How much attention the tokens of an image draw, and who asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ....seg_core import Target, TokenGrid


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
