"""The rows of a batch to which rows of perturbed predictions are joined, each at its own block.

    block                0 ... fork ... last
    plain rows           ==================>
    perturbed rows             ============>   equal to their plain rows until the fork

Between blocks every tensor has all rows. A block before a fork is given the rows that differ by
then, and its output is handed on to the others: they would have got the same.
"""

from __future__ import annotations

import uuid
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch


class PrivateUuid(uuid.UUID):
    """The identity of a cond in one owner's predictions, so that caches tell them apart.

    It is a UUID as the host's are: other nodes may sort them, or read their digits.

    Attributes:
        owner: whose predictions they are.
        original: the cond's identity for the host.
    """

    owner: Any
    original: Hashable

    def __init__(self, owner: Any, original: Hashable) -> None:
        super().__init__(int=hash((owner, original)) % 2**128)
        object.__setattr__(self, "owner", owner)  # a UUID refuses to be written to
        object.__setattr__(self, "original", original)

    def __eq__(self, other: object) -> bool:
        """Tell whether another is the identity of the same cond, of the same owner."""
        if not isinstance(other, PrivateUuid):
            return False
        return (self.owner, self.original) == (other.owner, other.original)

    def __hash__(self) -> int:
        """Return the same number for equal ones."""
        return hash((self.owner, self.original))

    def __deepcopy__(self, _memo: Any) -> PrivateUuid:
        """Return the identity itself, where another node copies the host's options."""
        return self


Key = tuple[Any, Hashable]
"""What a prediction is known by: private identity of its cond, part of a long latent."""


@dataclass(frozen=True)
class Join:
    """One cond's rows of one perturbed prediction.

    Attributes:
        uuid: its identity for other nodes: whose prediction it is, and of which cond.
        window: the part of a long latent that it is of.
        chunk: the cond's place among those of the call.
        fork: number of the block from which on its rows differ from the cond's own.
        passes: they skip blocks; among those with the same fork they go last, so that the rows
            that a skipped block computes are neighbours.
    """

    uuid: PrivateUuid
    window: Hashable
    chunk: int
    fork: int
    passes: bool = False

    @property
    def key(self) -> Key:
        """Return what the prediction is kept under."""
        return self.uuid, self.window


class Rows:
    """Which rows a batch has at which block: the plain ones first, the others as they fork.

    Args:
        plain: number of the plain rows.
        conds: number of conds that they belong to.
        joins: the others.
    """

    def __init__(self, plain: int, conds: int, joins: Iterable[Join]) -> None:
        self.plain = plain
        self.joins = sorted(joins, key=lambda join: (join.fork, join.passes))
        self._each = plain // conds

    @property
    def total(self) -> int:
        """Return the number of all rows."""
        return self.plain + len(self.joins) * self._each

    def present(self, block: int) -> int:
        """Return the number of rows that a block computes."""
        return self.plain + len(self._joined(block)) * self._each

    def of(self, join: Join) -> slice:
        """Return where the rows of a join stand in the whole batch."""
        start = self.plain + self.joins.index(join) * self._each
        return slice(start, start + self._each)

    def labels(self, block: int | None, plain: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the host's labels of the plain chunks, and of the joins that a block computes.

        None stands for all joins, as there are between blocks.
        """
        joins, of_chunks = self._joined(block), plain["cond_or_uncond"]
        return {
            "cond_or_uncond": [*of_chunks, *(of_chunks[join.chunk] for join in joins)],
            "uuids": [*plain["uuids"], *(join.uuid for join in joins)],
        }

    def widened(self, tensor: torch.Tensor, block: int = -1, axis: int = 0) -> torch.Tensor:
        """Return a tensor with all rows, from one with those that a block computes."""
        if tensor.ndim <= axis or tensor.shape[axis] != self.present(block):
            return tensor
        missing = self.joins[len(self._joined(block)) :]
        more = [tensor.narrow(axis, join.chunk * self._each, self._each) for join in missing]
        return torch.cat([tensor, *more], dim=axis) if more else tensor

    def narrowed(self, tensor: torch.Tensor, block: int, axis: int = 0) -> torch.Tensor:
        """Return the rows of a tensor that a block computes."""
        return first_rows(tensor, axis, self.total, self.present(block))

    def _joined(self, block: int | None) -> list[Join]:
        return [join for join in self.joins if block is None or join.fork <= block]


def first_rows(tensor: torch.Tensor, axis: int, size: int, count: int) -> torch.Tensor:
    """Return the first `count` rows of a tensor that has `size` of them.

    A tensor of twice as many rows holds all of them two times, one copy after the other: networks
    that modulate reference images as images without noise hand on the timesteps of all rows, and
    as many zeros. In every other tensor there are pieces of rows, or none: it comes back as it is.
    """
    for copies in (1, 2):
        if tensor.ndim > axis and tensor.shape[axis] == copies * size:
            each = tensor.unflatten(axis, (copies, size))
            return each.narrow(axis + 1, 0, count).flatten(axis, axis + 1)
    return tensor
