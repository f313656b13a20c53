"""The attention energy of the paper and what blur does to it, as measurements.

Deliberately outside the sampling path: these need the whole attention map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._shapes import Float
from .blur import blur_queries, working_dtype
from .grid import GridLike, as_grid, require_axes, require_tokens
from .kernels import gaussian_matrix


def attention_energy(logits: Float[Tensor, "... queries keys"]) -> Float[Tensor, " ..."]:
    r"""Return the energy of an attention map.

    $$E(A) = -\sum_i \log \sum_k \exp A_{ik}$$

    Source: SEG, arXiv:2408.00760, Definition 2.1. Differs from it in: nothing.

    Convention: the inner sum runs over keys; arithmetic and result in at least float32. Blur
    raises this energy, as the paper's proof has it; the words of its Lemma 3.2 say otherwise.

    Args:
        logits: attention logits, scaled as the softmax sees them.

    Returns:
        One energy per map.
    """
    return -torch.logsumexp(logits.to(working_dtype(logits)), dim=-1).sum(dim=-1)


def mean_logsumexp(logits: Float[Tensor, "... queries keys"]) -> Float[Tensor, " ..."]:
    r"""Return the log-sum-exp of a query, averaged: $-E(A) / N$.

    Source: SEG, arXiv:2408.00760, Lemma 3.2. Differs from it in: divided by the number of
    queries, so that grids of different sizes compare.

    Convention: as `attention_energy`.

    Args:
        logits: attention logits, scaled as the softmax sees them.

    Returns:
        One number per map; blur lowers it.
    """
    return -attention_energy(logits) / logits.shape[-2]


def logit_variance(logits: Float[Tensor, "... queries keys"]) -> Float[Tensor, " ..."]:
    r"""Return the variance of the logits over the queries, averaged over the keys.

    $$\frac{1}{NM} \sum_{k} \sum_i \left(A_{ik} - \tfrac{1}{N} \textstyle\sum_j A_{jk}\right)^2$$

    Source: SEG, arXiv:2408.00760, Lemma 3.1. Differs from it in: nothing.

    Convention: population variance; infinite blur makes it 0.

    Args:
        logits: attention logits.

    Returns:
        One number per map; blur lowers it.
    """
    return logits.to(working_dtype(logits)).var(dim=-2, correction=0).mean(dim=-1)


def smoothed_logits(
    logits: Float[Tensor, "... tokens keys"],
    grid: GridLike,
    sigma: float,
    *,
    kernel: str = "reference",
) -> Float[Tensor, "... tokens keys"]:
    r"""Return the logits blurred over the query positions, $(B_h \otimes B_w) A$.

    Source: SEG, arXiv:2408.00760, Proposition 3.1. Differs from it in: nothing.

    Convention: as `blur_queries`.

    Args:
        logits: attention logits, queries row-major over ``grid``.
        grid: the token grid of the queries.
        sigma: blur width in cells; ``0`` changes nothing.
        kernel: see `gaussian_matrix`.

    Returns:
        The blurred logits in the dtype of ``logits``.

    Raises:
        ValueError: as `blur_queries`.
    """
    stack = logits.reshape(-1, *logits.shape[-2:])
    return blur_queries(stack, grid, sigma, kernel=kernel).reshape(logits.shape)


def energy_curvature(
    logits: Float[Tensor, "... tokens keys"],
    grid: GridLike,
    sigma: float = 0.0,
    *,
    kernel: str = "reference",
) -> Float[Tensor, " ..."]:
    r"""Return the total curvature of the smoothed energy $A \mapsto E(BA)$ at the logits.

    $$-\operatorname{tr} \nabla^2 E(BA)
      = \sum_i \Big(\sum_j B_{ij}^2\Big) \Big(1 - \sum_k p_{ik}^2\Big), \qquad
      p_i = \operatorname{softmax}((BA)_i)$$

    Source: SEG, arXiv:2408.00760, Theorem 3.1. Differs from it in: the trace stands for the
    determinant. A constant added to a row's logits changes the energy linearly, so each row
    gives the Hessian an eigenvalue 0 and its determinant is 0 before any blur; the product of
    the other eigenvalues carries ``det B`` to a power of ``2 (keys - 1)`` and leaves the range of
    floating point at every blur of interest. All eigenvalues of the Hessian have one sign, so
    the trace is the sum of their sizes: 0 only where the energy is flat, and finite at infinite
    blur.

    Convention: derivatives are taken in the *unblurred* logits, as in the theorem; the blur's own
    slope is what attenuates. For large softmax values the theorem's premise fails, and so may
    the attenuation.

    Args:
        logits: the unblurred attention logits, queries row-major over ``grid``.
        grid: the token grid of the queries.
        sigma: blur width in cells; ``0`` measures the plain energy.
        kernel: see `gaussian_matrix`.

    Returns:
        One curvature per map, not negative, in at least float32.

    Raises:
        ValueError: as `blur_queries`.
    """
    grid = as_grid(grid)
    require_tokens(logits.shape[-2], grid)
    work = logits.to(working_dtype(logits))
    smoothed = smoothed_logits(work, grid, sigma, kernel=kernel)
    slopes = blur_slopes(grid, sigma, kernel=kernel).to(work)
    return (slopes * row_curvature(smoothed)).sum(dim=-1)


def row_curvature(logits: Float[Tensor, "... queries keys"]) -> Float[Tensor, "... queries"]:
    r"""Return the curvature that each query's log-sum-exp has in its own logits.

    $$\operatorname{tr} \nabla^2 \operatorname{lse}(a_i) = 1 - \sum_k p_{ik}^2, \qquad
      p_i = \operatorname{softmax}(a_i)$$

    Source: SEG, arXiv:2408.00760, Theorem 3.1; see `energy_curvature`.

    Convention: as `attention_energy`.

    Args:
        logits: attention logits, blurred or not, of all queries or some.

    Returns:
        One number from 0 to 1 per query; 0 where it attends to one key alone.
    """
    weights = torch.softmax(logits.to(working_dtype(logits)), dim=-1)
    return 1.0 - weights.square().sum(dim=-1)


def blur_slopes(
    grid: GridLike, sigma: float, *, kernel: str = "reference", axes: str = "space"
) -> Float[Tensor, " tokens"]:
    r"""Return how much of each query's curvature a blur lets through, $\sum_j B_{ij}^2$.

    Source: SEG, arXiv:2408.00760, Theorem 3.1; see `energy_curvature`.

    Convention: as `blur_queries`; float64.

    Args:
        grid: the token grid of the queries.
        sigma: blur width in cells.
        kernel: see `gaussian_matrix`.
        axes: see `blur_queries`.

    Returns:
        One number from 0 to 1 per query; 1 without blur.

    Raises:
        ValueError: as `blur_queries`.
    """
    grid = as_grid(grid)
    over_space, over_time = require_axes(axes)
    slopes = torch.ones(1, dtype=torch.float64)
    for named, size in (
        (over_time, grid.frames),
        (over_space, grid.height),
        (over_space, grid.width),
    ):
        matrix = gaussian_matrix(size, sigma if named else 0.0, kernel=kernel)
        slopes = torch.outer(slopes, matrix.double().square().sum(dim=1)).flatten()
    return slopes
