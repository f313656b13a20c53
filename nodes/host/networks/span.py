"""Where an image's tokens lie in a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....seg_core import TokenGrid


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
