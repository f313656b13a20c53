"""Gaussian blur of attention queries over their token grid: one small matrix per axis.

The matrices themselves are made in `kernels` and kept in `matrices`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._shapes import Float
from .grid import GridLike, as_grid, require_axes, require_tokens
from .kernels import gaussian_matrix as gaussian_matrix
from .kernels import require_kernel
from .matrices import BlurMatrices as BlurMatrices

# A neighbourhood lighter than this leaves the diagonal at 1 in float32.
_NEGLIGIBLE = torch.finfo(torch.float32).eps / 8


def is_identity(grid: GridLike, sigma: float, *, kernel: str = "reference") -> bool:
    """Tell whether a blur leaves every query as it is.

    Convention: neighbours that float32 arithmetic cannot resolve together count as absent.

    Args:
        grid: the token grid.
        sigma: blur width in cells.
        kernel: see `gaussian_matrix`.

    Returns:
        True for frames of one cell, for ``sigma = 0`` and for a kernel of one tap.

    Raises:
        ValueError: as `gaussian_matrix` and `as_grid`.
    """
    grid = as_grid(grid)
    matrices = (gaussian_matrix(n, sigma, kernel=kernel) for n in (grid.height, grid.width))
    return all(bool((1.0 - matrix.diagonal() < _NEGLIGIBLE).all()) for matrix in matrices)


def mean_queries(
    query: Float[Tensor, "batch tokens dim"], grid: GridLike, *, axes: str = "space"
) -> Float[Tensor, "batch means dim"]:
    """Return the mean queries along some axes, the limit of infinite blur.

    Convention: summed in at least float32.

    Args:
        query: the queries, row-major over ``grid``.
        grid: the token grid.
        axes: ``"space"``: one for each frame; ``"time"``: one for each cell; ``"space and time"``:
            one in all.

    Returns:
        The means, in the dtype of ``query``.

    Raises:
        ValueError: if the tokens do not fit the grid, or ``axes`` is unknown.
    """
    grid = as_grid(grid)
    require_tokens(query.shape[1], grid)
    over = [dim for dim, named in zip((2, 1), require_axes(axes), strict=True) if named]
    frames = query.reshape(query.shape[0], grid.frames, grid.cells, query.shape[2])
    means = frames.mean(dim=over, keepdim=True, dtype=working_dtype(query))
    return means.flatten(1, 2).to(query.dtype)


def blur_queries(
    query: Float[Tensor, "batch tokens dim"],
    grid: GridLike,
    sigma: float,
    *,
    kernel: str = "reference",
    matrices: BlurMatrices | None = None,
    axes: str = "space",
) -> Float[Tensor, "batch tokens dim"]:
    r"""Return the queries blurred over their grid, each frame on its own unless asked otherwise.

    $$\tilde Q = B_h Q B_w^\top, \qquad \tilde Q K^\top = (B_h \otimes B_w)\, Q K^\top$$

    and over time a third matrix of the same kind, $B_t$, acts on the frames.

    Source: SEG, arXiv:2408.00760, Proposition 3.1: blurring the queries blurs the attention
    logits. Differs from it in: ``axes``; the paper has images only.

    Convention: arithmetic in at least float32; one rounding at the end.

    Args:
        query: the queries, row-major over ``grid``; not written to.
        grid: ``(height, width)``, ``(frames, height, width)`` or a `TokenGrid`.
        sigma: blur width in cells, and in frames; ``0`` changes nothing, ``math.inf`` gives every
            token the mean query along ``axes``.
        kernel: see `gaussian_matrix`.
        matrices: the cache of the sampling run; ``None`` builds the matrices anew.
        axes: ``"space"``, ``"time"`` or ``"space and time"``.

    Returns:
        The blurred queries, in the dtype and on the device of ``query``.

    Raises:
        ValueError: if the tokens do not fit the grid, ``axes`` is unknown, or as
            `gaussian_matrix`.
    """
    require_kernel(sigma, kernel)
    over_space, over_time = require_axes(axes)
    grid = as_grid(grid)
    require_tokens(query.shape[1], grid)
    if sigma == 0:
        return query.clone()
    if math.isinf(sigma):
        return repeat_rows(mean_queries(query, grid, axes=axes), grid, axes=axes)
    work = query.to(working_dtype(query))
    dim = query.shape[2]
    for named, size, inner in (
        (over_time, grid.frames, grid.cells * dim),
        (over_space, grid.height, grid.width * dim),
        (over_space, grid.width, dim),
    ):
        if size == 1 or not named:
            continue
        matrix = _axis_matrix(size, sigma, kernel, work, matrices)
        # The axis to blur is the middle one of a plain view: no transpose, no copy.
        lines = work.reshape(-1, size, inner)
        work = torch.bmm(matrix.expand(lines.shape[0], -1, -1), lines)
    return work.reshape(query.shape).to(query.dtype)


def repeat_rows(
    rows: Float[Tensor, "batch means dim"], grid: GridLike, *, axes: str = "space"
) -> Float[Tensor, "batch tokens dim"]:
    """Return the rows of `mean_queries` as one row per token.

    Args:
        rows: one row for each mean.
        grid: the token grid.
        axes: along which the means were taken.

    Returns:
        A tensor of its own memory, safe to write to.
    """
    grid = as_grid(grid)
    over_space, over_time = require_axes(axes)
    means = (1 if over_time else grid.frames, 1 if over_space else grid.cells)
    repeated = rows.reshape(rows.shape[0], *means, -1).expand(-1, grid.frames, grid.cells, -1)
    return repeated.clone(memory_format=torch.contiguous_format).flatten(1, 2)


def blur_planes(
    planes: Float[Tensor, "... height width"],
    vertical: Float[Tensor, "height height"],
    horizontal: Float[Tensor, "width width"],
) -> Float[Tensor, "... height width"]:
    r"""Return images blurred along both axes, $B_h X B_w^\top$.

    Args:
        planes: any stack of images, channels first.
        vertical: blur matrix of the columns' axis, of ``height`` cells.
        horizontal: blur matrix of the rows' axis, of ``width`` cells.

    Returns:
        The blurred images in the dtype of ``planes``; the arithmetic is at least float32.
    """
    work = planes.to(working_dtype(planes))
    blurred = vertical.to(work) @ work @ horizontal.to(work).mT
    return blurred.to(planes.dtype)


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in: that of ``tensor``, but at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _axis_matrix(
    size: int, sigma: float, kernel: str, like: Tensor, matrices: BlurMatrices | None
) -> Float[Tensor, "size size"]:
    if matrices is None:
        return gaussian_matrix(size, sigma, kernel=kernel).to(like)
    return matrices.get(size, sigma, kernel, like.dtype, like.device)
