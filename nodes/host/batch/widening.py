"""Hooks on a network's blocks for the length of one call; none is left, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from .compiled import eager, eagerly, is_compiled_in_place
from .network_call import Axes, NetworkCall, are_options
from .rows import Rows
from .trees import map_tensors

Options = dict[str, Any]
OUTPUT = "return"
"""The name under which the axis of a block's output stands."""


@contextmanager
def hooked(
    modules: Sequence[torch.nn.Module],
    enter: Callable[[int, tuple[Any, ...], dict[str, Any]], Any],
    leave: Callable[[int, Any], Any],
) -> Iterator[None]:
    """Call `enter(number, args, kwargs)` before and `leave(number, out)` after each module.

    `enter` may return other arguments, and `leave` another output.
    """
    with ExitStack() as stack:
        for number, module in enumerate(modules):
            own = partial(enter, number), partial(leave, number)
            if is_compiled_in_place(module):
                stack.enter_context(_around_compiled(module, *own))
                continue
            before, after = _hooks(*own)
            hook = module.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield


def _hooks(enter: Callable[..., Any], leave: Callable[..., Any]) -> tuple[Any, Any]:
    return lambda _module, args, kwargs: enter(args, kwargs), lambda _m, _args, out: leave(out)


@contextmanager
def _around_compiled(
    module: Any, enter: Callable[..., Any], leave: Callable[..., Any]
) -> Iterator[None]:
    """Do what hooks do to a module that is compiled in place: its graph knows of no later ones."""
    compiled = module._compiled_call_impl

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = enter(args, kwargs) or (args, kwargs)
        out = compiled(*args, **kwargs)
        other = leave(out)
        return out if other is None else other

    module._compiled_call_impl = run
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


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
    told: list[Options] = []

    def tell(block: int | None) -> None:
        for seen in told:
            seen.update(rows.labels(block, plain))

    def enter(number: int, args: tuple[Any, ...], kwargs: Options) -> Any:
        block = number - len(shared)  # negative before the first: no row has joined
        told[:] = [options, *(v for v in (*args, *kwargs.values()) if are_options(v))]
        tell(block)
        call = NetworkCall(eager(before[number]).forward, [*args], kwargs)
        call = call.with_rows(lambda tensor, axis: rows.narrowed(tensor, block, axis), axes)
        return tuple(call.args), call.kwargs

    def leave(number: int, out: Any) -> Any:
        tell(None)
        block, axis = number - len(shared), axes.get(OUTPUT) or 0
        return map_tensors(lambda tensor: rows.widened(tensor, block, axis), out)

    told[:] = [options]
    tell(None)
    with hooked(before, enter, leave):
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
    saved: list[Options] = []

    def enter(number: int, args: tuple[Any, ...], kwargs: Options) -> Any:
        def own(value: Any) -> Any:
            return change(number, value) if are_options(value) else value

        if not any(map(are_options, (*args, *kwargs.values()))):
            saved.append(dict(options))
            options.update(change(number, options))
        return tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}

    def leave(*_: Any) -> None:
        if saved:
            options.clear()
            options.update(saved.pop())

    with hooked(modules, enter, leave):
        yield


@contextmanager
def running_eagerly(blocks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Run compiled blocks as they were before for one call: graphs ignore what is changed in it."""
    with ExitStack() as stack:

        def enter(*_: Any) -> None:
            stack.enter_context(eagerly())

        def leave(*_: Any) -> None:
            stack.close()

        with hooked(blocks, enter, leave):
            yield
