"""What a probe keeps of the runs of a model."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..settings.branch import Branch

PROBES = "smoothed_energy_guidance_probes"
KEPT_RECORDS = 4


class Measures(NamedTuple):
    """The paper's quantities of one block's attention, averaged over the sampled heads.

    Attributes:
        variance: of the logits over the queries (Lemma 3.1).
        logsumexp: of a query's logits, on average (Lemma 3.2); minus the energy per query.
        curvature: of the energy in a query's unblurred logits, on average (Theorem 3.1, trace).
    """

    variance: float
    logsumexp: float
    curvature: float


class BlockRecord(NamedTuple):
    """One block in one step.

    Attributes:
        plain: measured without the blur of its queries.
        blurred: measured with it.
        queries: queries of the whole map.
    """

    plain: Measures
    blurred: Measures
    queries: int


@dataclass(frozen=True)
class BranchRecord:
    """What one branch did in one step; sizes are root mean squares over the latent.

    Attributes:
        guidance: size of what the branch added to the result.
        cfg: size of what cfg, and whatever else came before, had added to the conditional
            prediction.
        prediction: size of the prediction that was compared with the perturbed one.
        cosine: between guidance and cfg; 0 where one of them is 0.
        effective_cfg: the cfg that the guided prediction is nearest to; NaN without one.
        joined: perturbed predictions made in the call of the base prediction.
        whole: those that took a pass of their own.
        held: the last difference stood in for a prediction.
        blocks: the blocks whose attention it smoothed, by name.
    """

    guidance: float
    cfg: float
    prediction: float
    cosine: float
    effective_cfg: float
    joined: int
    whole: int
    held: bool
    blocks: dict[str, BlockRecord]

    def share(self, size: float) -> float:
        """Return a size as a share of the prediction's."""
        return size / self.prediction if self.prediction > 0 else 0.0


@dataclass(frozen=True)
class StepRecord:
    """One evaluation of the guided model; branches that were not active are absent."""

    noise_sigma: float
    milliseconds: float
    branches: dict[int, BranchRecord]


@dataclass(frozen=True)
class Record:
    """One run of sampling.

    Attributes:
        number: the run's index among those of the probe, from 1.
        branches: the settings of each branch on the model, in the order in which they act.
        steps: every evaluation of the model, in order.
        heat: for each step with guidance, where it acted: mean square over the channels, as
            ``(steps, images, height, width)``; None for latents without height and width.
        lines: what the log says of each branch that guided.
        warnings: what the run warned of.
        fingerprint: identifies the latents that it made.
    """

    number: int
    branches: tuple[Branch, ...]
    steps: tuple[StepRecord, ...]
    heat: torch.Tensor | None
    lines: tuple[str, ...]
    warnings: tuple[str, ...]
    fingerprint: torch.Tensor

    def guided_by(self, index: int) -> dict[int, BranchRecord]:
        """Return what a branch did, by the numbers of the steps, counted from 1."""
        steps = enumerate(self.steps, 1)
        return {n: step.branches[index] for n, step in steps if index in step.branches}


class Probe:
    """What the graph hands from the model to the report; holds the last few runs of the model.

    Attributes:
        runs: number of runs so far.
    """

    def __init__(self) -> None:
        self.runs = 0
        self._records: deque[Record] = deque(maxlen=KEPT_RECORDS)

    def take(self, **parts: Any) -> None:
        """Keep one more run."""
        self.runs += 1
        self._records.append(Record(self.runs, **parts))

    def record(self, samples: torch.Tensor) -> tuple[Record | None, bool]:
        """Return the run that made these latents, or else the last; and whether it made them."""
        wanted = fingerprint_of(samples)
        for record in reversed(self._records):
            if torch.allclose(record.fingerprint, wanted, rtol=1e-5, atol=1e-5):
                return record, True
        return (self._records[-1] if self._records else None), False


def fingerprint_of(samples: torch.Tensor) -> torch.Tensor:
    """Return three numbers that identify latents; those of nested ones equal no others."""
    if samples.is_nested:
        return torch.full((3,), math.nan, dtype=torch.float64)
    work = samples.detach().cpu().double()
    return torch.stack([torch.tensor(work.numel()).double(), work.sum(), work.abs().sum()])
