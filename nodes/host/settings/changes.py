"""What may happen to self-attention in chosen blocks, whatever network they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ....seg_core import BlurMatrices, TokenGrid


class Smooth(Protocol):
    """A smoothing of tokens over their grid."""

    @property
    def collapses(self) -> bool:
        """True if the smoothed tokens of a frame are all equal, so that one may stand for all."""
        ...

    def __call__(
        self, tokens: torch.Tensor, grid: TokenGrid, matrices: BlurMatrices, one_query: bool
    ) -> torch.Tensor:
        """Return the smoothed tokens; with `one_query`, one for each frame."""
        ...

    def slopes(self, grid: TokenGrid) -> torch.Tensor:
        """Return how much of the curvature at each token the smoothing lets through."""
        ...


@dataclass(frozen=True, eq=False)
class SmoothQueries:
    """Queries are smoothed over the grid of their tokens; keys and values stay."""

    smooth: Smooth

    @property
    def one_query(self) -> bool:
        """True if one query for each frame is enough."""
        return self.smooth.collapses


@dataclass(frozen=True, eq=False)
class SeeItself:
    r"""Each token's attention is drawn towards itself: the map towards the identity.

    $$O = (1 - s)\,A V + s\,V$$

    Source: PAG, arXiv:2403.17377, for strength 1; SoftPAG, arXiv:2506.10978, between.
    """

    strength: float

    @property
    def needs_map(self) -> bool:
        """True if anything of the attention map is left."""
        return self.strength != 1

    def mixed(self, out: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the output of attention, drawn towards the tokens' own values."""
        return torch.lerp(out, value.to(out.dtype), self.strength)


Change = SmoothQueries | SeeItself
