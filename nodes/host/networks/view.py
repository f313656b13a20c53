"""What a network is to guidance: its blocks with self-attention, and how they are changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from ....seg_core import Block, Target, TokenGrid, describe_targets, select, select_heads
from ..calls.blocks import Axes, keeping_compiled
from ..calls.call import Call
from ..calls.compiled import compiled_blocks
from ..calls.site import Site
from ..settings.changes import Auto, Change, ChangeTokens, PassBy, SmoothQueries
from ..settings.perturbation import BlockPerturbation, Selection
from .entering import Carried, changed_blocks
from .span import Span

Options = dict[str, Any]
Present = Callable[[Target], int]
Measure = Callable[[slice], "Mass"]


@dataclass(frozen=True)
class Mass:
    """How much attention each token of an image drew in a block.

    Attributes:
        mass: in shares of the average, row-major over the grid.
        grid: the tokens of the image.
        patch: latent cells along a token's sides; None where the grid is stretched over the latent.
    """

    mass: torch.Tensor
    grid: TokenGrid
    patch: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Watch:
    """Somebody who looks at the self-attention of some layers.

    Attributes:
        label: whose guidance it is, in messages.
        targets: the layers.
        keep: is given the layer, how many rows its tensors have for each of the batch, and a
            function that measures rows.
    """

    label: str
    targets: tuple[Target, ...]
    keep: Callable[[Target, int, Measure], None]


class View(ABC):
    """One network; how to reach its parts is the business of its kind.

    Attributes:
        kind: what users call it.
        network: what it is the view of.
        axes: where rows are not the first axis of what goes into a block, by the argument's name.
        shared: modules whose output no perturbation reaches.
        catalogue: every block with self-attention, in forward order.
        blocks: the modules between which nothing but rows is handed on, in forward order.
        one_picture: why there are no frames to smooth over; empty if there are.
    """

    kind: str
    network: Any
    axes: Axes = MappingProxyType({})
    shared: Sequence[torch.nn.Module] = ()
    catalogue: Sequence[Block]
    blocks: Sequence[torch.nn.Module]
    one_picture: str = ""

    def look(self) -> None:
        """Note which blocks there are now: other nodes may hide them in modules of their own."""
        _ = self.catalogue, self.blocks, self.shared

    @abstractmethod
    def fork(self, target: Target) -> int:
        """Return the number of the first of `blocks` that a change of a target reaches."""

    @abstractmethod
    def module(self, target: Target) -> torch.nn.Module:
        """Return the block that a target's self-attention belongs to."""

    @abstractmethod
    def auto(self, purpose: Auto) -> Sequence[Target]:
        """Return the layers that `auto` means for a kind of change.

        Raises:
            ValueError: if there are none.
        """

    @abstractmethod
    def heads(self, target: Target) -> int | None:
        """Return the number of heads of a layer; None if it is not to be seen from outside."""

    @abstractmethod
    def carried(self, target: Target) -> Carried:
        """Return which arguments of a target's block become its result."""

    @abstractmethod
    def span(self, call: Call, tokens: int, options: Options) -> Span | None:
        """Return where the image's tokens lie among those that enter a block; None if nowhere."""

    @abstractmethod
    def frames(self, call: Call) -> int:
        """Return the number of frames that attend to each other in one call."""

    @abstractmethod
    def changed_attention(
        self,
        call: Call,
        options: Options,
        sites: list[Site],
        present: Present,
        watches: Sequence[Watch],
    ) -> AbstractContextManager[Options]:
        """Change the self-attention of some rows for the length of one call, or look at it."""

    @contextmanager
    def changed(
        self,
        call: Call,
        options: Options,
        sites: list[Site],
        present: Present,
        watches: Sequence[Watch] = (),
    ) -> Iterator[Options]:
        """Change some rows for the length of one call, and look at the attention of others.

        Args:
            call: the call of the host's model.
            options: the host's options as the network sees them; not written to.
            sites: what is changed, in which rows.
            present: the rows of the batch that are computed at a target.
            watches: who looks.

        Yields:
            The options to call the network with.
        """
        whole = [s for s in sites if isinstance(s.perturbation.change, ChangeTokens | PassBy)]
        inside = [site for site in sites if site not in whole]
        with ExitStack() as stack:
            computed = stack.enter_context(changed_blocks(self, call, whole, present))
            own = options
            if inside or watches:
                attention = self.changed_attention(call, options, inside, computed, watches)
                own = stack.enter_context(attention)
            if self.compiled:
                acting = [*(site.perturbation for site in sites), *watches]
                changed = {self.fork(target) for one in acting for target in one.targets}
                stack.enter_context(
                    keeping_compiled(self.blocks, self.compiled, changed, options, own)
                )
            yield own

    @cached_property
    def compiled(self) -> frozenset[int] | None:
        """Return which of `blocks` torch has compiled; None if it has more of the network."""
        return compiled_blocks(self.network, self.blocks)

    def obstacle(self, call: Call) -> str:
        """Return why a call cannot take more rows; empty if it can."""
        del call
        return ""

    def pointless(self, perturbation: BlockPerturbation, call: Call) -> str:
        """Return why a perturbation changes nothing in a call like this; empty if it does."""
        change = perturbation.change
        if not isinstance(change, SmoothQueries) or change.acts_over("space"):
            return ""
        if self.frames(call) > 1:
            return ""
        return "axes 'time' smooths over the frames of a video, and here there is one frame"

    def describe(self, targets: Iterable[Target]) -> str:
        """Return some of its layers in the selector language."""
        return describe_targets(targets, self.catalogue)

    def targets(self, selector: str) -> tuple[Target, ...]:
        """Return the layers whose attention a selector names.

        Raises:
            ValueError: if it names none.
        """
        return select(selector, self.catalogue, self._auto(selector, "attention"))

    def watching(self, label: str, selector: str) -> Selection:
        """Return the layers whose attention is looked at; `auto` is the first that others perturb.

        Raises:
            ValueError: if it names none.
        """
        del label
        first_only = selector.strip().lower() == "auto"
        targets = self.targets(selector)
        return Selection(tuple(self.catalogue), targets[:1] if first_only else targets)

    def perturbation(self, label: str, selector: str, change: Change) -> BlockPerturbation:
        """Return a change of selected blocks.

        Raises:
            ValueError: if the selector names none, or heads that do not exist or make no sense, or
                the change cannot be had in this network.
        """
        if isinstance(change, SmoothQueries) and change.acts_over("time") and self.one_picture:
            raise ValueError(
                f"{label}: axes {change.smooth.axes!r} smooths over the frames of a video, and "
                f"{self.one_picture}. Set axes to 'space'."
            )
        auto = self._auto(selector, change.auto)
        if change.takes_heads:
            chosen = select_heads(selector, self.catalogue, auto, self.heads)
        else:
            chosen = dict.fromkeys(select(selector, self.catalogue, auto))
        heads = {target: some for target, some in chosen.items() if some is not None}
        selection = Selection(tuple(self.catalogue), tuple(chosen), heads)
        self.require(label, selection, change)
        return BlockPerturbation(label, selection, change)

    def require(self, label: str, selection: Selection, change: Change) -> None:
        """Refuse a change that some of the layers cannot have, with a ValueError."""
        del label, selection, change

    def _auto(self, selector: str, purpose: Auto) -> Sequence[Target]:
        return self.auto(purpose) if "auto" in selector.lower() else ()
