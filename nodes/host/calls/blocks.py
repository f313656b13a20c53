"""Hooks on a network's blocks for the length of one call; none is left, whatever happens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from .call import KEY
from .compiled import eager, eagerly, is_compiled_in_place
from .rows import Rows
from .trees import map_tensors

Axes = Mapping[str, int | None]
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
def growing(
    shared: Sequence[torch.nn.Module],
    blocks: Sequence[torch.nn.Module],
    rows: Rows,
    options: dict[str, Any],
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
    told: list[dict[str, Any]] = []

    def tell(block: int | None) -> None:
        for seen in told:
            seen["cond_or_uncond"] = rows.labels(block, plain["cond_or_uncond"])
            seen["uuids"] = rows.uuids(block, plain["uuids"])

    def enter(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block = number - len(shared)  # negative before the first: no row has joined
        told[:] = [options, *(v for v in (*args, *kwargs.values()) if are_options(v))]
        tell(block)

        return map_rows(
            lambda tensor, axis: rows.narrowed(tensor, block, axis),
            eager(before[number]).forward,
            axes,
            args,
            kwargs,
        )

    def leave(number: int, out: Any) -> Any:
        tell(None)
        block, axis = number - len(shared), axes.get(OUTPUT) or 0
        return map_tensors(lambda tensor: rows.widened(tensor, block, axis), out)

    told[:] = [options]
    tell(None)
    with hooked(before, enter, leave):
        yield


@contextmanager
def keeping_compiled(
    blocks: Sequence[torch.nn.Module],
    compiled: Collection[int],
    changed: Collection[int],
    plain: Options,
    own: Options,
) -> Iterator[None]:
    """Run compiled blocks as they are for one call, and eagerly those that are changed in it.

    Graphs hold on to what they saw first, and are made anew for anything else, so the former are
    shown the options of an unguided call.

    Args:
        blocks: of the network.
        compiled: numbers of those that are compiled.
        changed: numbers of those that are changed.
        plain: the host's options without the change.
        own: the options with it.
    """
    numbers = sorted(compiled)
    ours = {KEY, *(name for name in own if own[name] is not plain.get(name))}

    def shown(value: Any) -> Any:
        if not are_options(value):
            return value
        others = {name: one for name, one in value.items() if name not in ours}
        return others | {name: plain[name] for name in ours - {KEY} if name in plain}

    with ExitStack() as stack:

        def enter(number: int, args: tuple[Any, ...], kwargs: Options) -> Any:
            if numbers[number] in changed:
                stack.enter_context(eagerly())
                return args, kwargs
            return tuple(map(shown, args)), {name: shown(one) for name, one in kwargs.items()}

        def leave(*_: Any) -> None:
            stack.close()

        with hooked([blocks[number] for number in numbers], enter, leave):
            yield


def map_rows(
    change: Callable[[torch.Tensor, int], torch.Tensor],
    forward: Callable[..., Any],
    axes: Axes,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a block's arguments with its tensors changed; the host's options stay.

    Args:
        change: is given each tensor, and the axis on which its rows are.
        forward: of the block.
        axes: as in `growing`.
        args: by position.
        kwargs: by name.
    """

    def mapped(name: str, value: Any) -> Any:
        axis = axes.get(name, 0)
        if axis is None or are_options(value):
            return value
        return map_tensors(lambda tensor: change(tensor, axis), value)

    names = names_of(forward) if axes else [""] * len(args)
    return (
        tuple(mapped(name, value) for name, value in zip(names, args, strict=False)),
        {name: mapped(name, value) for name, value in kwargs.items()},
    )


def are_options(value: Any) -> bool:
    """Tell whether an argument of a block is the host's options."""
    return isinstance(value, dict) and "cond_or_uncond" in value


def names_of(forward: Callable[..., Any]) -> list[str]:
    """Return the names of a block's arguments, in order."""
    return list(inspect.signature(forward).parameters)
