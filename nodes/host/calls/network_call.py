"""The innermost step of a model call: the network's own forward, with its arguments by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from .blocks import are_options
from .call import KEY, Call
from .code import codes_of
from .compiled import eager, eagerly
from .trees import map_tensors

Handler = Callable[["NetworkCall"], Any]
_INNERMOST = WrappersMP.DIFFUSION_MODEL
_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class NetworkCall:
    """One run of a network: what it is given, and how to run it."""

    def __init__(
        self,
        run: Callable[..., Any],
        args: list[Any],
        kwargs: dict[str, Any],
        names: list[str] | None = None,
    ) -> None:
        self._run = run
        self._names = _names(getattr(run, "original", run), args) if names is None else names
        self._args = args
        self._kwargs = kwargs

    def run(self) -> Any:
        """Run the network."""
        return self._run(*self._args, **self._kwargs)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments by name."""
        return {**dict(zip(self._names, self._args, strict=True)), **self._kwargs}

    @property
    def options(self) -> dict[str, Any]:
        """Return the host's options, as the network sees them."""
        return self.arguments["transformer_options"]

    @property
    def rows(self) -> int:
        """Return the rows of the batch."""
        x = self.arguments[self._names[0]] if self._names else next(iter(self._kwargs.values()))
        return (x if torch.is_tensor(x) else x[0]).shape[0]

    def replaced(self, **changes: Any) -> NetworkCall:
        """Return the same call with other arguments."""
        args = [changes.pop(n, v) for n, v in zip(self._names, self._args, strict=True)]
        return NetworkCall(self._run, args, {**self._kwargs, **changes}, self._names)

    def part(self, rows: list[int] | slice) -> NetworkCall:
        """Return the same call for some rows of its batch."""
        batch = self.rows
        return self.mapped(lambda t: t[rows] if t.ndim and t.shape[0] == batch else t)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> NetworkCall:
        """Return the same call with every tensor but those in the host's options changed."""
        options = "transformer_options"
        changed = {n: map_tensors(change, v) for n, v in self.arguments.items() if n != options}
        return self.replaced(**changed)


def _names(forward: Callable[..., Any], args: list[Any]) -> list[str]:
    """Return what a network calls its arguments, and some name where it does not say."""
    known = inspect.signature(forward).parameters.values()
    names = [one.name for one in known if one.kind not in _OPEN][: len(args)]
    for number in range(len(names), len(args)):
        is_options = are_options(args[number])
        names.append("transformer_options" if is_options else f"argument {number}")
    return names


@contextmanager
def handled(call: Call, handle: Handler, *, compiled: bool) -> Iterator[None]:
    """Let `handle` run the network in one model call, inside of everything that others wrap it in.

    A compiled network runs as it was before.

    Most networks of the host run its wrappers around their forward, and ours is then the innermost.
    Those that run none are given another `forward` for the length of the call.
    """
    with eagerly() if compiled else nullcontext(), _intercepted(call, handle):
        yield


@contextmanager
def _intercepted(call: Call, handle: Handler) -> Iterator[None]:
    network = eager(call.model.diffusion_model)
    if _runs_wrappers(network):
        before = call.options
        wrappers = dict(before.get("wrappers", {}))
        others = {k: fns for k, fns in wrappers.get(_INNERMOST, {}).items() if k != KEY}

        def innermost(executor: Any, *args: Any, **kwargs: Any) -> Any:
            return handle(NetworkCall(executor, list(args), kwargs))

        wrappers[_INNERMOST] = {**others, KEY: [innermost]}
        call.options = {**before, "wrappers": wrappers}
        try:
            yield
        finally:
            call.options = before  # or the call would hold itself, through what handles it
        return
    own = network.__dict__.get("forward")
    forward = network.forward
    network.forward = lambda *args, **kwargs: handle(NetworkCall(forward, list(args), kwargs))
    try:
        yield
    finally:
        if own is None:
            del network.forward
        else:
            network.forward = own


def _runs_wrappers(network: Any) -> bool:
    """Tell whether a network's forward runs the host's wrappers, by the names in its code.

    Where another node has put a forward of its own in its place, that one counts, and whatever it
    holds on to: it may run the network's own.
    """
    own = vars(network).get("forward")
    inherited = [vars(cls)["forward"] for cls in type(network).__mro__ if "forward" in vars(cls)]
    found = inherited if own is None else [own]
    return any(_INNERMOST.upper() in code.co_names for code in codes_of(*found))
