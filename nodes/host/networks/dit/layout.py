"""Where the tokens of the image lie among those of a diffusion transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .....seg_core import TokenGrid
from ..span import Span
from .families import Family

_REFERENCES = "reference_image_num_tokens"


@dataclass(frozen=True)
class Layout:
    """Where one model call keeps the image's tokens."""

    family: Family
    grid: TokenGrid
    beside: int
    row: int
    patch: tuple[int, int, int]
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
