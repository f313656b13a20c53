"""Projecting the queries of rows in which one query stands for all, once.

A projection is linear: that of the mean token is the mean of the projected tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..batch.active import RowGroup
from ..batch.network_call import NetworkCall
from ..batch.widening import wrapped


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

    def handle(number: int, run: NetworkCall) -> torch.Tensor:
        name, tokens = next(iter(run.arguments.items()))
        here = groups(number, tokens.shape[0])
        if not any(is_short(number, group) for group in here):
            return run.run()
        pieces = [
            rows.mean(dim=1, keepdim=True) if is_short(number, group) else rows
            for group in here
            for rows in [tokens[group.rows]]
        ]
        flat = torch.cat([piece.flatten(0, 1) for piece in pieces])
        out = run.replaced(**{name: flat}).run()
        few = out.split([piece.shape[0] * piece.shape[1] for piece in pieces])
        shaped = [
            one.unflatten(0, piece.shape[:2]).expand(-1, tokens.shape[1], -1)
            for one, piece in zip(few, pieces, strict=True)
        ]
        return torch.cat(shaped)

    with wrapped(modules, handle):
        yield
