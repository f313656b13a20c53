"""What makes a prediction worse: a change of attention in chosen blocks, or of the input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ....seg_core import Block, Target, describe_targets, draw_blocks
from .changes import Change, SmoothQueries


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen self-attention layers, and all that the network has, to name them by."""

    catalogue: tuple[Block, ...]
    targets: tuple[Target, ...]
    heads: Mapping[Target, tuple[int, ...]] = field(default_factory=dict)
    """The chosen heads of layers of which not all are."""

    def name(self, targets: Iterable[Target]) -> str:
        """Return some of the network's layers in the selector language."""
        return describe_targets(targets, self.catalogue, self.heads)


@dataclass(frozen=True, eq=False)
class BlockPerturbation:
    """A change in chosen blocks.

    Attributes:
        label: whose guidance this is, in messages.
        selection: the blocks.
        change: what happens to them.
        drawn: how many of the blocks are drawn in each evaluation of the model; 0 for all.
    """

    label: str
    selection: Selection
    change: Change
    drawn: int = 0

    @property
    def targets(self) -> tuple[Target, ...]:
        """Return the layers that are changed, in forward order."""
        return self.selection.targets

    def heads(self, target: Target) -> tuple[int, ...] | None:
        """Return the heads of a layer that are changed; None for all."""
        return self.selection.heads.get(target)

    @property
    def where(self) -> str:
        """Return what it acts on, for the log."""
        names = self.name(self.targets)
        return f"{self.drawn} random of {names}" if self.drawn else names

    @property
    def smooth(self) -> SmoothQueries | None:
        """Return the smoothing of queries; None if it does something else."""
        return self.change if isinstance(self.change, SmoothQueries) else None

    def at(self, seed: int, step: int) -> BlockPerturbation:
        """Return what is changed in one evaluation of the model.

        Args:
            seed: of the sampler.
            step: number of the evaluation.
        """
        if not self.drawn:
            return self
        numbers = draw_blocks(len(self.targets), self.drawn, seed, step)
        targets = tuple(self.targets[number] for number in numbers)
        return replace(self, selection=replace(self.selection, targets=targets), drawn=0)

    def name(self, targets: Iterable[Target]) -> str:
        """Return some of its blocks in the selector language."""
        return self.selection.name(targets)


@dataclass(frozen=True, eq=False)
class InputBlur:
    """The input is blurred where the attention of chosen blocks gathers, or everywhere.

    Attributes:
        label: whose guidance this is, in messages.
        source: the blocks whose attention says where; None for everywhere.
        sigma: width of the blur of the predicted image, in latent cells.
        kernel: ``"reference"`` or ``"full"``.
        threshold: how much attention a place must draw, in shares of the average.
    """

    label: str
    source: Selection | None
    sigma: float
    kernel: str
    threshold: float

    targets: tuple[Target, ...] = ()
    smooth: SmoothQueries | None = None

    @property
    def where(self) -> str:
        """Return what it acts on, for the log."""
        if self.source is None:
            return "everywhere"
        return f"where {self.source.name(self.source.targets)} attends"


Perturbation = BlockPerturbation | InputBlur
