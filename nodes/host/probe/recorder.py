"""Recording a run for a probe.

A recorder lives as long as its run. It takes numbers as tensors where they arise and fetches them
once, when the run is over, so that it never makes the device wait. Without a probe there is none.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ....seg_core import Target
from ..settings.branch import Branch
from .look import BlockNotes, Look, Picks
from .probe import (
    PROBES,
    BlockRecord,
    BranchRecord,
    Measures,
    Probe,
    StepRecord,
    fingerprint_of,
)

MAP_SIDE = 128
Counts = tuple[int, Counter[str]]
"""Predictions made in plain calls, and whole passes by reason."""


def recorder_of(model_options: dict[str, Any]) -> Recorder | None:
    """Return a recorder for one run, or None if nobody looks."""
    probes = model_options.get(PROBES)
    return Recorder(probes) if probes else None


@dataclass
class _BranchNotes:
    begin: Any
    counts: Counts
    numbers: torch.Tensor | None = None
    end: Any = None
    conds: int = 0
    shared: int = 0
    full: dict[str, int] = field(default_factory=dict)


@dataclass
class _StepNotes:
    timestep: torch.Tensor
    begin: Any
    end: Any = None
    branches: dict[Branch, _BranchNotes] = field(default_factory=dict)
    blocks: dict[tuple[Branch, Target], BlockNotes] = field(default_factory=dict)
    before: torch.Tensor | None = None
    heat: torch.Tensor | None = None


class Recorder:
    """Records one run for the probes of a model."""

    def __init__(self, probes: list[Probe]) -> None:
        self._probes = probes
        self._steps: list[_StepNotes] = []
        self._picks = Picks()

    @contextmanager
    def step(self, timestep: torch.Tensor) -> Iterator[None]:
        """Record one evaluation of the guided model."""
        notes = _StepNotes(timestep.flatten()[:1], _now(timestep.device))
        self._steps.append(notes)
        yield
        notes.end = _now(timestep.device)
        notes.before = None

    def begin(self, branch: Branch, args: dict[str, Any], counts: Counts) -> None:
        """Note that a branch starts to work on a prediction, and what it took so far."""
        if not self._steps:
            return
        now = self._steps[-1]
        if now.before is None:  # what our first branch finds: cfg and the nodes before it
            now.before = args["denoised"] - args["cond_denoised"]
        now.branches[branch] = _BranchNotes(_now(args["input"].device), counts)

    def guided(
        self, branch: Branch, args: dict[str, Any], guided: torch.Tensor, counts: Counts
    ) -> None:
        """Note what a branch has made of a prediction, and what it took in all."""
        if not self._steps:
            return
        now = self._steps[-1]
        notes = now.branches[branch]
        notes.end = _now(guided.device)
        shared, full = counts
        notes.shared = shared - notes.counts[0]
        notes.full = dict(full - notes.counts[1])
        notes.conds = len(args["cond"] or ()) + len(args["uncond"] or ())
        change = guided - args["denoised"]
        side = "uncond_denoised" if branch.side == "unconditional" else "cond_denoised"
        notes.numbers = _sizes(change, now.before, args[side])
        heat = _heat(change)
        if heat is not None:
            now.heat = heat if now.heat is None else now.heat + heat

    def look(self, branch: Branch) -> Look | None:
        """Return what is to be seen of a branch's attention in one model call."""
        return Look(self._picks, branch, self._steps[-1].blocks) if self._steps else None

    def finish(
        self, samples: torch.Tensor, branches: list[Branch], warnings: tuple[str, ...]
    ) -> None:
        """Fetch everything, and hand it to the probes."""
        done = [notes for notes in self._steps if notes.end is not None]
        numbers = [b.numbers for n in done for b in n.branches.values() if b.numbers is not None]
        sizes = iter(_fetched(numbers))
        blocks = iter(_fetched([b.numbers for notes in done for b in notes.blocks.values()]))
        sigmas = _fetched([notes.timestep for notes in done])
        _wait_for_device(done)
        steps = tuple(
            StepRecord(
                sigma[0], _milliseconds(n.begin, n.end), _branch_records(n, branches, sizes, blocks)
            )
            for sigma, n in zip(sigmas, done, strict=True)
        )
        heat = [notes.heat for notes in done if notes.heat is not None]
        fitting = bool(heat) and len({h.shape for h in heat}) == 1
        for probe in self._probes:
            probe.take(
                branches=tuple(branches),
                steps=steps,
                heat=torch.stack(heat).cpu() if fitting else None,
                warnings=warnings,
                fingerprint=fingerprint_of(samples),
            )
        self._steps.clear()


def _sizes(change: torch.Tensor, cfg: Any, prediction: torch.Tensor) -> torch.Tensor:
    """Return the mean squares of guidance, cfg and prediction, and the mean product of two."""
    change, cfg, prediction = (t.float() for t in (change, cfg, prediction))
    pairs = ((change, change), (cfg, cfg), (prediction, prediction), (change, cfg))
    return torch.stack([(a * b).mean() for a, b in pairs])


def _heat(change: torch.Tensor) -> torch.Tensor | None:
    """Return the mean square over the channels, frames as images, at most `MAP_SIDE` a side."""
    if change.ndim < 4:
        return None
    square = change.float().square().mean(dim=1).reshape(-1, *change.shape[-2:])
    height, width = (min(side, MAP_SIDE) for side in square.shape[-2:])
    return torch.nn.functional.adaptive_avg_pool2d(square, (height, width))


def _branch_records(
    notes: _StepNotes, branches: list[Branch], sizes: Iterator[Any], blocks: Iterator[Any]
) -> dict[int, BranchRecord]:
    seen: dict[Branch, dict[str, BlockRecord]] = {}
    for (branch, target), block in notes.blocks.items():
        plain, blurred = (Measures(*row) for row in next(blocks))
        name = branch.perturbation.name([target])
        record = BlockRecord(block.queries, block.sampled, plain, blurred)
        seen.setdefault(branch, {})[name] = record
    found = {}
    for branch, one in notes.branches.items():
        if one.numbers is None:
            continue
        guidance, cfg, prediction, product = next(sizes)
        both = math.sqrt(guidance * cfg)
        found[branches.index(branch)] = BranchRecord(
            math.sqrt(guidance),
            math.sqrt(cfg),
            math.sqrt(prediction),
            product / both if both > 0 else None,
            one.shared,
            one.full,
            one.conds,
            _milliseconds(one.begin, one.end),
            seen.get(branch, {}),
        )
    return found


def _fetched(tensors: list[torch.Tensor]) -> list[Any]:
    """Return small tensors as lists of numbers, at the cost of one wait where that is possible."""
    if not tensors:
        return []
    if len({(t.device, t.shape) for t in tensors}) == 1:
        return torch.stack(tensors).tolist()
    return [t.tolist() for t in tensors]


def _now(device: torch.device) -> Any:
    """Return a point in the device's time, without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _wait_for_device(done: list[_StepNotes]) -> None:
    if done and not isinstance(done[-1].end, float):
        done[-1].end.synchronize()


def _milliseconds(begin: Any, end: Any) -> float:
    return (end - begin) * 1000 if isinstance(begin, float) else begin.elapsed_time(end)
