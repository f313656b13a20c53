"""What may happen to chosen blocks of a network, whatever network they belong to.

Each kind is one place where a perturbation can act; what it does there is handed in, as a function
of tensors. A network's view knows the places, and nothing of what is done there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from ....seg_core import BlurMatrices, TokenGrid


class Smooth(Protocol):
    """A smoothing of tokens over their grid."""

    @property
    def axes(self) -> str:
        """``"space"``, ``"time"`` or ``"space and time"``."""
        ...

    @property
    def collapses(self) -> bool:
        """True if the smoothed tokens are all equal along its axes, so that one stands for all."""
        ...

    def __call__(
        self, tokens: torch.Tensor, grid: TokenGrid, matrices: BlurMatrices, one_query: bool
    ) -> torch.Tensor:
        """Return the smoothed tokens; with `one_query`, the ones that stand for the others."""
        ...

    def slopes(self, grid: TokenGrid) -> torch.Tensor:
        """Return how much of the curvature at each token the smoothing lets through."""
        ...


class Mix(Protocol):
    """What attention gives, made of what it gave and the tokens' own values."""

    @property
    def needs_map(self) -> bool:
        """True if anything of the attention map is left."""
        ...

    def __call__(self, out: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the output; without a map, `out` is anything of its shape."""
        ...


class Rearrange(Protocol):
    """Other tokens in the place of those that enter a layer."""

    def __call__(self, tokens: torch.Tensor, seed: int, step: int, layer: int) -> torch.Tensor:
        """Return as many tokens, `(sequences, tokens, dim)`; the same for the same numbers."""
        ...


Auto = Literal["attention", "tokens", "skip"]
"""For which kind of change a network is asked what `auto` means."""


@dataclass(frozen=True, eq=False)
class SmoothQueries:
    """Queries are smoothed over the grid of their tokens; keys and values stay."""

    smooth: Smooth
    takes_heads = True
    auto: Auto = "attention"

    @property
    def one_query(self) -> bool:
        """True if one query stands for all along the axes."""
        return self.smooth.collapses

    def acts_over(self, axis: str) -> bool:
        """Tell whether it smooths over ``"space"``, or ``"time"``."""
        return axis in self.smooth.axes


@dataclass(frozen=True, eq=False)
class ChangeOutput:
    """The output of self-attention is another, token by token."""

    mix: Mix
    takes_heads: bool = True
    auto: Auto = "attention"


@dataclass(frozen=True, eq=False)
class ChangeTokens:
    """Other tokens enter a block, frame by frame; those of text and references stay."""

    rearrange: Rearrange
    takes_heads = False
    auto: Auto = "tokens"


@dataclass(frozen=True, eq=False)
class SkipBlock:
    """A block is skipped: what enters it comes out."""

    takes_heads = False
    auto: Auto = "skip"


Change = SmoothQueries | ChangeOutput | ChangeTokens | SkipBlock
