"""One guidance branch: which perturbed prediction to move away from, how far, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ....seg_core import Window
from .perturbation import BlockPerturbation, Perturbation

Side = Literal["conditional", "unconditional", "free"]
RescaleMode = Literal["full", "partial", "snf"]


@dataclass(frozen=True, eq=False)
class Branch:
    r"""The settings of one guidance.

    $$\text{guided} = \text{denoised} + s\,(\text{prediction} - \text{perturbed})$$

    with `denoised` whatever the graph made of the ordinary predictions. Instances are immutable
    and hold neither tensors nor networks, so clones of a model may share them, also between
    threads, and a deep copy of a model's options is small.
    """

    perturbation: Perturbation
    scale: float
    window: Window
    side: Side = "conditional"
    rescale: float = 0.0
    rescale_mode: RescaleMode = "full"
    reuse: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"scale must be a number of at least 0, got {self.scale}")
        if self.side not in get_args(Side):
            raise ValueError(
                f"branch must be one of {', '.join(get_args(Side))}, got {self.side!r}"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be between 0 and 1, got {self.rescale}")
        if self.rescale_mode not in get_args(RescaleMode):
            raise ValueError(
                f"rescale_mode must be one of {', '.join(get_args(RescaleMode))}, "
                f"got {self.rescale_mode!r}"
            )

    @property
    def joins(self) -> bool:
        """True if its prediction may be made in the same call as the base prediction."""
        return (
            self.reuse and self.side != "free" and isinstance(self.perturbation, BlockPerturbation)
        )

    @property
    def needs_saliency(self) -> bool:
        """True if the attention of the base prediction has to be measured for it."""
        return getattr(self.perturbation, "source", None) is not None
