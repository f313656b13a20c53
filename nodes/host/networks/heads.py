"""Some heads of attention: what is done to them, and to no others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ....seg_core import Target, TokenGrid
from ..calls.site import Site
from ..settings.changes import ChangeOutput, SmoothQueries


def in_heads(
    change: Callable[..., torch.Tensor],
    heads: tuple[int, ...] | None,
    count: int,
    first: torch.Tensor,
    *others: torch.Tensor,
    apart: bool = False,
) -> torch.Tensor:
    """Return the first tensor with `change` made to some of its heads.

    Args:
        change: is given the chosen heads of all tensors, in their layout.
        heads: the chosen ones; None for all.
        count: number of heads.
        first: the tensor to change; not written to.
        others: whatever `change` needs besides, in the same layout.
        apart: heads are the second axis; they share the last one otherwise.
    """
    if heads is None:
        return change(first, *others)
    axis = 1 if apart else first.ndim - 1

    def parted(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if apart else tensor.unflatten(-1, (count, -1))

    def chosen(tensor: torch.Tensor) -> torch.Tensor:
        some = torch.cat([parted(tensor).narrow(axis, head, 1) for head in heads], dim=axis)
        return some if apart else some.flatten(-2)

    new = change(chosen(first), *map(chosen, others))
    new = new if apart else new.unflatten(-1, (len(heads), -1))
    result = parted(first).clone()
    for number, head in enumerate(heads):
        result.narrow(axis, head, 1).copy_(new.narrow(axis, number, 1))
    return result if apart else result.flatten(-2)


def smoothed_heads(
    site: Site,
    target: Target,
    count: int,
    query: torch.Tensor,
    key: torch.Tensor,
    grid: TokenGrid,
) -> torch.Tensor:
    """Return queries of which some heads are smoothed, `(rows, tokens, channels)`.

    Args:
        site: the smoothing.
        target: the layer.
        count: number of heads.
        query: the queries.
        key: the keys of the first row, for probes.
        grid: of the tokens.
    """
    change = site.perturbation.change
    assert isinstance(change, SmoothQueries)
    site.reached.add(target)
    if site.look is not None:
        one, keys = (t.unflatten(-1, (count, -1)).transpose(0, 1) for t in (query[0], key))
        site.look.at_queries(target, one, keys, grid, change.smooth, site.matrices)
    smooth = partial(change.smooth, grid=grid, matrices=site.matrices, one_query=False)
    return in_heads(smooth, site.perturbation.heads(target), count, query)


def is_mapless(change: object, heads: tuple[int, ...] | None) -> bool:
    """Tell whether a change leaves nothing of an attention map, so that none has to be made."""
    return isinstance(change, ChangeOutput) and heads is None and not change.mix.needs_map
