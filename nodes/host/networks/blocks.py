"""Blocks that are skipped, or entered by other tokens, in some rows of one call.

For the length of the call such a block has another `forward`, inside of all hooks on it: so it is
given the rows that are computed there, and its output is widened again outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ....seg_core import Target, all_targets
from ..batch.active import ActivePerturbation, RowGroup, row_groups
from ..batch.call import Call
from ..batch.compiled import eager
from ..batch.network_call import NetworkCall, are_options, exchanged
from ..batch.rows import first_rows
from ..batch.trees import map_tensors, merged, tensors_in
from ..batch.widening import OUTPUT
from ..settings.changes import ChangeTokens, SkipBlock

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
            stack.enter_context(exchanged(module, "forward", blocks[target]))
        yield lambda target: blocks[target].inside if target in blocks else present(target)


@dataclass
class ChangedBlock:
    """One block: which rows skip it, and what enters it in the others.

    Attributes:
        present: the rows of the batch that get to it.
    """

    network: Any
    call: Call
    target: Target
    active: list[ActivePerturbation]
    present: int

    @property
    def axis(self) -> int:
        """Return the axis of the rows of what goes through it."""
        return self.network.axes.get(OUTPUT) or 0

    @property
    def inside(self) -> int:
        """Return how many of the rows it computes: all but those at the end that skip it."""
        groups = row_groups(self.active, self.present, self.present)
        return max((group.rows.stop for group in groups if not _is_skipped(group)), default=0)

    def __call__(self, block: NetworkCall) -> Any:
        """Run the block."""
        carried = self.network.carried(self.target)
        through = [block.arguments[name] for name in carried.names]
        if carried.image is not None:
            block = self._rearranged(block, carried.image)
        skipping = [one for one in self.active if _skips(one)]
        for one in skipping:
            one.reached.add(self.target)
        if not skipping:
            return block.run()
        before = tuple(through) if len(through) > 1 else through[0]
        if not self.inside:
            return before
        if self.inside < self.present:
            block = self._narrowed(block, next(tensors_in(before)).shape[self.axis])
        before = map_tensors(torch.clone, before)  # blocks may write into what they are given
        return merged(self._joined, before, block.run())

    def _narrowed(self, block: NetworkCall, size: int) -> NetworkCall:
        """Return the block with the rows that it computes, of tensors with `size` rows."""

        def few(count: int) -> int:
            return count * self.inside // self.present

        def labelled(options: dict[str, Any]) -> dict[str, Any]:
            labels = {n: options[n] for n in ("cond_or_uncond", "uuids") if n in options}
            return {**options, **{n: of[: few(len(of))] for n, of in labels.items()}}

        block = block.with_rows(
            lambda tensor, axis: first_rows(tensor, axis, size, few(size)), self.network.axes
        )
        options = {name: labelled(v) for name, v in block.arguments.items() if are_options(v)}
        return block.replaced(**options)

    def _joined(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Return a result with the rows that skipped the block."""
        pieces = []
        for group in row_groups(self.active, self.present, before.shape[self.axis]):
            rows = group.rows
            source = before.to(after.dtype) if _is_skipped(group) else after
            pieces.append(source.narrow(self.axis, rows.start, rows.stop - rows.start))
        return torch.cat(pieces, dim=self.axis)

    def _rearranged(self, block: NetworkCall, name: str) -> NetworkCall:
        """Return the block with the image's tokens, in the argument `name`, rearranged by frame."""
        active = [a for a in self.active if isinstance(a.perturbation.change, ChangeTokens)]
        if not active:
            return block
        given = block.arguments.values()
        options = next((one for one in given if are_options(one)), self.call.options)
        axis = self.network.axes.get(name) or 0
        value = block.arguments[name]
        first = next(tensors_in(value))  # of sound and pictures together, the pictures
        tokens = first.movedim(axis, 0)
        rows = tokens.flatten(1, -2).clone()
        span = self.network.span(self.call, rows.shape[1], rows.shape[1], options)
        if span is None:
            return block
        layer = list(all_targets(self.network.catalogue)).index(self.target)
        for group in row_groups(active, self.present, rows.shape[0]):
            for one in group.active:
                change = one.perturbation.change
                assert isinstance(change, ChangeTokens)
                image = span.view(rows[group.rows], 1)
                frames = image.reshape(-1, span.grid.cells, image.shape[-1])
                other = change.rearrange(frames, one.seed, one.step, layer)
                image.copy_(other.reshape(image.shape))
                one.reached.add(self.target)
        moved = rows.reshape(tokens.shape).movedim(0, axis)
        changed = map_tensors(lambda tensor: moved if tensor is first else tensor, value)
        return block.replaced(**{name: changed})


def _skips(one: ActivePerturbation) -> bool:
    return isinstance(one.perturbation.change, SkipBlock)


def _is_skipped(group: RowGroup) -> bool:
    return any(map(_skips, group.active))
