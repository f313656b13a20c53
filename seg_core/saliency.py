"""Where self-attention looks, and the blur of Self-Attention Guidance there.

Deliberately without an attention map: only its column sums are made, piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._shapes import Float
from .attention import split_heads
from .blur import blur_planes, working_dtype
from .grid import GridLike, as_grid, require_tokens
from .kernels import gaussian_matrix, reflected_matrix, require_kernel

_REFERENCE_TAPS = 9
_LOGITS_AT_ONCE = 2**21
_FEWEST_QUERIES = 16  # of a long clip: 8 MiB are one query of 40 heads


def column_mass(
    query: Float[Tensor, "batch queries inner"],
    key: Float[Tensor, "batch keys inner"],
    heads: int,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "batch keys"]:
    r"""Return how much attention each key draws from all queries.

    $$m_k = \frac{1}{H} \sum_h \sum_i \operatorname{softmax}(s\, Q_h K_h^\top)_{ik}, \qquad
      s = 1 / \sqrt{d} \text{ unless given}$$

    Source: Self-Attention Guidance, arXiv:2210.00939, as in KU-CVLAB/Self-Attention-Guidance.
    Differs from it in: nothing but memory, which grows with the tokens and not their square.

    Convention: a key of average interest has mass ``queries / keys``, which is 1 in
    self-attention; arithmetic and result in at least float32.

    Args:
        query: the queries of all heads.
        key: the keys of all heads.
        heads: number of heads.
        scale: factor of the logits; ``None`` for ``1 / sqrt(dim)``.
        mask: what an attention function takes: added to the logits, or booleans that keep;
            ``(batch or 1, heads or 1, queries or 1, keys)``.
        chunk: queries treated at once; ``None`` keeps the piece of the map near 8 MiB, or at 16
            queries where that is more.

    Returns:
        The mass of every key.

    Raises:
        ValueError: if the heads do not divide the channels or ``chunk`` is below 1.
    """
    if chunk is None:
        chunk = max(_FEWEST_QUERIES, _LOGITS_AT_ONCE // (query.shape[0] * heads * key.shape[1]))
    if chunk < 1:
        raise ValueError(f"the chunk must be at least 1 query, got {chunk}")
    dtype = working_dtype(query)
    queries = split_heads(query, heads)
    factor = 1 / math.sqrt(query.shape[2] // heads) if scale is None else scale
    keys = split_heads(key, heads).to(dtype).mT * factor
    mass = torch.zeros(query.shape[0], key.shape[1], dtype=dtype, device=query.device)
    for start in range(0, query.shape[1], chunk):
        rows = slice(start, start + chunk)
        logits = queries[:, :, rows].to(dtype) @ keys
        if mask is not None:
            logits = _masked(logits, mask if mask.shape[-2] == 1 else mask[..., rows, :])
        mass += torch.softmax(logits, dim=-1).sum(dim=(1, 2))
    return mass / heads


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -math.inf)
    return logits + mask.to(logits.dtype)


def frame_shares(mass: Float[Tensor, "batch keys"], grid: GridLike) -> Float[Tensor, "batch keys"]:
    """Return mass as shares of the average of its frame, so that frames are told apart alone.

    Source: Self-Attention Guidance, arXiv:2210.00939, whose threshold is in such shares. Differs
    from it in: in joint attention the keys of the text draw their part, so that the average of the
    image's is not 1 by itself; and videos.

    Args:
        mass: the mass of every key of the image, row-major over ``grid``.
        grid: the token grid of the keys.

    Returns:
        The shares, 1 on average in each frame.

    Raises:
        ValueError: if the tokens do not fit the grid.
    """
    grid = as_grid(grid)
    require_tokens(mass.shape[1], grid)
    frames = mass.reshape(-1, grid.frames, grid.cells)
    average = frames.mean(dim=2, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    return (frames / average).flatten(1)


def spread_mass(
    mass: Float[Tensor, "batch keys"], grid: GridLike, size: Sequence[int]
) -> Float[Tensor, "batch 1 *size"]:
    """Return the mass of the keys at the size of the latent.

    Convention: nearest-neighbour resampling, so that a threshold may come before or after it.

    Args:
        mass: the mass of every key, row-major over ``grid``.
        grid: the token grid of the keys.
        size: ``(height, width)`` of an image latent, or ``(frames, height, width)``.

    Returns:
        The mass at every cell of the latent, in its dtype.

    Raises:
        ValueError: if the tokens do not fit the grid, or a size of an image is given for frames.
    """
    grid = as_grid(grid)
    target = as_grid(size)
    require_tokens(mass.shape[1], grid)
    if len(size) == 2 and grid.frames > 1:
        raise ValueError(f"a mask of {grid.frames} frames must have three sizes, got {size!r}")
    planes = mass.reshape(-1, 1, grid.frames, grid.height, grid.width)
    shape = (target.frames, target.height, target.width)
    planes = torch.nn.functional.interpolate(planes, shape, mode="nearest")
    return planes.reshape(planes.shape[0], 1, *size)


def saliency_mask(
    mass: Float[Tensor, "batch keys"],
    grid: GridLike,
    threshold: float,
    size: Sequence[int],
) -> Float[Tensor, "batch 1 *size"]:
    r"""Return 1 where attention gathers and 0 elsewhere, at the size of the latent.

    $$M = [m > t]$$

    Source: Self-Attention Guidance, arXiv:2210.00939; threshold 1 in its code. Differs from it
    in: the grid is given, not guessed.

    Args:
        mass: the mass of every key, row-major over ``grid``.
        grid: the token grid of the keys.
        threshold: mass above which a token is salient; ``0`` selects all.
        size: ``(height, width)`` of an image latent, or ``(frames, height, width)``.

    Returns:
        The mask, in the dtype of ``mass``.

    Raises:
        ValueError: as `spread_mass`.
    """
    return (spread_mass(mass, grid, size) > threshold).to(mass.dtype)


def degrade(
    latent: Float[Tensor, "batch channels *size"],
    mask: Float[Tensor, "batch one *size"] | float,
    sigma: float,
    *,
    kernel: str = "reference",
) -> Float[Tensor, "batch channels *size"]:
    r"""Return a latent that is blurred where a mask says so.

    $$\hat x = M\,(G * x) + (1 - M)\,x$$

    Source: Self-Attention Guidance, arXiv:2210.00939. Differs from it in: nothing.

    Args:
        latent: the predicted image.
        mask: where to blur, 0 to 1; ``1.0`` is everywhere, the paper's blur guidance.
        sigma: blur width in latent cells.
        kernel: see `blur_latent`.

    Returns:
        The degraded latent, in the dtype of ``latent``.

    Raises:
        ValueError: as `blur_latent`.
    """
    blurred = blur_latent(latent, sigma, kernel=kernel)
    if isinstance(mask, Tensor):
        mask = mask.to(latent.dtype)
    return blurred * mask + latent * (1 - mask)


def blur_latent(
    latent: Float[Tensor, "batch channels *frames height width"],
    sigma: float,
    *,
    kernel: str = "reference",
) -> Float[Tensor, "batch channels *frames height width"]:
    r"""Return a latent blurred within its frames, $B_h X B_w^\top$.

    Source: ComfyUI's ``nodes_sag.py`` and diffusers' port of Self-Attention Guidance: 9 taps,
    reflected. Differs from it in: the taps are clamped to each axis, so that no size fails.

    Convention: ``reference`` has 9 taps at every ``sigma``, so above 3 or so it is close to a box;
    ``full`` is as wide as ``sigma`` needs and keeps the mean. Arithmetic in at least float32.

    Args:
        latent: the latent; any axes may stand between channels and height.
        sigma: blur width in latent cells; ``0`` changes nothing, ``math.inf`` is a box of 9 cells
            with ``reference`` and the mean with ``full``.
        kernel: ``"reference"`` or ``"full"``.

    Returns:
        The blurred latent, in its dtype.

    Raises:
        ValueError: if ``sigma`` is negative or NaN, or ``kernel`` is unknown.
    """
    require_kernel(sigma, kernel)
    if sigma == 0:
        return latent.clone()
    if kernel == "full":
        blurs = [gaussian_matrix(size, sigma, kernel=kernel) for size in latent.shape[-2:]]
    else:
        blurs = [reflected_matrix(size, sigma, _REFERENCE_TAPS) for size in latent.shape[-2:]]
    return blur_planes(latent, blurs[0], blurs[1])
