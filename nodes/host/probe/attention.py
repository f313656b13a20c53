"""Measuring the attention that a branch smooths: the paper's quantities, sampled."""

from __future__ import annotations

import math

import torch

from ....seg_core import (
    BlurMatrices,
    Target,
    TokenGrid,
    logit_variance,
    mean_logsumexp,
    row_curvature,
)
from ..settings.changes import SmoothQueries
from ..settings.perturbation import BlockPerturbation, Perturbation
from .probe import BlockRecord, Measures

HEADS = 2
QUERIES = 64
LARGEST = 4096**2
_GOLDEN = (math.sqrt(5) - 1) / 2


class AttentionProbe:
    """Measures the attention that a perturbation smooths in one step, each block once."""

    def __init__(self, perturbation: Perturbation) -> None:
        self._perturbation = perturbation
        self._measured: dict[str, tuple[torch.Tensor, int, tuple[int, int]]] = {}

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
        smoothed = self._perturbation.heads(target) or range(query.shape[0])
        heads = [smoothed[index] for index in _spread(len(smoothed))]
        shared = query.shape[0] // key.shape[0]  # grouped queries have fewer heads of keys
        query, key = query[heads], key[[head // shared for head in heads]]
        chosen = picked(len(heads), grid.tokens, key.shape[1], query.device)
        query = torch.stack([query, smooth(query, grid, matrices)])[:, :, chosen]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        logits = (query.float() * factor) @ key.float().mT
        slopes = smooth.slopes(grid).float().to(query.device)[chosen]
        passed = torch.stack([torch.ones_like(slopes), slopes])[:, None]
        curvature = (passed * row_curvature(logits)).mean(dim=-1)
        measures = torch.stack([logit_variance(logits), mean_logsumexp(logits), curvature])
        sampled = len(heads), len(chosen)
        self._measured[name] = measures.mean(dim=-1).mT, grid.tokens, sampled

    def records(self) -> dict[str, BlockRecord]:
        """Fetch what was measured from the device, by the names of the blocks."""
        found = {}
        for name, (numbers, queries, sampled) in self._measured.items():
            plain, blurred = (Measures(*row) for row in numbers.tolist())
            found[name] = BlockRecord(plain, blurred, queries, sampled)
        return found


def picked(heads: int, tokens: int, keys: int, device: torch.device) -> torch.Tensor:
    """Return the queries to measure: the same in every step, spread over the whole grid."""
    most = min(QUERIES, max(1, LARGEST // (2 * heads * keys)), tokens)
    # Multiples of the golden ratio fall on all rows and columns; even steps may not.
    stride = round(_GOLDEN * tokens)
    while math.gcd(stride, tokens) > 1:  # or some queries would be picked twice
        stride += 1
    return torch.arange(most, device=device) * stride % tokens


def _spread(count: int) -> list[int]:
    return sorted({int((i + 0.5) / HEADS * count) for i in range(min(HEADS, count))})
