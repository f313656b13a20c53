"""Recording a run for a probe.

A recorder lives as long as its run. It takes numbers as tensors where they arise and fetches them
when the run is over, so that it never makes the device wait. Without a probe there is none.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity

from ..settings.branch import Branch
from .attention import AttentionProbe
from .probe import PROBES, BranchRecord, Probe, StepRecord, fingerprint_of

MAP_SIDE = 128
Counts = tuple[int, Counter[str], int]
"""Predictions made in the calls of the base prediction, whole passes by reason, and held ones."""


def recorder_of(model_options: dict[str, Any]) -> Recorder | None:
    """Return a recorder for one run, or None without a probe."""
    probes = model_options.get(PROBES)
    return Recorder(probes) if probes else None


class _Step:
    """One step while the run lasts; what was measured is still on the device."""

    def __init__(self, timestep: torch.Tensor) -> None:
        self.timestep = timestep.flatten()[:1]
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
                *figures.tolist(), joined=joined, whole=dict(whole), held=bool(held), blocks=blocks
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
        figures: torch.Tensor,
    ) -> None:
        """Record what a branch has made of a prediction.

        Args:
            branch: the branch.
            args: of the host's post-CFG call.
            guided: what it made of them.
            counts: its predictions in the run so far.
            figures: effective cfg, share beside it, distance and cosine of a held difference; or
                NaN.
        """
        step = self._step
        if step is None:
            return
        if step.before is None:  # what our first branch finds: cfg and the nodes before it
            step.before = args["denoised"] - args["cond_denoised"]
        joined, whole, held = self._counts.get(branch, (0, Counter[str](), 0))
        self._counts[branch] = counts
        change = guided - args["denoised"]
        side = "uncond_denoised" if branch.side == "unconditional" else "cond_denoised"
        sizes = _sizes(change.float(), step.before.float(), args[side].float())
        new = counts[0] - joined, counts[1] - whole, counts[2] - held
        step.branches[branch] = torch.cat([sizes, figures.to(sizes)]), new
        if change.ndim >= 4:
            heat = _heat(change)
            step.heat = heat if step.heat is None else step.heat + heat

    def finish(
        self, samples: torch.Tensor, branches: list[Branch], warnings: tuple[str, ...]
    ) -> None:
        """Fetch everything, and hand it to the probes."""
        heat = [step.heat for step in self._done if step.heat is not None]
        fitting = len({one.shape for one in heat}) == 1
        parts = {
            "branches": tuple(branches),
            "steps": tuple(step.record(branches) for step in self._done),
            "heat": torch.stack(heat).cpu() if fitting else None,
            "warnings": warnings,
            "fingerprint": fingerprint_of(samples),
        }
        for probe in self._probes:
            probe.take(**parts)


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
