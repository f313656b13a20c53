"""Projecting the queries of rows in which one query stands for all, once.

A projection is linear: that of the mean token is the mean of the projected tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..batch.active import RowGroup
from ..batch.widening import hooked


@contextmanager
def projected_once(
    modules: Sequence[torch.nn.Module],
    groups: Callable[[int, int], Sequence[RowGroup]],
    is_short: Callable[[int, RowGroup], bool],
) -> Iterator[None]:
    """Let projections of queries see one token of some rows, for the length of one call.

    Args:
        modules: the projections; each is given `(rows, tokens, channels)`.
        groups: is given a projection's number and its rows, and returns them in groups.
        is_short: tells whether the mean token is enough for a group.
    """
    sizes: list[tuple[int, int]] = []
    whole = torch.Size()

    def enter(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal whole
        sizes.clear()
        tokens = args[0]
        here = groups(number, tokens.shape[0])
        if not any(is_short(number, group) for group in here):
            return args, kwargs
        whole = tokens.shape
        pieces = [
            rows.mean(dim=1, keepdim=True) if is_short(number, group) else rows
            for group in here
            for rows in [tokens[group.rows]]
        ]
        sizes.extend((piece.shape[0], piece.shape[1]) for piece in pieces)
        flat = torch.cat([piece.reshape(-1, whole[-1]) for piece in pieces])
        return (flat, *args[1:]), kwargs

    def leave(number: int, out: torch.Tensor) -> torch.Tensor:
        del number
        if not sizes:
            return out
        pieces = out.split([rows * tokens for rows, tokens in sizes])
        shaped = [
            piece.reshape(*size, -1).expand(-1, whole[1], -1)
            for piece, size in zip(pieces, sizes, strict=True)
        ]
        return torch.cat(shaped)

    with hooked(modules, enter, leave):
        yield
