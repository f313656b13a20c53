"""Token grids: which frames, rows and columns a token sequence is made of.

Nothing here guesses a grid from a token count; a sequence that does not fit is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class TokenGrid:
    """The grid behind a token sequence, frame by frame in row-major order.

    Convention: ``token = (frame * height + row) * width + column``.

    Attributes:
        frames: number of frames; ``1`` for an image.
        height: number of token rows in a frame.
        width: number of token columns in a frame.

    Raises:
        ValueError: if a size is not an integer of at least 1.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"the {name} of a token grid must be an integer of at least 1, got {size!r}"
                )

    @property
    def cells(self) -> int:
        """Number of tokens in one frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Number of tokens in all frames."""
        return self.frames * self.cells


GridLike: TypeAlias = TokenGrid | Sequence[int]

AXES = ("space", "time", "space and time")


def require_axes(axes: str) -> tuple[bool, bool]:
    """Return whether `axes` names the cells of a frame, and whether it names the frames.

    Raises:
        ValueError: if it is none of `AXES`.
    """
    if axes not in AXES:
        raise ValueError(f"axes must be one of {', '.join(AXES)}, got {axes!r}")
    return "space" in axes, "time" in axes


def as_grid(grid: TokenGrid | Sequence[Any]) -> TokenGrid:
    """Return ``grid`` as a `TokenGrid`.

    Args:
        grid: ``(height, width)``, ``(frames, height, width)`` or a `TokenGrid`.

    Returns:
        The grid; two sizes are one frame.

    Raises:
        ValueError: if there are not two or three sizes, or one is not an integer of at least 1.
    """
    if isinstance(grid, TokenGrid):
        return grid
    try:
        sizes = [operator.index(size) for size in grid]
    except TypeError:
        sizes = []
    if len(sizes) == 2:
        return TokenGrid(1, *sizes)
    if len(sizes) == 3:
        return TokenGrid(*sizes)
    raise ValueError(
        f"a grid must be integers (height, width) or (frames, height, width), got {grid!r}"
    )


def require_tokens(tokens: int, grid: GridLike) -> None:
    """Refuse a token count that is not the one of ``grid``.

    Args:
        tokens: length of the token sequence.
        grid: the grid that the tokens are said to lie on.

    Raises:
        ValueError: if the counts differ; the message holds both.
    """
    grid = as_grid(grid)
    if tokens != grid.tokens:
        raise ValueError(
            f"a grid of {grid.frames} x {grid.height} x {grid.width} "
            f"(frames x height x width) must have {grid.tokens} tokens, got {tokens}"
        )


def halved_grid(height: int, width: int, levels: int) -> tuple[int, int]:
    r"""Return a frame's size after ``levels`` stride-2 downsamplings.

    $$(h, w) \mapsto (\lceil h / 2 \rceil, \lceil w / 2 \rceil), \quad \text{levels times}$$

    Source: a convolution of kernel 3, stride 2 and padding 1, the downsampler of Stable Diffusion's
    UNet, rounds half sizes up.

    Args:
        height: rows before the first downsampling.
        width: columns before the first downsampling.
        levels: number of downsamplings; ``0`` changes nothing.

    Returns:
        ``(height, width)`` afterwards.

    Raises:
        ValueError: if a size is below 1 or ``levels`` is negative.
    """
    grid = as_grid((height, width))
    if levels < 0:
        raise ValueError(f"the number of downsamplings must be at least 0, got {levels}")
    return -(-grid.height // 2**levels), -(-grid.width // 2**levels)
