"""Looking at a run: what a probe keeps of the runs of a model."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

PROBES = "smoothed_energy_guidance_probes"
KEPT_RECORDS = 4


@dataclass(frozen=True)
class Measures:
    """The paper's quantities of one block's attention, averaged over the sampled heads.

    Attributes:
        variance: of the logits over the queries (Lemma 3.1).
        logsumexp: of a query's logits, on average (Lemma 3.2); minus the energy per query.
        curvature: of the energy in a query's unblurred logits, on average (Theorem 3.1, trace).
    """

    variance: float
    logsumexp: float
    curvature: float


@dataclass(frozen=True)
class BlockRecord:
    """One block in one step, without and with the blur of its queries."""

    queries: int
    """Queries of the whole map."""
    sampled: tuple[int, int]
    """Heads and queries that were measured."""
    plain: Measures
    blurred: Measures

    def energy(self, measures: Measures) -> float:
        """Return the energy of a whole map, estimated from the sampled queries."""
        return -measures.logsumexp * self.queries


@dataclass(frozen=True)
class BranchRecord:
    """What one branch did in one step; sizes are root mean squares over the latent."""

    guidance: float
    """What the branch added to the result."""
    cfg: float
    """What cfg, and whatever else came before, had added to the conditional prediction."""
    prediction: float
    """The prediction that was compared with the perturbed one."""
    cosine: float | None
    """Between guidance and cfg; None where one of them is 0."""
    shared: int
    """Perturbed passes that took over what the main pass had computed."""
    full: dict[str, int]
    """Perturbed passes that computed everything, by reason."""
    conds: int
    """Predictions of the main pass."""
    milliseconds: float
    blocks: dict[str, BlockRecord]

    @property
    def against_cfg(self) -> float | None:
        """Return the size of the guidance, as a multiple of cfg's; None where cfg does nothing."""
        return self.guidance / self.cfg if self.cfg > 0 else None

    @property
    def against_prediction(self) -> float:
        """Return the size of the guidance, as a share of the prediction."""
        return self.guidance / self.prediction if self.prediction > 0 else 0.0


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
        number: the how manieth run of the probe this is.
        branches: label, blocks, scale and window of each branch on the model.
        steps: every evaluation of the model, in order.
        heat: for each step with guidance, where it acted: mean square over the channels, as
            ``(steps, images, height, width)``; None for latents without height and width.
        warnings: what the run warned of.
        fingerprint: by which the latents that it made are recognised.
    """

    number: int
    branches: tuple[Any, ...]
    steps: tuple[StepRecord, ...]
    heat: torch.Tensor | None
    warnings: tuple[str, ...]
    fingerprint: tuple[float, ...] = ()

    def made(self, samples: torch.Tensor) -> bool:
        """Tell whether this run ended in these latents."""
        other = fingerprint_of(samples)
        return len(other) == len(self.fingerprint) and all(
            math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5)
            for a, b in zip(self.fingerprint, other, strict=True)
        )


class Probe:
    """What the graph hands from the model to the report; holds the last few runs of the model."""

    def __init__(self) -> None:
        self._count = 0
        self._records: deque[Record] = deque(maxlen=KEPT_RECORDS)

    @property
    def runs(self) -> int:
        """Number of runs so far."""
        return self._count

    def take(self, **parts: Any) -> None:
        """Keep one more run."""
        self._count += 1
        self._records.append(Record(self._count, **parts))

    def record(self, samples: torch.Tensor | None = None) -> tuple[Record | None, bool]:
        """Return the run that made these latents, or else the last; and whether it made them."""
        if samples is not None:
            for record in reversed(self._records):
                if record.made(samples):
                    return record, True
        return (self._records[-1] if self._records else None), False


def fingerprint_of(samples: torch.Tensor) -> tuple[float, ...]:
    """Return numbers by which latents are recognised."""
    if samples.is_nested:
        return ()
    work = samples.detach().double().cpu()
    return float(work.numel()), float(work.sum()), float(work.abs().sum())
