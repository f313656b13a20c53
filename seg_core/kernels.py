"""Gaussian blur along one axis, as a row-stochastic matrix.

Deliberately not a convolution: a matrix states its border rule, and both limits are exact.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ._shapes import Float

Kernel: TypeAlias = Literal["reference", "full"]
KERNELS: tuple[Kernel, ...] = ("reference", "full")


def gaussian_matrix(
    size: int, sigma: float, *, kernel: str = "reference"
) -> Float[Tensor, "size size"]:
    r"""Return the matrix ``B`` that blurs a signal of ``size`` cells: ``B @ x``.

    $$B_{ij} \propto \sum_{c \mapsto j} \exp\left(-\frac{(i - c)^2}{2\sigma^2}\right),
    \qquad \sum_j B_{ij} = 1$$

    The sum runs over the cells ``c`` of the endlessly mirrored line that show cell ``j``.

    Source: SEG, arXiv:2408.00760, section 3, and its released code, SusungHong/SEG-SDXL at
    cf8256d. ``reference`` differs from the code in one point: the kernel is clamped to the
    axis that it runs along, where the code clamps both axes to the width and so fails on wide
    grids.

    Convention: distances in grid cells.

    * ``reference``: about ``6 sigma`` taps, odd, at most the axis; mirrored at the centre of the
      border cell (``c b a b c``). At ``sigma <= 1/6`` one tap is left, which is the identity.
      Rows sum to 1, columns do not: the mean of the queries may move.
    * ``full``: all taps, mirrored at the outer edge of the border cell (``b a a b``). Symmetric
      and doubly stochastic, so the mean stays; all eigenvalues fall as ``sigma`` grows, and the
      matrix runs continuously from the identity to the uniform average. The Gaussian is sampled
      at whole distances and normalised, as in ``reference``; the heat kernel of the path would
      be a semigroup, but no Gaussian.

    Args:
        size: number of cells along the axis.
        sigma: standard deviation in cells; ``0`` is the identity and ``math.inf`` the uniform
            average, for both kernels.
        kernel: ``"reference"`` or ``"full"``.

    Returns:
        The row-stochastic matrix, float64, on the CPU.

    Raises:
        ValueError: if ``size < 1``, ``sigma`` is negative or NaN, or ``kernel`` is unknown.
    """
    require_kernel(sigma, kernel)
    if size < 1:
        raise ValueError(f"the size of a blur matrix must be at least 1, got {size}")
    if sigma == 0:
        return torch.eye(size, dtype=torch.float64)
    if math.isinf(sigma):
        return torch.full((size, size), 1.0 / size, dtype=torch.float64)
    if kernel == "full":
        return _mirrored_matrix(size, sigma)
    # The bound keeps ceil() finite; beyond it the clamp to the axis decides anyway.
    taps = math.ceil(min(6.0 * sigma, 2.0 * size + 2.0))
    return reflected_matrix(size, sigma, taps + 1 - taps % 2)


def reflected_matrix(size: int, sigma: float, taps: int) -> Float[Tensor, "size size"]:
    """Return the blur matrix of a kernel of ``taps`` cells with the border cell as mirror.

    Source: ``gaussian_blur_2d`` of the released SEG code, SusungHong/SEG-SDXL at cf8256d.
    Differs from it in: the clamp looks at this axis alone.

    Convention: distances in cells; the kernel is normalised after the clamp.

    Args:
        size: number of cells along the axis.
        sigma: standard deviation in cells, above 0; ``math.inf`` is a box of ``taps`` cells.
        taps: odd number of cells; more than the axis has are cut off.

    Returns:
        The row-stochastic matrix, float64, on the CPU.
    """
    taps = min(taps, size - (size % 2 - 1))
    reach = taps // 2
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma).square())
    weights = weights / weights.sum()
    rows = torch.arange(size).unsqueeze(1)
    columns = (rows + offsets).abs()
    columns = (size - 1) - ((size - 1) - columns).abs()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, columns, weights.expand(size, -1))


def require_kernel(sigma: float, kernel: str) -> Kernel:
    """Return ``kernel`` if it is known and ``sigma`` is a blur width; raise ValueError if not."""
    if math.isnan(sigma) or sigma < 0:
        raise ValueError(f"the blur sigma must be 0 or more, got {sigma}")
    if kernel not in KERNELS:
        raise ValueError(f"the blur kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    return kernel


def _mirrored_matrix(size: int, sigma: float) -> Float[Tensor, "size size"]:
    weights = _ring_weights(2 * size, sigma)
    cells = torch.arange(size)
    rows, columns = cells.unsqueeze(1), cells.unsqueeze(0)
    return weights[(rows - columns) % (2 * size)] + weights[rows + columns + 1]


def _ring_weights(period: int, sigma: float) -> Float[Tensor, " period"]:
    """Gaussian wrapped onto a ring: a theta function, by whichever series is short."""
    cells = torch.arange(period, dtype=torch.float64)
    terms = torch.arange(-8, 9, dtype=torch.float64).unsqueeze(1)
    if 2 * sigma <= period:
        weights = torch.exp(-0.5 * ((cells + period * terms) / sigma).square()).sum(0)
    else:  # Poisson summation: the same function as a cosine series
        turns = 2 * math.pi * terms / period
        weights = (torch.exp(-0.5 * (sigma * turns).square()) * torch.cos(turns * cells)).sum(0)
    return weights / weights.sum()
