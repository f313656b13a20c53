"""Which block of a diffusion transformer a call has reached, and where the image's tokens lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...seg_core import Target, TokenGrid
from .call import Call
from .dit_families import Family

_REFERENCES = "reference_image_num_tokens"


@dataclass(frozen=True)
class Span:
    """Where the image's tokens lie in a sequence."""

    start: int
    grid: TokenGrid
    row: int
    """Tokens from one row of the image to the next."""
    key_offset: int = 0
    """Keys and values before those of the queries' own tokens."""

    @property
    def length(self) -> int:
        """Return the length of the part of the sequence that holds the image."""
        return self.grid.frames * self.grid.height * self.row

    @property
    def is_solid(self) -> bool:
        """Tell whether nothing else lies between the image's rows."""
        return self.row == self.grid.width

    def view(self, tensor: torch.Tensor, axis: int, offset: int = 0) -> torch.Tensor:
        """Return the image's rows as a view; two axes in place of the tokens' one."""
        part = tensor.narrow(axis, self.start + offset, self.length)
        return part.unflatten(axis, (-1, self.row)).narrow(axis + 1, 0, self.grid.width)


@dataclass(frozen=True)
class Layout:
    """Where one model call keeps the image's tokens."""

    family: Family
    grid: TokenGrid
    beside: int
    row: int
    references: int
    """Tokens of reference images at the end, for versions of the host that do not count them."""

    def find(self, queries: int, keys: int, options: dict[str, Any]) -> Span | None:
        """Return the image's place among the queries; None if they cannot be the image's."""
        if keys < queries:
            return None  # cross-attention
        length = self.grid.frames * self.grid.height * self.row
        start = self.beside
        if self.family.anchor == "end":
            # A cache of reference images leaves their queries out.
            references = sum(options.get(_REFERENCES, [self.references]))
            tail = self.beside + (references if queries == keys else 0)
            start = queries - tail - length
        if not 0 <= start <= queries - length:
            return None
        cached = keys - queries if self.family.cached_keys else 0
        return Span(start, self.grid, self.row, cached)


class Blocks:
    """Tells which block's self-attention each attention call of one model call is."""

    def __init__(self, family: Family, network: Any, call: Call, sizes: dict[str, int]) -> None:
        self._family = family
        self._parts = list(family.parts)
        self._schedule = _schedule(family, network, call, sizes)
        self._calls = 0
        self._place: Target | None = None
        self._nth = 0

    def around(self, target: Target) -> Callable[..., Any]:
        """Return what to hook around a block, for hosts that do not name it."""

        def enter(args: dict[str, Any], block: Callable[..., Any]) -> Any:
            self._enter(target)
            try:
                return block(args)
            finally:
                self._place = None

        return enter

    def next(self, options: dict[str, Any]) -> Target | None:
        """Return the block that an attention call belongs to; None if it is not one to change."""
        self._calls += 1
        if self._family.identity != "hook":
            index = options.get("block_index")
            if index is None or self._family.identity == "count":
                return self._scheduled()
            one_list = len(self._parts) == 1
            place = Target(self._parts[0] if one_list else options["block_type"], index)
            if place != self._place:
                self._enter(place)
        self._nth += 1
        return None if self._family.first_only and self._nth > 1 else self._place

    def _enter(self, place: Target) -> None:
        self._place = place
        self._nth = 0

    def _scheduled(self) -> Target | None:
        number = self._calls - 1
        return self._schedule[number] if number < len(self._schedule) else None


def _schedule(
    family: Family, network: Any, call: Call, sizes: dict[str, int]
) -> list[Target | None]:
    schedule: list[Target | None] = [None] * family.lead(network, call) if family.calls else []
    for part, times in family.calls.items():
        for index in range(sizes[part]):
            target = Target(part, index)
            others = None if family.first_only else target
            schedule.extend([target, *[others] * (times - 1)])
    return schedule
