"""A run of a network, or of one of its blocks, with its arguments by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch

from .call import Call
from .compiled import COMPILED_CALL, eager, eagerly
from .trees import map_tensors, tensors_in

Axes = Mapping[str, int | None]
Handler = Callable[["NetworkCall"], Any]
_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class NetworkCall:
    """One run of a network or a block: what it is given, and how to run it.

    Attributes:
        arguments: by name, positional ones first; where its `forward` does not name them, they are
            ``argument 0`` and so on.
    """

    def __init__(self, run: Callable[..., Any], arguments: dict[str, Any], positional: int) -> None:
        self._run = run
        self._positional = positional
        self.arguments = arguments

    def run(self) -> Any:
        """Run it."""
        given = [*self.arguments.items()]
        args = [value for _, value in given[: self._positional]]
        return self._run(*args, **dict(given[self._positional :]))

    @property
    def options(self) -> dict[str, Any]:
        """Return the host's options, as the network sees them."""
        return self.arguments["transformer_options"]

    @property
    def x(self) -> torch.Tensor:
        """Return the latent, or the first of several that are packed together."""
        return next(tensors_in(self.arguments))

    @property
    def rows(self) -> int:
        """Return the rows of the batch."""
        return self.x.shape[0]

    def replaced(self, **changes: Any) -> NetworkCall:
        """Return the same call with other arguments."""
        return NetworkCall(self._run, {**self.arguments, **changes}, self._positional)

    def part(self, rows: slice) -> NetworkCall:
        """Return the same call for some rows of its batch."""
        batch = self.rows
        return self.mapped(lambda t: t[rows] if t.ndim and t.shape[0] == batch else t)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> NetworkCall:
        """Return the same call with every tensor but those in the host's options changed.

        Containers are copied, so that a network that empties a list leaves this call's own full.
        """
        changed = self.with_rows(lambda tensor, _axis: change(tensor))
        return changed.replaced(transformer_options=dict(self.options))

    def with_rows(
        self, change: Callable[[torch.Tensor, int], torch.Tensor], axes: Axes = MappingProxyType({})
    ) -> NetworkCall:
        """Return the same call with every tensor changed; the host's options stay.

        Args:
            change: is given each tensor, and the axis on which its rows are.
            axes: where that is not the first axis: name of the argument -> axis, or None if it has
                no rows.
        """

        def changed(name: str, value: Any) -> Any:
            axis = axes.get(name, 0)
            if axis is None or name == "transformer_options" or are_options(value):
                return value
            return map_tensors(lambda tensor: change(tensor, axis), value)

        return self.replaced(**{n: changed(n, value) for n, value in self.arguments.items()})


def are_options(value: Any) -> bool:
    """Tell whether an argument is the host's options."""
    return isinstance(value, dict) and "cond_or_uncond" in value


def _named(forward: Callable[..., Any]) -> list[str]:
    """Return what a function calls its arguments, as far as it says."""
    try:
        known = inspect.signature(forward).parameters.values()
    except ValueError:  # compiled code
        known = ()
    return [one.name for one in known if one.kind not in _OPEN]


@functools.lru_cache(maxsize=256)
def _named_by_class(method: Callable[..., Any]) -> list[str]:
    """Return the same of a class's method, without `self`; asked once, as it takes its time."""
    return _named(method)[1:]


def _names(forward: Callable[..., Any], own: Any, args: Sequence[Any]) -> list[str]:
    """Return what a module calls its arguments, and some name where it does not say.

    Another node may have put a function in the place of a class's `own` method, with other names
    or none: it is called as the host calls the method.
    """
    known = [_named_by_class(own)] if callable(own) else []
    if not known or getattr(forward, "__func__", None) is not own:
        known.append(_named(forward))
    names = max((some[: len(args)] for some in known), key=len)
    for number in range(len(names), len(args)):
        is_options = are_options(args[number])
        names.append("transformer_options" if is_options else f"argument {number}")
    return names


@contextmanager
def exchanged(module: Any, name: str, handle: Handler) -> Iterator[None]:
    """Let `handle` run a method of an object, which is on it again afterwards as it was."""
    own = vars(module)
    before, run = own.get(name), getattr(module, name)
    named = "forward" if name == COMPILED_CALL else name
    forward, method = getattr(eager(module), named), getattr(type(eager(module)), named, None)

    @functools.wraps(forward)
    def instead(*args: Any, **kwargs: Any) -> Any:
        named = zip(_names(forward, method, args), args, strict=True)
        return handle(NetworkCall(run, {**dict(named), **kwargs}, len(args)))

    setattr(module, name, instead)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


@contextmanager
def intercepted(call: Call, handle: Handler, *, compiled: bool) -> Iterator[None]:
    """Let `handle` run the network in one model call, inside of everything that others wrap it in.

    Most networks of the host run the wrappers of other nodes in `forward`, around `_forward`: that
    is where `handle` stands. Where there is no `_forward`, or another node has put a forward of its
    own in the network's place, it stands around `forward`. With `compiled`, the network is compiled
    as a whole and runs eagerly for the length of the call.
    """
    network = eager(call.model.diffusion_model)
    has_inner = hasattr(network, "_forward") and "forward" not in vars(network)
    name = "_forward" if has_inner else "forward"
    with exchanged(network, name, handle), eagerly() if compiled else nullcontext():
        yield
