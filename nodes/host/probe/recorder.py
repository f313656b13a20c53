"""Recording a run for a probe: the paper's quantities of attention, sampled, and the push.

A recorder lives as long as its run. It takes numbers as tensors where they arise and fetches them
when the run is over, so that it never makes the device wait. Without a probe there is none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity

from ....seg_core import (
    BlurMatrices,
    Target,
    TokenGrid,
    logit_variance,
    mean_logsumexp,
    row_curvature,
)
from ..settings.branch import Branch
from ..settings.changes import SmoothQueries
from ..settings.perturbation import BlockPerturbation, Perturbation
from .probe import BlockRecord, BranchRecord, Measures, Probe, StepRecord, fingerprint_of

QUERIES = 64
MAP_SIDE = 128
Counts = tuple[int, int, int]
"""Predictions made in the calls of the base prediction, in passes of their own, and held ones."""


class AttentionProbe:
    """Measures the attention that a perturbation smooths in one step, each block once."""

    def __init__(self, perturbation: Perturbation) -> None:
        self._perturbation = perturbation
        self._measured: dict[str, tuple[torch.Tensor, int]] = {}

    def measure(
        self,
        target: Target,
        query: torch.Tensor,
        key: torch.Tensor,
        grid: TokenGrid,
        smooth: SmoothQueries,
        matrices: BlurMatrices,
        scale: float | None = None,
    ) -> None:
        """Measure queries that are about to be smoothed: `(heads, tokens, dim)` of one sample."""
        assert isinstance(self._perturbation, BlockPerturbation)
        name = self._perturbation.name([target])
        if name in self._measured:
            return
        smoothed = self._perturbation.heads[target] or range(query.shape[0])
        heads = sorted({smoothed[len(smoothed) * n // 4] for n in (1, 3)})
        shared = query.shape[0] // key.shape[0]  # grouped queries have fewer heads of keys
        query, key = query[heads], key[[head // shared for head in heads]]
        chosen = _picked(grid.tokens, query.device)
        query = torch.stack([query, smooth(query, grid, matrices)])[:, :, chosen]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        logits = (query.float() * factor) @ key.float().mT
        slopes = smooth.slopes(grid).float().to(query.device)[chosen]
        passed = torch.stack([torch.ones_like(slopes), slopes])[:, None]
        curvature = (passed * row_curvature(logits)).mean(dim=-1)
        measures = torch.stack([logit_variance(logits), mean_logsumexp(logits), curvature])
        self._measured[name] = measures.mean(dim=-1).mT, grid.tokens

    def records(self) -> dict[str, BlockRecord]:
        """Fetch what was measured from the device, by the names of the blocks."""
        found = {}
        for name, (numbers, queries) in self._measured.items():
            plain, blurred = (Measures(*row) for row in numbers.tolist())
            found[name] = BlockRecord(plain, blurred, queries)
        return found


class _Step:
    """One step while the run lasts; what was measured is still on the device."""

    def __init__(self, timestep: torch.Tensor) -> None:
        self.timestep = timestep.flatten()[:1].clone()  # samplers may write into theirs
        self.begin = self.end = _now(timestep.device)
        self.probes: dict[Branch, AttentionProbe] = {}
        self.branches: dict[Branch, tuple[torch.Tensor, Counts]] = {}
        self.before: Any = None
        self.heat: torch.Tensor | None = None

    def record(self, branches: list[Branch]) -> StepRecord:
        """Return its record, with branches by their position."""
        found = {}
        for branch, (figures, (joined, whole, held)) in self.branches.items():
            blocks = self.probes[branch].records() if branch in self.probes else {}
            found[branches.index(branch)] = BranchRecord(
                *figures.tolist(), joined=joined, whole=whole, held=held > 0, blocks=blocks
            )
        return StepRecord(self.timestep.item(), _milliseconds(self.begin, self.end), found)


class Recorder:
    """Records one run for the probes of a model."""

    def __init__(self, probes: list[Probe]) -> None:
        self._probes = probes
        self._done: list[_Step] = []
        self._step: _Step | None = None
        self._counts: dict[Branch, Counts] = {}

    @contextmanager
    def step(self, timestep: torch.Tensor) -> Iterator[None]:
        """Record one evaluation of the guided model."""
        self._step = step = _Step(timestep)
        try:
            yield
        finally:
            self._step = None
        step.end, step.before = _now(timestep.device), None
        self._done.append(step)

    def attention_probe(self, branch: Branch) -> AttentionProbe | None:
        """Return what measures a branch's attention; None outside of a step."""
        if self._step is None:
            return None
        return self._step.probes.setdefault(branch, AttentionProbe(branch.perturbation))

    def guided(
        self,
        branch: Branch,
        args: dict[str, Any],
        guided: torch.Tensor,
        counts: Counts,
        effect: torch.Tensor,
    ) -> None:
        """Record what a branch has made of a prediction.

        Args:
            branch: the branch.
            args: of the host's post-CFG call.
            guided: what it made of them.
            counts: its predictions in the run so far.
            effect: the effective cfg, and the share of the push beside it.
        """
        step = self._step
        if step is None:
            return
        if step.before is None:  # what our first branch finds: cfg and the nodes before it
            step.before = args["denoised"] - args["cond_denoised"]
        joined, whole, held = self._counts.get(branch, (0, 0, 0))
        self._counts[branch] = counts
        change = guided - args["denoised"]
        side = "uncond_denoised" if branch.side == "unconditional" else "cond_denoised"
        sizes = _sizes(change.float(), step.before.float(), args[side].float())
        new = counts[0] - joined, counts[1] - whole, counts[2] - held
        step.branches[branch] = torch.cat([sizes, effect[:1].to(sizes)]), new
        if change.ndim >= 4:
            heat = _heat(change)
            step.heat = heat if step.heat is None else step.heat + heat

    def finish(self, samples: torch.Tensor, branches: list[Branch], **said: Any) -> None:
        """Fetch everything, and hand it to the probes with what was said; see `Record`."""
        heat = [step.heat for step in self._done if step.heat is not None]
        fitting = len({one.shape for one in heat}) == 1
        parts = {
            "branches": tuple(branches),
            "steps": tuple(step.record(branches) for step in self._done),
            "heat": torch.stack(heat).cpu() if fitting else None,
            "fingerprint": fingerprint_of(samples),
        }
        for probe in self._probes:
            probe.take(**parts, **said)


def _picked(tokens: int, device: torch.device) -> torch.Tensor:
    """Return the queries to measure: the same in every step, spread over the whole grid."""
    # Multiples of the golden ratio fall on all rows and columns; even steps may not.
    stride = round((math.sqrt(5) - 1) / 2 * tokens)
    while math.gcd(stride, tokens) > 1:  # or some queries would be picked twice
        stride += 1
    return torch.arange(min(QUERIES, tokens), device=device) * stride % tokens


def _sizes(change: torch.Tensor, cfg: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """Return the sizes of guidance, cfg and prediction, and the cosine between the first two."""
    sizes = [t.square().mean().sqrt() for t in (change, cfg, prediction)]
    return torch.stack([*sizes, cosine_similarity(change.flatten(), cfg.flatten(), dim=0)])


def _heat(change: torch.Tensor) -> torch.Tensor:
    """Return the mean square over the channels, frames as images, at most `MAP_SIDE` a side."""
    square = change.float().square().mean(dim=1).reshape(-1, *change.shape[-2:])
    height, width = (min(side, MAP_SIDE) for side in square.shape[-2:])
    return adaptive_avg_pool2d(square, (height, width))


def _now(device: torch.device) -> Any:
    """Return a point in the device's time, without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return (end - begin) * 1000
    end.synchronize()
    return begin.elapsed_time(end)
