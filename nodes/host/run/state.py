"""What one run knows of one branch: when it acts, what it asks for, and what became of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from ....seg_core import Target, effective_cfg
from ..batch.active import ActivePerturbation
from ..settings.branch import Branch
from .holding import Holding


@dataclass(eq=False)
class BranchState:
    """The state of one branch in one run.

    Attributes:
        edges: noise levels at which its window begins and ends.
        wanted: the conds that it asked for in its last step; None before its first.
        seen: it was asked to guide at least once.
        met: its perturbed pass reached the model; another node may answer for the network there.
        unused: its rows joined a call and nobody asked for them.
        unreachable: its perturbation changes nothing in this run; it costs nothing from there on.
        explained: the person was told why, so that nothing else is said of it.
        misses: evaluations in which none of its blocks was reached, before the first that was.
        guided: evaluations that it guided.
        held: in how many of them its last difference stood in for a prediction.
        holding: those differences.
        effects: the cfg that each guided prediction is nearest to, and the share of the push that
            no cfg could give.
        joined: perturbed predictions that were made in the call of the base prediction.
        whole: those that took a pass of their own, by reason.
        tries: in how many runs of the network each block was to be changed.
        hits: in how many of them each block was changed.
    """

    branch: Branch
    edges: tuple[float, float]
    wanted: set[Hashable] | None = None
    seen: bool = False
    met: bool = False
    unused: bool = False
    unreachable: bool = False
    explained: bool = False
    misses: int = 0
    guided: int = 0
    held: int = 0
    effects: list[torch.Tensor] = field(default_factory=list)
    joined: int = 0
    whole: Counter[str] = field(default_factory=Counter)
    tries: Counter[Target] = field(default_factory=Counter)
    hits: Counter[Target] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.holding = Holding(self.branch.every)

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

    def note_effect(self, args: dict[str, Any], guided: torch.Tensor) -> None:
        """Note what a guided prediction amounts to; NaN where no cfg is to compare it with."""
        uncond, cond = args["uncond_denoised"], args["cond_denoised"]
        if self.branch.side == "free" or args["uncond"] is None or not torch.is_tensor(uncond):
            uncond = cond
        self.effects.append(effective_cfg(args["denoised"], guided, cond, uncond))

    def effective_cfg(self) -> tuple[float, float]:
        """Return the mean effective cfg and share beside it; NaN if there was none."""
        if not self.effects:
            return math.nan, math.nan
        cfg, beside = torch.stack(self.effects).nanmean(dim=0).tolist()
        return cfg, beside

    def count(self, active: ActivePerturbation) -> None:
        """Count one run of the network with its perturbation, and the blocks that it changed."""
        self.tries.update(active.perturbation.targets)
        self.hits.update(active.reached)

    def reaches(self, patience: int) -> bool:
        """Tell whether its blocks can be reached, and give up after some misses in a row."""
        if self.hits or not self.branch.perturbation.targets:
            return True
        self.misses += 1
        self.unreachable = self.misses >= patience
        return False
