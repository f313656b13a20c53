"""What a probe sees of the attention that a branch smooths: the paper's quantities, sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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


@dataclass
class BlockNotes:
    """One block in one step: the size of its map, what was measured of it, and the result."""

    queries: int
    sampled: tuple[int, int]
    numbers: torch.Tensor


class Picks:
    """Which queries are measured, and what a blur does to them; the same in all steps of a run."""

    def __init__(self) -> None:
        self._picked: dict[Any, torch.Tensor] = {}
        self._slopes: dict[Any, torch.Tensor] = {}

    def picked(self, heads: int, tokens: int, keys: int, device: torch.device) -> torch.Tensor:
        """Return the queries to measure: the same in every step, spread over the whole grid."""
        key = (heads, tokens, keys, device)
        if key not in self._picked:
            most = min(QUERIES, max(1, LARGEST // (2 * min(heads, HEADS) * keys)), tokens)
            # Multiples of the golden ratio fall on all rows and columns; even steps may not.
            spread = {int(i * _GOLDEN % 1 * tokens) for i in range(most)} if most < tokens else ()
            index = torch.tensor(sorted(spread) or range(tokens))
            self._picked[key] = index.to(device, non_blocking=True)
        return self._picked[key]

    def slopes(self, grid: TokenGrid, smooth: Smooth, picked: torch.Tensor) -> torch.Tensor:
        """Return how much of the curvature at each measured query the blur lets through."""
        key = (grid, smooth, picked.device)
        if key not in self._slopes:
            slopes = smooth.slopes(grid).float().to(picked.device)
            slopes = slopes[picked]
            self._slopes[key] = torch.stack([torch.ones_like(slopes), slopes])
        return self._slopes[key]


class Look:
    """What a recorder sees of the attention that a branch smooths, in one model call."""

    def __init__(
        self, picks: Picks, branch: Branch, blocks: dict[tuple[Branch, Target], BlockNotes]
    ) -> None:
        self._picks = picks
        self._branch = branch
        self._blocks = blocks

    def at_tokens(
        self,
        target: Target,
        attn: Any,
        tokens: torch.Tensor,
        smoothed: torch.Tensor,
        context: torch.Tensor,
        grid: TokenGrid,
        smooth: Smooth,
    ) -> None:
        """Look at a `CrossAttention` whose input tokens are smoothed; one sample of each.

        Only the queries that are measured are projected.
        """
        if (self._branch, target) in self._blocks:
            return
        count = attn.heads
        picked = self._picks.picked(count, grid.tokens, context.shape[0], tokens.device)
        after = smoothed if smoothed.shape[0] == 1 else smoothed[picked]
        pair = torch.stack([tokens[picked], after.expand(len(picked), -1)])
        query = attn.to_q(pair).unflatten(-1, (count, -1))[:, :, _spread(count)]
        key = attn.to_k(context[None])[0].unflatten(-1, (count, -1))[:, _spread(count)]
        self._measure(target, query.transpose(1, 2), key.transpose(0, 1), grid, picked, smooth)

    def at_queries(
        self,
        target: Target,
        query: torch.Tensor,
        key: torch.Tensor,
        grid: TokenGrid,
        smooth: Smooth,
        matrices: BlurMatrices,
        scale: float | None = None,
    ) -> None:
        """Look at queries that are smoothed themselves: `(heads, tokens, dim)` of one sample."""
        if (self._branch, target) in self._blocks:
            return
        few = self._heads(target, query.shape[0])
        shared = query.shape[0] // key.shape[0]  # grouped queries have fewer heads of keys
        query, key = query[few], key[[head // shared for head in few]]
        picked = self._picks.picked(len(few), grid.tokens, key.shape[1], query.device)
        after = smooth(query, grid, matrices, False)[:, picked]
        pair = torch.stack([query[:, picked], after])
        self._measure(target, pair, key, grid, picked, smooth, scale)

    def _heads(self, target: Target, count: int) -> list[int]:
        """Return a few of the heads that are smoothed."""
        assert isinstance(self._branch.perturbation, BlockPerturbation)
        chosen = self._branch.perturbation.heads(target) or range(count)
        return [chosen[place] for place in _spread(len(chosen))]

    def _measure(
        self,
        target: Target,
        query: torch.Tensor,
        key: torch.Tensor,
        grid: TokenGrid,
        picked: torch.Tensor,
        smooth: Smooth,
        scale: float | None = None,
    ) -> None:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        logits = (query.float() * factor) @ key.float().mT
        slopes = self._picks.slopes(grid, smooth, picked)[:, None]
        curvature = (slopes * row_curvature(logits)).mean(dim=-1)
        per_head = torch.stack([logit_variance(logits), mean_logsumexp(logits), curvature])
        sampled = (logits.shape[1], logits.shape[2])
        numbers = per_head.mean(dim=-1).mT
        self._blocks[self._branch, target] = BlockNotes(grid.tokens, sampled, numbers)


def _spread(count: int) -> list[int]:
    return sorted({int((i + 0.5) / HEADS * count) for i in range(min(HEADS, count))})
