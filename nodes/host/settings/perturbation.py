"""What makes a prediction worse: a change of attention in chosen blocks, or of the input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ....seg_core import Block, Target, describe_targets, draw_blocks
from .changes import Change, SmoothQueries


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen self-attention layers, and all that the network has, to name them by.

    Attributes:
        catalogue: all blocks of the network, in forward order.
        heads: the chosen heads of each chosen layer, in forward order; None for all.
    """

    catalogue: Sequence[Block]
    heads: Mapping[Target, tuple[int, ...] | None]

    @property
    def targets(self) -> tuple[Target, ...]:
        """Return the chosen layers, in forward order."""
        return tuple(self.heads)

    @property
    def where(self) -> str:
        """Return the chosen layers in the selector language."""
        return self.name(self.targets)

    def name(self, targets: Iterable[Target]) -> str:
        """Return some of the network's layers in the selector language."""
        return describe_targets(targets, self.catalogue, self.heads)


@dataclass(frozen=True, eq=False)
class BlockPerturbation(Selection):
    """A change in chosen blocks.

    Attributes:
        label: whose guidance this is, in messages.
        change: what happens to the blocks.
        drawn: how many of the blocks are drawn in each evaluation of the model; 0 for all.
    """

    label: str
    change: Change
    drawn: int = 0

    @property
    def where(self) -> str:
        """Return what it acts on, for the log."""
        return f"{self.drawn} random of {super().where}" if self.drawn else super().where

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
        pool = list(self.heads.items())
        numbers = draw_blocks(len(pool), self.drawn, seed, step)
        return replace(self, heads=dict(pool[number] for number in numbers), drawn=0)


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

    targets: ClassVar[tuple[Target, ...]] = ()
    smooth: ClassVar[SmoothQueries | None] = None

    @property
    def where(self) -> str:
        """Return what it acts on, for the log."""
        if self.source is None:
            return "everywhere"
        return f"where {self.source.where} attends"


Perturbation = BlockPerturbation | InputBlur
