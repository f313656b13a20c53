"""Self-attention with smoothed queries, around whatever attention function the host offers.

Deliberately no dense map in the smoothed form: the map is the host's business, the queries ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ._shapes import Float
from .blur import BlurMatrices, blur_queries, mean_queries, repeat_rows, working_dtype
from .grid import GridLike, require_tokens
from .kernels import require_kernel

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_weights(
    query: Float[Tensor, "... queries dim"],
    key: Float[Tensor, "... keys dim"],
    scale: float | None = None,
) -> Float[Tensor, "... queries keys"]:
    r"""Return the attention map, rows summing to 1.

    $$\operatorname{softmax}(s\, Q K^\top), \qquad s = 1 / \sqrt{d} \text{ unless given}$$

    Source: SEG, arXiv:2408.00760, section 2. Differs from it in: nothing.

    Convention: softmax over keys; arithmetic and result in at least float32.

    Args:
        query: queries of one head.
        key: keys of one head.
        scale: factor of the logits; ``None`` is ``1 / sqrt(dim)``.

    Returns:
        The weights of every key for every query.
    """
    dtype = working_dtype(query)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return torch.softmax((query.to(dtype) * factor) @ key.to(dtype).mT, dim=-1)


def attention_output(
    query: Float[Tensor, "batch queries inner"],
    key: Float[Tensor, "batch keys inner"],
    value: Float[Tensor, "batch keys outer"],
    heads: int,
    scale: float | None = None,
) -> Float[Tensor, "batch queries outer"]:
    """Return multi-head attention, for use without a host.

    Convention: heads are consecutive slices of the last axis.

    Args:
        query: the queries of all heads.
        key: the keys of all heads.
        value: the values of all heads.
        heads: number of heads.
        scale: factor of the logits; ``None`` is ``1 / sqrt(inner / heads)``.

    Returns:
        The output of all heads, before the output projection.

    Raises:
        ValueError: if the heads do not divide the last axis.
    """
    query, key, value = (split_heads(tensor, heads) for tensor in (query, key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
    return output.transpose(1, 2).flatten(2)


def split_heads(
    tensor: Float[Tensor, "batch tokens inner"], heads: int
) -> Float[Tensor, "batch heads tokens dim"]:
    """Return a view with the heads on an axis of their own.

    Args:
        tensor: queries, keys or values of all heads.
        heads: number of heads.

    Returns:
        The view.

    Raises:
        ValueError: if the heads do not divide the last axis.
    """
    if heads < 1 or tensor.shape[2] % heads:
        raise ValueError(f"{tensor.shape[2]} channels must divide into the heads, got {heads}")
    batch, tokens, inner = tensor.shape
    return tensor.reshape(batch, tokens, heads, inner // heads).transpose(1, 2)


def smoothed_attention(
    query: Float[Tensor, "batch tokens inner"],
    key: Float[Tensor, "batch keys inner"],
    value: Float[Tensor, "batch keys outer"],
    grid: GridLike,
    sigma: float,
    *,
    heads: int,
    kernel: str = "reference",
    attend: Attend | None = None,
    matrices: BlurMatrices | None = None,
) -> Float[Tensor, "batch tokens outer"]:
    r"""Return the attention output with queries blurred over the grid.

    $$\operatorname{softmax}(\tilde Q K^\top / \sqrt{d})\, V, \qquad \tilde Q = B_h Q B_w^\top$$

    Source: SEG, arXiv:2408.00760, section 3 and Proposition 3.1. Differs from it in: for infinite
    blur all queries of a frame are one, so attention runs once per frame and its row is repeated,
    which is exact.

    Convention: ``attend`` sees ``(batch, queries, channels of all heads)``; the number of
    queries is ``frames`` for infinite blur and ``tokens`` otherwise.

    Args:
        query: the queries, row-major over ``grid``; not written to.
        key: the keys.
        value: the values.
        grid: the token grid of the queries.
        sigma: blur width in cells; ``0`` is plain attention.
        heads: number of heads, used by the default ``attend`` alone.
        kernel: see `gaussian_matrix`.
        attend: the host's attention, ``(query, key, value) -> output``; ``None`` is torch's.
        matrices: the cache of the sampling run; ``None`` builds the matrices anew.

    Returns:
        The output of all heads for every token, before the output projection.

    Raises:
        ValueError: if the tokens do not fit the grid, or as `gaussian_matrix`.
    """
    require_kernel(sigma, kernel)
    require_tokens(query.shape[1], grid)
    if attend is None:
        attend = partial(attention_output, heads=heads)
    if math.isinf(sigma):
        return repeat_rows(attend(mean_queries(query, grid), key, value), grid)
    return attend(blur_queries(query, grid, sigma, kernel=kernel, matrices=matrices), key, value)
