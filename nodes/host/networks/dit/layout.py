"""Where the tokens of the image lie among those of a diffusion transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .....seg_core import TokenGrid
from .families import Family

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
