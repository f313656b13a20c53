"""What one run knows of one branch: when it acts, what it asks for, and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from ....seg_core import Target
from ..batch.active import ActivePerturbation
from ..settings.branch import Branch
from .holding import Holding


@dataclass(eq=False)
class BranchState:
    """The state of one branch in one run.

    Attributes:
        edges: noise levels at which its window begins and ends.
        holding: the differences that stand in for predictions.
        wanted: the conds that it asks for: those of its last step, or the likely ones.
        asked: number of the last evaluation in which it was asked to guide; 0 before any.
        met: its perturbed pass reached the model; another node may answer for the network there.
        unused: its rows joined a call and nobody asked for them.
        unreachable: its perturbation changes nothing in this run; the person was told why, and it
            costs nothing from there on.
        misses: evaluations in which none of its blocks was reached, before the first that was.
        guided: evaluations that it guided.
        held: in how many of them its last difference stood in for a prediction.
        effects: the cfg that each guided prediction is nearest to, and the share of the push that
            no cfg could give; NaN where there is no cfg to compare it with.
        joined: perturbed predictions that were made in the call of the base prediction.
        whole: those that took a pass of their own, by reason.
        tries: in how many runs of the network each block was to be changed.
        hits: in how many of them each block was changed.
    """

    branch: Branch
    edges: tuple[float, float]
    holding: Holding
    wanted: set[Hashable] = field(default_factory=set)
    asked: int = 0
    met: bool = False
    unused: bool = False
    unreachable: bool = False
    misses: int = 0
    guided: int = 0
    held: int = 0
    effects: list[torch.Tensor] = field(default_factory=list)
    joined: int = 0
    whole: Counter[str] = field(default_factory=Counter)
    tries: Counter[Target] = field(default_factory=Counter)
    hits: Counter[Target] = field(default_factory=Counter)

    @property
    def label(self) -> str:
        """Return whose guidance it is, for messages."""
        return self.branch.perturbation.label

    @property
    def joins(self) -> bool:
        """True if its rows should join the calls of the base prediction."""
        return self.branch.joins and not (self.unused or self.unreachable)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Return its predictions so far: in the base prediction's calls, whole ones, held ones."""
        return self.joined, self.whole.total(), self.held

    def count(self, active: ActivePerturbation) -> None:
        """Count one run of the network with its perturbation, and the blocks that it changed."""
        self.tries.update(active.perturbation.targets)
        self.hits.update(active.reached)
