"""A run of a network, or of one of its blocks, with its arguments by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch

from .call import Call
from .compiled import eager, eagerly
from .trees import map_tensors

Axes = Mapping[str, int | None]
Handler = Callable[["NetworkCall"], Any]
_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class NetworkCall:
    """One run of a network or a block: what it is given, and how to run it.

    Where its `forward` does not name its arguments, they are ``argument 0`` and so on.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        args: list[Any],
        kwargs: dict[str, Any],
        names: list[str] | None = None,
    ) -> None:
        self._run = run
        self._names = _names(run, args) if names is None else names
        self.args = args
        self.kwargs = kwargs

    def run(self) -> Any:
        """Run it."""
        return self._run(*self.args, **self.kwargs)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments by name."""
        return {**dict(zip(self._names, self.args, strict=True)), **self.kwargs}

    @property
    def options(self) -> dict[str, Any]:
        """Return the host's options, as the network sees them."""
        return self.arguments["transformer_options"]

    @property
    def x(self) -> torch.Tensor:
        """Return the latent, or the first of several that are packed together."""
        x = self.arguments[self._names[0]] if self._names else next(iter(self.kwargs.values()))
        return x if torch.is_tensor(x) else x[0]

    @property
    def rows(self) -> int:
        """Return the rows of the batch."""
        return self.x.shape[0]

    def replaced(self, **changes: Any) -> NetworkCall:
        """Return the same call with other arguments."""
        args = [changes.pop(n, v) for n, v in zip(self._names, self.args, strict=True)]
        return NetworkCall(self._run, args, {**self.kwargs, **changes}, self._names)

    def part(self, rows: list[int] | slice) -> NetworkCall:
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


def _names(forward: Callable[..., Any], args: list[Any]) -> list[str]:
    """Return what a network calls its arguments, and some name where it does not say."""
    known = inspect.signature(forward).parameters.values()
    names = [one.name for one in known if one.kind not in _OPEN][: len(args)]
    for number in range(len(names), len(args)):
        is_options = are_options(args[number])
        names.append("transformer_options" if is_options else f"argument {number}")
    return names


@contextmanager
def intercepted(call: Call, handle: Handler, *, compiled: bool) -> Iterator[None]:
    """Let `handle` run the network in one model call, inside of everything that others wrap it in.

    Most networks of the host run the wrappers of other nodes in `forward`, around `_forward`: that
    is where `handle` stands. Where there is no `_forward`, or another node has put a forward of its
    own in the network's place, it stands around `forward`.

    Args:
        call: the call of the host's model.
        handle: is given each run of the network in it.
        compiled: the network is compiled as a whole, and runs eagerly for the length of the call.
    """
    network = eager(call.model.diffusion_model)
    own = vars(network)
    name = "_forward" if hasattr(network, "_forward") and "forward" not in own else "forward"
    before, forward = own.get(name), getattr(network, name)
    setattr(network, name, lambda *args, **kwargs: handle(NetworkCall(forward, [*args], kwargs)))
    try:
        with eagerly() if compiled else nullcontext():
            yield
    finally:
        if before is None:
            delattr(network, name)
        else:
            setattr(network, name, before)
