"""The rows of a batch to which rows of perturbed predictions are joined, each at its own block.

    block                0 ... fork ... last
    plain rows           ==================>
    perturbed rows             ============>   equal to their plain rows until the fork

Between blocks every tensor has all rows. A block before a fork is given the rows that differ by
then, and its output is handed on to the others: they would have got the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Join:
    """One cond's rows of one perturbed prediction.

    Attributes:
        owner: whose prediction it is.
        chunk: the cond's place among those of the call.
        source: the cond's own rows.
        fork: number of the block from which on its rows differ from the cond's own.
        passes: they skip blocks; among those with the same fork they go last, so that the rows
            that a skipped block computes are neighbours.
        uuid: an identity of its own, under which caches may keep it.
    """

    owner: Any
    chunk: int
    source: slice
    fork: int
    uuid: Hashable
    passes: bool = False


class Rows:
    """Which rows a batch has at which block: the plain ones first, the others as they fork."""

    def __init__(self, plain: int, joins: Sequence[Join]) -> None:
        self.plain = plain
        self.joins = sorted(joins, key=lambda join: (join.fork, join.passes))
        ends = [plain]
        for join in self.joins:
            ends.append(ends[-1] + join.source.stop - join.source.start)
        self._ends = ends

    @property
    def total(self) -> int:
        """Return the number of all rows."""
        return self._ends[-1]

    def present(self, block: int) -> int:
        """Return the number of rows that a block computes."""
        return self._ends[self._joined(block)]

    def of(self, join: Join) -> slice:
        """Return where the rows of a join stand in the whole batch."""
        number = self.joins.index(join)
        return slice(self._ends[number], self._ends[number + 1])

    def labels(self, block: int | None, plain: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the host's labels of the plain chunks, and of the joins that a block computes."""
        joins = self.joins if block is None else self.joins[: self._joined(block)]
        of_chunks = plain["cond_or_uncond"]
        return {
            "cond_or_uncond": [*of_chunks, *(of_chunks[join.chunk] for join in joins)],
            "uuids": [*plain["uuids"], *(join.uuid for join in joins)],
        }

    def widened(self, tensor: torch.Tensor, block: int | None = None, axis: int = 0) -> Any:
        """Return a tensor with all rows, from one with the plain ones, or those of a block."""
        done = 0 if block is None else self._joined(block)
        if tensor.ndim <= axis or tensor.shape[axis] != self._ends[done]:
            return tensor
        missing = [join.source for join in self.joins[done:]]
        if not missing:
            return tensor
        more = [tensor.narrow(axis, rows.start, rows.stop - rows.start) for rows in missing]
        return torch.cat([tensor, *more], dim=axis)

    def narrowed(self, tensor: torch.Tensor, block: int, axis: int = 0) -> torch.Tensor:
        """Return the rows of a tensor that a block computes.

        A tensor of twice as many rows holds all of them two times, one copy after the other:
        networks that modulate reference images as images without noise hand on the timesteps of
        all rows, and as many zeros. In every other tensor there are pieces of rows, or none.
        """
        for copies in (1, 2):
            if tensor.ndim > axis and tensor.shape[axis] == copies * self.total:
                each = tensor.unflatten(axis, (copies, self.total))
                return each.narrow(axis + 1, 0, self.present(block)).flatten(axis, axis + 1)
        return tensor

    def _joined(self, block: int) -> int:
        return sum(join.fork <= block for join in self.joins)
