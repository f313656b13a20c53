"""Blocks that are skipped, or entered by other tokens, in some rows of one call.

For the length of the call such a block has another `forward`, inside of all hooks on it: so it is
given the rows that are computed there, and its output is widened again outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch

from ....seg_core import Target, all_targets
from ..batch.active import ActivePerturbation, row_groups
from ..batch.call import Call
from ..batch.compiled import eager
from ..batch.network_call import NetworkCall, are_options
from ..batch.trees import map_tensors, merged, tensors_in
from ..batch.widening import OUTPUT
from ..settings.changes import ChangeTokens, SkipBlock
from .span import Span

Present = Callable[[Target], int]


@dataclass(frozen=True)
class Carried:
    """What goes through a block: in as arguments, out as its result.

    Attributes:
        names: the arguments that become the result, in its order; see `NetworkCall`.
        image: which of them holds the image's tokens; None if none does.
    """

    names: tuple[str, ...]
    image: str | None


@contextmanager
def changed_blocks(
    network: Any, call: Call, active: Sequence[ActivePerturbation], present: Present
) -> Iterator[Present]:
    """Change what enters some blocks, or skip them, for the length of one call.

    Yields:
        The rows of the batch that are computed inside of a target.
    """
    blocks: dict[Target, ChangedBlock] = {}
    with ExitStack() as stack:
        for target in dict.fromkeys(t for one in active for t in one.perturbation.targets):
            here = [one for one in active if target in one.perturbation.targets]
            blocks[target] = ChangedBlock(network, call, target, here, present(target))
            module = eager(network.module(target))
            stack.enter_context(_with_forward(module, blocks[target]))
        yield lambda target: blocks[target].inside if target in blocks else present(target)


class ChangedBlock:
    """One block: which rows skip it, and what enters it in the others.

    Attributes:
        inside: the rows of the batch that it computes: all but those at the end that skip it.
    """

    def __init__(
        self,
        network: Any,
        call: Call,
        target: Target,
        active: list[ActivePerturbation],
        present: int,
    ) -> None:
        self._network = network
        self._call = call
        self._target = target
        self._active = active
        self._present = present
        self._axis = network.axes.get(OUTPUT) or 0
        self.inside = present
        for group in reversed(row_groups(active, present, present)):
            if not any(map(_skips, group.active)):
                break
            self.inside = group.rows.start

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        block = NetworkCall(forward, [*args], kwargs)
        carried = self._network.carried(self._target)
        through = tuple(block.arguments[name] for name in carried.names)
        if carried.image is not None:
            block = self._rearranged(block, carried.image)
        skipping = [one for one in self._active if _skips(one)]
        for one in skipping:
            one.reached.add(self._target)
        if not skipping:
            return block.run()
        before: Any = through if len(through) > 1 else next(iter(through))
        if not self.inside:
            return before
        if self.inside < self._present:
            block = self._narrowed(block, next(tensors_in(before)).shape[self._axis])
        else:  # blocks may write into what they are given
            before = map_tensors(torch.clone, before)
        return merged(self._joined, before, block.run())

    def _narrowed(self, block: NetworkCall, size: int) -> NetworkCall:
        """Return the block with the rows that it computes, of tensors with `size` rows."""

        def narrow(tensor: torch.Tensor, axis: int) -> torch.Tensor:
            if tensor.ndim <= axis or tensor.shape[axis] != size:
                return tensor
            return tensor.narrow(axis, 0, self.inside * size // self._present)

        block = block.with_rows(narrow, self._network.axes)
        options = {name: v for name, v in block.arguments.items() if are_options(v)}
        return block.replaced(**{name: self._labelled(v) for name, v in options.items()})

    def _labelled(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the host's options with the labels of the rows that are computed."""
        labels = {n: options[n] for n in ("cond_or_uncond", "uuids") if n in options}
        few = {n: of[: len(of) * self.inside // self._present] for n, of in labels.items()}
        return {**options, **few}

    def _joined(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Return a result with the rows that skipped the block."""
        pieces = []
        for group in row_groups(self._active, self._present, before.shape[self._axis]):
            rows = group.rows
            source = before.to(after.dtype) if any(map(_skips, group.active)) else after
            pieces.append(source.narrow(self._axis, rows.start, rows.stop - rows.start))
        return torch.cat(pieces, dim=self._axis)

    def _rearranged(self, block: NetworkCall, name: str) -> NetworkCall:
        """Return the block with the image's tokens, in the argument `name`, rearranged."""
        active = [a for a in self._active if isinstance(a.perturbation.change, ChangeTokens)]
        if not active:
            return block
        given = block.arguments.values()
        options = next((one for one in given if are_options(one)), self._call.options)
        axis = self._network.axes.get(name) or 0
        value = block.arguments[name]
        first = next(tensors_in(value))  # of sound and pictures together, the pictures
        tokens = first.movedim(axis, 0)
        rows = tokens.flatten(1, -2)
        span = self._network.span(self._call, rows.shape[1], rows.shape[1], options)
        if span is None:
            return block
        rows = rows.clone()
        for group in row_groups(active, self._present, rows.shape[0]):
            for one in group.active:
                self._rearrange(one, span.view(rows[group.rows], 1), span)
        moved = rows.reshape(tokens.shape).movedim(0, axis)
        changed = map_tensors(lambda tensor: moved if tensor is first else tensor, value)
        return block.replaced(**{name: changed})

    def _rearrange(self, one: ActivePerturbation, image: torch.Tensor, span: Span) -> None:
        """Rearrange an image's tokens in place, frame by frame."""
        change = one.perturbation.change
        assert isinstance(change, ChangeTokens)
        layer = list(all_targets(self._network.catalogue)).index(self._target)
        frames = image.reshape(-1, span.grid.cells, image.shape[-1])
        image.copy_(change.rearrange(frames, one.seed, one.step, layer).reshape(image.shape))
        one.reached.add(self._target)


def _skips(one: ActivePerturbation) -> bool:
    return isinstance(one.perturbation.change, SkipBlock)


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
