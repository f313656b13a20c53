"""What may happen to chosen blocks of a network, whatever network they belong to.

Each kind is one place where a perturbation can act. A network's adapter knows the places, and
nothing of what is done there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ....seg_core import BlurMatrices, TokenGrid, blur_queries, blur_slopes

Rearrange = Callable[[torch.Tensor, int, int, int], torch.Tensor]
"""Is given the tokens that enter a layer, `(sequences, tokens, dim)`, and the run's seed, the step
and the layer; returns as many tokens, the same for the same numbers."""
Auto = Literal["attention", "tokens", "swap", "skip"]
"""For which kind of change a network is asked what `auto` means; attention has heads to choose."""


@dataclass(frozen=True, eq=False)
class SmoothQueries:
    """Queries are blurred over the grid of their tokens; keys and values stay.

    Attributes:
        sigma: blur width in token cells; ``math.inf`` gives every token the mean query.
        kernel: ``"reference"`` or ``"full"``.
        axes: ``"space"``, ``"time"`` or ``"space and time"``.
        strength: how far the output is drawn to that of the blurred queries, above 0 and up to 1.
    """

    sigma: float
    kernel: str
    axes: str = "space"
    strength: float = 1.0
    auto: Auto = "attention"

    @property
    def one_query(self) -> bool:
        """True if one query stands for all along the axes."""
        return math.isinf(self.sigma)

    def __call__(
        self, tokens: torch.Tensor, grid: TokenGrid, matrices: BlurMatrices
    ) -> torch.Tensor:
        """Return the blurred queries."""
        return blur_queries(
            tokens, grid, self.sigma, kernel=self.kernel, matrices=matrices, axes=self.axes
        )

    def slopes(self, grid: TokenGrid) -> torch.Tensor:
        """Return how much of the energy's curvature at each token the blur lets through."""
        return blur_slopes(grid, self.sigma, kernel=self.kernel, axes=self.axes)


@dataclass(frozen=True, eq=False)
class ChangeOutput:
    """The output of self-attention is another, token by token.

    Attributes:
        mix: is given the output and the tokens' own values, and returns the other output.
        needs_map: anything of the attention map is left; if not, `mix` may be given any output.
    """

    mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    needs_map: bool
    auto: Auto = "attention"


@dataclass(frozen=True, eq=False)
class ChangeTokens:
    """Other tokens enter a block, frame by frame; those of text and references stay."""

    rearrange: Rearrange
    auto: Auto = "tokens"


@dataclass(frozen=True, eq=False)
class SkipBlock:
    """A block is skipped: what enters it comes out."""

    auto: Auto = "skip"


Change = SmoothQueries | ChangeOutput | ChangeTokens | SkipBlock
