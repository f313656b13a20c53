"""What makes a prediction worse: the contract between a branch, a step and a network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...seg_core import BlurMatrices, Target, TokenGrid

if TYPE_CHECKING:
    from .call import Call
    from .recorder import Look
    from .sampling import Step


class Site:
    """What a perturbation needs to know, and what it tells, during one model call."""

    def __init__(
        self, matrices: BlurMatrices, rows: list[slice] | None = None, look: Look | None = None
    ) -> None:
        self.matrices = matrices
        self.rows = rows
        """The rows of the batch to perturb; None for all of them."""
        self.look = look
        """What a probe wants to see of the smoothed attention; None without a probe."""
        self.reached: set[Target] = set()


@dataclass(frozen=True)
class Start:
    """The latent of a perturbed pass and the prediction that a perfect model would give for it."""

    x: torch.Tensor
    reference: torch.Tensor


class Smooth(Protocol):
    """A smoothing of tokens over their grid."""

    @property
    def collapses(self) -> bool:
        """True if the smoothed tokens of a frame are all equal, so that one may stand for all."""
        ...

    def __call__(
        self, tokens: torch.Tensor, grid: TokenGrid, site: Site, one_query: bool
    ) -> torch.Tensor:
        """Return the smoothed tokens; with `one_query`, one for each frame."""
        ...

    def slopes(self, grid: TokenGrid) -> torch.Tensor:
        """Return how much of the curvature at each token the smoothing lets through."""
        ...


class Perturbation:
    """A change for one branch; as it stands, none at all."""

    label: str
    network: Any
    targets: tuple[Target, ...]
    watches_main_pass = False
    fork: Any = None
    """Where a pass with this change first differs from the plain one; None if not known."""

    @property
    def where(self) -> str:
        """Return what it acts on, for the log."""
        return self.name(self.targets)

    def name(self, targets: Iterable[Target]) -> str:
        """Return some of its blocks in the selector language."""
        return self.network.describe(targets)

    def start(self, step: Step, args: dict[str, Any], conds: Any, prediction: Any) -> Start | None:
        """Return where the perturbed pass starts from; None if there can be no pass."""
        del step, conds
        return Start(args["input"], prediction)

    def watch(self, call: Call, step: Step) -> None:
        """Look at one call of the main pass."""

    def install(self, call: Call, site: Site) -> None:
        """Apply the change to one call of the perturbed pass."""


@dataclass(frozen=True, eq=False)
class BlockPerturbation(Perturbation):
    """A change to chosen self-attention blocks of a network."""

    label: str
    network: Any
    targets: tuple[Target, ...]

    @cached_property
    def fork(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return where this perturbation first acts."""
        return self.network.fork(self.targets)
