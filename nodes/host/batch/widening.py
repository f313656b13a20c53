"""Changes to a network's blocks for the length of one call; none is left, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from .compiled import COMPILED_CALL, eagerly, is_compiled_in_place
from .network_call import Axes, NetworkCall, are_options, exchanged
from .rows import Rows
from .trees import map_tensors

Options = dict[str, Any]
OUTPUT = "return"
"""The name under which the axis of a block's output stands."""


@contextmanager
def wrapped(
    modules: Sequence[torch.nn.Module], handle: Callable[[int, NetworkCall], Any]
) -> Iterator[None]:
    """Let `handle` run some modules: it is given the number of one, and the run."""
    with ExitStack() as stack:
        for number, module in enumerate(modules):
            name = COMPILED_CALL if is_compiled_in_place(module) else "forward"
            stack.enter_context(exchanged(module, name, partial(handle, number)))
        yield


@contextmanager
def widening(
    shared: Sequence[torch.nn.Module],
    blocks: Sequence[torch.nn.Module],
    rows: Rows,
    options: Options,
    axes: Axes,
) -> Iterator[None]:
    """Let each block of a network compute just the rows that differ by then.

    Args:
        shared: modules whose output no perturbation reaches.
        blocks: the network's blocks, in forward order.
        rows: which rows join where.
        options: the host's options of the call, which tell others the conds of the rows.
        axes: where the rows are not a tensor's first axis: name of the block's argument -> axis,
            or None if it has no rows.
    """
    before = [*shared, *(block for n, block in enumerate(blocks) if rows.present(n) < rows.total)]
    plain = {"cond_or_uncond": options["cond_or_uncond"], "uuids": options["uuids"]}

    def handle(number: int, run: NetworkCall) -> Any:
        block = number - len(shared)  # negative before the first: no row has joined
        told = [options, *filter(are_options, run.arguments.values())]
        for seen in told:
            seen.update(rows.labels(block, plain))
        narrow = run.with_rows(lambda tensor, axis: rows.narrowed(tensor, block, axis), axes)
        out = narrow.run()
        for seen in told:
            seen.update(rows.labels(None, plain))
        axis = axes.get(OUTPUT) or 0
        return map_tensors(lambda tensor: rows.widened(tensor, block, axis), out)

    options.update(rows.labels(None, plain))
    with wrapped(before, handle):
        yield


@contextmanager
def own_options(
    modules: Sequence[torch.nn.Module],
    options: Options,
    change: Callable[[int, Options], Options],
) -> Iterator[None]:
    """Give some blocks options of their own for one call; all others see the host's.

    Args:
        modules: the blocks.
        options: of the network, for blocks that are handed none and go by these.
        change: is given a block's number and the host's options, and returns its own.
    """

    def handle(number: int, run: NetworkCall) -> Any:
        found = [value for value in run.arguments.values() if are_options(value)]
        given = {id(one): one for one in found or [options]}.values()
        saved = [dict(one) for one in given]
        for one in given:  # in place: what attends in a block may have been given them before
            one.update(change(number, one))
        try:
            return run.run()
        finally:
            for one, before in zip(given, saved, strict=True):
                one.clear()
                one.update(before)

    with wrapped(modules, handle):
        yield


@contextmanager
def running_eagerly(blocks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Run compiled blocks as they were before for one call: graphs ignore what is changed in it."""

    def handle(_number: int, run: NetworkCall) -> Any:
        with eagerly():
            return run.run()

    with wrapped(blocks, handle):
        yield
