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
from ..settings.branch import Branch
from ..settings.changes import Smooth
from ..settings.perturbation import BlockPerturbation

HEADS = 2
QUERIES = 64
LARGEST = 4096**2
_GOLDEN = (math.sqrt(5) - 1) / 2
Measured = tuple[torch.Tensor, int, tuple[int, int]]
"""Measures without and with blur, on the device; queries of the map; heads and queries measured."""


class AttentionProbe:
    """Measures the attention that a branch smooths, each block once in a step.

    Attributes:
        blocks: what was measured in this step, by the names of the blocks.
    """

    def __init__(self, branch: Branch) -> None:
        self.blocks: dict[str, Measured] = {}
        self._perturbation = branch.perturbation
        self._slopes: dict[tuple[TokenGrid, torch.device], torch.Tensor] = {}

    def measure(
        self,
        target: Target,
        query: torch.Tensor,
        key: torch.Tensor,
        grid: TokenGrid,
        smooth: Smooth,
        matrices: BlurMatrices,
        scale: float | None = None,
    ) -> None:
        """Measure queries that are about to be smoothed: `(heads, tokens, dim)` of one sample."""
        name = self._perturbation.name([target])
        if name in self.blocks:
            return
        assert isinstance(self._perturbation, BlockPerturbation)
        smoothed = self._perturbation.heads(target) or range(query.shape[0])
        heads = [smoothed[index] for index in _spread(len(smoothed))]
        shared = query.shape[0] // key.shape[0]  # grouped queries have fewer heads of keys
        query, key = query[heads], key[[head // shared for head in heads]]
        chosen = picked(len(heads), grid.tokens, key.shape[1], query.device)
        query = torch.stack([query, smooth(query, grid, matrices, False)])[:, :, chosen]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        logits = (query.float() * factor) @ key.float().mT
        slopes = self._slopes_of(smooth, grid, query.device)[chosen]
        passed = torch.stack([torch.ones_like(slopes), slopes])[:, None]
        curvature = (passed * row_curvature(logits)).mean(dim=-1)
        measures = torch.stack([logit_variance(logits), mean_logsumexp(logits), curvature])
        self.blocks[name] = measures.mean(dim=-1).mT, grid.tokens, (len(heads), len(chosen))

    def _slopes_of(self, smooth: Smooth, grid: TokenGrid, device: torch.device) -> torch.Tensor:
        """Return how much of the curvature at each query the blur lets through."""
        if (grid, device) not in self._slopes:
            self._slopes[grid, device] = smooth.slopes(grid).float().to(device)
        return self._slopes[grid, device]


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
