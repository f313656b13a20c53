"""One guidance branch: which perturbed prediction to move away from, how far, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....seg_core import Window
from .perturbation import BlockPerturbation, Perturbation

Side = Literal["conditional", "unconditional", "free"]


@dataclass(frozen=True, eq=False)
class Branch:
    r"""The settings of one guidance.

    $$\text{guided} = \text{denoised} + s\,(\text{prediction} - \text{perturbed})$$

    with `denoised` whatever the graph made of the ordinary predictions. The difference is computed
    in every n-th evaluation, `every`, and held between them. Instances are immutable and hold
    neither tensors nor networks, so clones of a model may share them, also between threads.
    """

    perturbation: Perturbation
    scale: float
    window: Window
    side: Side = "conditional"
    rescale: float = 0.0
    rescale_mode: str = "full"
    reuse: bool = True
    every: int = 1

    def __deepcopy__(self, _memo: object) -> Branch:
        """Return the branch itself: copies of a model's options guide by the same one."""
        return self

    @property
    def joins(self) -> bool:
        """True if its prediction may be made in the same call as the base prediction."""
        of_blocks = isinstance(self.perturbation, BlockPerturbation)
        return of_blocks and self.reuse and self.side != "free"

    @property
    def needs_saliency(self) -> bool:
        """True if the attention of the base prediction has to be measured for it."""
        return getattr(self.perturbation, "source", None) is not None

    @property
    def acts_in_base(self) -> bool:
        """True if it measures or perturbs the base prediction itself."""
        return self.side == "free" or self.needs_saliency
