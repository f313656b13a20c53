"""Blocks that are passed over, or entered by other tokens, in some rows of one call.

For the length of the call such a block has another `forward`, inside of all hooks on it: so it is
given the rows that are computed there, and what it gives is widened again outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch

from ....seg_core import Target
from ..calls.blocks import OUTPUT, are_options, map_rows, names_of
from ..calls.call import Call
from ..calls.compiled import eager
from ..calls.site import Site, parts_of
from ..calls.trees import map_tensors, merged, tensors_in
from ..settings.changes import ChangeTokens, PassBy
from .span import Span

Present = Callable[[Target], int]
Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Carried:
    """What goes through a block: in as arguments, out as its result.

    Attributes:
        names: the arguments that become the result, in its order; numbers are positions.
        image: which of them holds the image's tokens; None if none does.
    """

    names: tuple[str | int, ...]
    image: str | int | None


@contextmanager
def changed_blocks(
    view: Any, call: Call, sites: Sequence[Site], present: Present
) -> Iterator[Present]:
    """Change what enters some blocks, or pass them over, for the length of one call.

    Yields:
        The rows of the batch that are computed inside of a target.
    """
    blocks: dict[Target, Entering] = {}
    with ExitStack() as stack:
        for target in dict.fromkeys(t for site in sites for t in site.perturbation.targets):
            here = [site for site in sites if target in site.perturbation.targets]
            blocks[target] = Entering(view, call, target, here, present(target))
            module = eager(view.module(target))
            stack.enter_context(_with_forward(module, blocks[target]))
        yield lambda target: blocks[target].inside if target in blocks else present(target)


class Entering:
    """One block: which rows pass it by, and what enters it in the others.

    Attributes:
        inside: the rows of the batch that it computes: all but those at the end that pass it by.
    """

    def __init__(
        self, view: Any, call: Call, target: Target, sites: list[Site], present: int
    ) -> None:
        self._view = view
        self._call = call
        self._target = target
        self._sites = sites
        self._present = present
        self.inside = present
        for part in reversed(parts_of(sites, present, present)):
            if not any(_passes(site) for site in part.sites):
                break
            self.inside = part.rows.start

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        carried = self._view.carried(self._target)
        named = {**dict(enumerate(args)), **dict(zip(names_of(forward), args, strict=False))}
        named.update(kwargs)
        through = [named[name] for name in carried.names]
        if carried.image is not None:
            image = self._rearranged(named[carried.image], carried.image, named)
            args, kwargs = _with_argument(carried.image, image, forward, args, kwargs)
        passing = [site for site in self._sites if _passes(site)]
        for site in passing:
            site.reached.add(self._target)
        if not passing:
            return forward(*args, **kwargs)
        before = tuple(through) if len(through) > 1 else through[0]
        if not self.inside:
            return before
        if self.inside == self._present:  # blocks may write into what they are given
            before = map_tensors(torch.clone, before)
        return merged(self._joined, before, self._inside(forward, before, args, kwargs))

    def _inside(
        self, forward: Callable[..., Any], before: Any, args: tuple[Any, ...], kwargs: Kwargs
    ) -> Any:
        """Return the block's result for the rows that it computes."""
        axes = self._view.axes
        size = next(tensors_in(before)).shape[axes.get(OUTPUT) or 0]

        def narrow(tensor: torch.Tensor, axis: int) -> torch.Tensor:
            if tensor.ndim <= axis or tensor.shape[axis] != size:
                return tensor
            return tensor.narrow(axis, 0, self.inside * size // self._present)

        if self.inside < self._present:
            args, kwargs = map_rows(narrow, forward, axes, args, kwargs)
            args = tuple(self._labelled(value) for value in args)
            kwargs = {name: self._labelled(value) for name, value in kwargs.items()}
        return forward(*args, **kwargs)

    def _labelled(self, value: Any) -> Any:
        """Return the host's options with the labels of the rows that are computed."""
        if not are_options(value):
            return value
        names = [name for name in ("cond_or_uncond", "uuids") if name in value]
        counts = {n: len(value[n]) * self.inside // self._present for n in names}
        return {**value, **{name: value[name][:count] for name, count in counts.items()}}

    def _joined(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Return a result with the rows that passed the block by."""
        axis = self._view.axes.get(OUTPUT) or 0
        pieces = []
        for part in parts_of(self._sites, self._present, before.shape[axis]):
            passes = any(_passes(site) for site in part.sites)
            source = before.to(after.dtype) if passes else after
            pieces.append(source.narrow(axis, part.rows.start, part.rows.stop - part.rows.start))
        return torch.cat(pieces, dim=axis)

    def _rearranged(self, value: Any, name: str | int, named: dict[Any, Any]) -> Any:
        """Return the argument with the image's tokens, in another order where asked."""
        sites = [s for s in self._sites if isinstance(s.perturbation.change, ChangeTokens)]
        if not sites:
            return value
        options = next((v for v in named.values() if are_options(v)), self._call.options)
        axis = self._view.axes.get(str(name)) or 0
        first = next(tensors_in(value))  # of sound and pictures together, the pictures
        tokens = first.movedim(axis, 0)
        rows = tokens.flatten(1, -2)
        span = self._view.span(self._call, rows.shape[1], options)
        if span is None:
            return value
        pieces = []
        for part in parts_of(sites, self._present, rows.shape[0]):
            piece = rows[part.rows]
            for site in part.sites:
                piece = self._moved(site, piece, span)
                site.reached.add(self._target)
            pieces.append(piece)
        moved = torch.cat(pieces).reshape(tokens.shape).movedim(0, axis)
        return map_tensors(lambda tensor: moved if tensor is first else tensor, value)

    def _moved(self, site: Site, rows: torch.Tensor, span: Span) -> torch.Tensor:
        change = site.perturbation.change
        assert isinstance(change, ChangeTokens)
        rows = rows.clone()
        image = span.view(rows, 1)
        frames = image.reshape(-1, span.grid.cells, image.shape[-1])
        layer = self._layer()
        image.copy_(change.rearrange(frames, site.seed, site.step, layer).reshape(image.shape))
        return rows

    def _layer(self) -> int:
        """Return the number of the layer in the whole network."""
        own, before = self._target, 0
        for block in self._view.catalogue:
            if (block.part, block.index) == (own.part, own.index):
                break
            before += block.transformers
        return before + own.transformer


def _passes(site: Site) -> bool:
    return isinstance(site.perturbation.change, PassBy)


def _with_argument(
    name: str | int, value: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Kwargs
) -> tuple[tuple[Any, ...], Kwargs]:
    """Return arguments of which one is exchanged, by its name or its position."""
    if name in kwargs:
        return args, {**kwargs, str(name): value}
    place = name if isinstance(name, int) else names_of(forward).index(name)
    return (*args[:place], value, *args[place + 1 :]), kwargs


@contextmanager
def _with_forward(module: torch.nn.Module, instead: Callable[..., Any]) -> Iterator[None]:
    """Let a module run `instead(forward, ...)` for the length of one call."""
    own = module.__dict__.get("forward")
    module.forward = update_wrapper(partial(instead, module.forward), module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
