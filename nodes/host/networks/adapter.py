"""What a network is to guidance: its blocks with self-attention, and how they are changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from ....seg_core import (
    Block,
    Target,
    all_targets,
    describe,
    select,
    select_heads,
    select_random,
)
from ..batch.active import ActivePerturbation
from ..batch.call import Call
from ..batch.compiled import compiled_blocks
from ..batch.network_call import Axes
from ..batch.widening import Options, running_eagerly
from ..settings.changes import Auto, Change, ChangeTokens, SkipBlock, SmoothQueries
from ..settings.errors import GuidanceError
from ..settings.perturbation import BlockPerturbation, Selection
from .attention import SaliencyRequest, Span
from .blocks import Carried, Present, changed_blocks
from .editing import AttentionEditor


class NetworkAdapter(ABC):
    """One network, with the blocks that it has now: other nodes may hide them in modules later.

    How to reach its parts is the business of its kind.

    Attributes:
        kind: what users call it.
        network: the module.
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
    def span(self, call: Call, queries: int, keys: int, options: Options) -> Span | None:
        """Return where the image's tokens lie among the queries of attention; None if nowhere."""

    @abstractmethod
    def frames(self, call: Call) -> int:
        """Return the number of frames that attend to each other in one call."""

    @abstractmethod
    def edited_attention(self, call: Call, editor: AttentionEditor) -> AbstractContextManager[None]:
        """Change the self-attention of some rows for the length of one call, or measure it."""

    @contextmanager
    def changed(
        self,
        call: Call,
        active: Sequence[ActivePerturbation],
        present: Present,
        measured: Sequence[SaliencyRequest] = (),
    ) -> Iterator[None]:
        """Change some rows for the length of one call, and measure the attention of others.

        Args:
            call: the call of the host's model, with the options that its network is given.
            active: what is changed, in which rows.
            present: the rows of the batch that are computed at a target.
            measured: for whom the attention that tokens draw is measured.
        """
        whole = [a for a in active if isinstance(a.perturbation.change, ChangeTokens | SkipBlock)]
        inside = [one for one in active if one not in whole]
        with ExitStack() as stack:
            if self.compiled:
                acting = [*(one.perturbation for one in active), *measured]
                changed = {self.fork(target) for one in acting for target in one.targets}
                eager = [self.blocks[number] for number in sorted(changed & self.compiled)]
                stack.enter_context(running_eagerly(eager))
            computed = stack.enter_context(changed_blocks(self, call, whole, present))
            editor = AttentionEditor(inside, computed, measured)
            stack.enter_context(self.edited_attention(call, editor))
            yield

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
        smooth = perturbation.smooth
        if smooth is None or "space" in smooth.axes or self.frames(call) > 1:
            return ""
        return "axes 'time' smooths over the frames of a video, and here there is one frame"

    def saliency_source(self, selector: str) -> Selection:
        """Return the layers whose attention is measured; `auto` is the first that others perturb.

        Raises:
            ValueError: if it names none.
        """
        targets = select(selector, self.catalogue, self._auto(selector, "attention"))
        first_only = selector.strip(", \n").lower() == "auto"
        return Selection(self.catalogue, dict.fromkeys(targets[:1] if first_only else targets))

    def perturbation(self, label: str, selector: str, change: Change) -> BlockPerturbation:
        """Return a change of selected blocks.

        Raises:
            ValueError: if the selector names none, or heads that do not exist or make no sense, or
                the change cannot be had in this network.
        """
        if isinstance(change, SmoothQueries) and "time" in change.axes and self.one_picture:
            raise GuidanceError(
                f"{label}: axes {change.axes!r} smooths over the frames of a video, and "
                f"{self.one_picture}. Set axes to 'space'."
            )
        heads, drawn = self._chosen(selector, change)
        perturbation = BlockPerturbation(self.catalogue, heads, label, change, drawn)
        lacking = [target for target in heads if self._lack(change, target)]
        if lacking:
            raise GuidanceError(
                f"{label}: {self._lack(change, lacking[0])} block {perturbation.name(lacking)} of "
                f"{self.kind}. Choose other blocks of {describe(self.catalogue)}."
            )
        return perturbation

    def _chosen(
        self, selector: str, change: Change
    ) -> tuple[Mapping[Target, tuple[int, ...] | None], int]:
        """Return the layers that a selector names, with their heads, and how many are drawn."""
        auto = self._auto(selector, change.auto)
        if change.auto == "attention":
            return select_heads(selector, self.catalogue, auto, self.heads), 0
        if change.auto == "skip":
            pool = [t for t in all_targets(self.catalogue) if not self._lack(change, t)]
            random = select_random(selector, self.catalogue, pool, auto)
            if random is not None:
                return dict.fromkeys(random[0]), random[1]
        return dict.fromkeys(select(selector, self.catalogue, auto)), 0

    def _lack(self, change: Change, target: Target) -> str:
        """Return why a change cannot act on a block, before its name; empty if it can."""
        if isinstance(change, ChangeTokens) and self.carried(target).image is None:
            return "the image's tokens do not enter"
        if isinstance(change, SkipBlock) and not self.carried(target).names:
            return "it is not known how to skip"
        return ""

    def _auto(self, selector: str, purpose: Auto) -> Sequence[Target]:
        return self.auto(purpose) if "auto" in selector.lower() else ()
