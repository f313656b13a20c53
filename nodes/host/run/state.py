"""What one run knows of one branch: when it acts, what it asks for, and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from ....seg_core import Target
from ..batch.active import ActivePerturbation
from ..settings.branch import Branch


@dataclass(eq=False)
class BranchState:
    """The state of one branch in one run.

    Attributes:
        branch: its settings.
        edges: noise levels at which its window begins and ends; None until they are asked for.
        wanted: the conds that it asked for in its last step; None before its first.
        seen: it was asked to guide at least once.
        unused: its rows joined a call and nobody asked for them.
        unreachable: its perturbation changes nothing in this run; it costs nothing from there on.
        explained: the person was told why, so that nothing else is said of it.
        misses: evaluations in which none of its blocks was reached, before the first that was.
        guided: evaluations that it guided.
        joined: perturbed predictions that were made in the call of the base prediction.
        whole: those that took a pass of their own, by reason.
        cached: those that another node answered without the network, as it did the base prediction.
        calls: runs of the network in which its perturbation was at work.
        hits: in how many of them each block was changed.
    """

    branch: Branch
    edges: tuple[float, float] | None = None
    wanted: set[Hashable] | None = None
    seen: bool = False
    unused: bool = False
    unreachable: bool = False
    explained: bool = False
    misses: int = 0
    guided: int = 0
    joined: int = 0
    whole: Counter[str] = field(default_factory=Counter)
    cached: int = 0
    calls: int = 0
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
    def counts(self) -> tuple[int, Counter[str]]:
        """Return its predictions so far: in the base prediction's calls, and whole, by reason."""
        return self.joined, Counter(self.whole)

    @property
    def predictions(self) -> int:
        """Return how many perturbed predictions there were so far, in any way."""
        return self.joined + self.whole.total() + self.cached

    def count(self, active: ActivePerturbation) -> None:
        """Count one run of the network with its perturbation, and the blocks that it changed."""
        self.calls += 1
        self.hits.update(active.reached)

    def reaches(self, patience: int) -> bool:
        """Tell whether its blocks can be reached, and give up after some misses in a row."""
        if self.hits or not self.branch.perturbation.targets:
            return True
        self.misses += 1
        self.unreachable = self.misses >= patience
        return False
