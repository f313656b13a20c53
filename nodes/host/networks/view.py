"""What a network is to guidance: its blocks with self-attention, and how that is changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ....seg_core import Block, Target, TokenGrid, describe_targets
from ..calls.call import Call
from ..calls.site import Site
from ..settings.changes import Change, SeeItself, Smooth, SmoothQueries
from ..settings.perturbation import BlockPerturbation, Selection

Options = dict[str, Any]
Keep = Callable[[Target, torch.Tensor, torch.Tensor, int, TokenGrid], None]
Present = Callable[[Target], int]


class View(ABC):
    """One network; how to reach its parts is the business of its kind.

    Attributes:
        kind: what users call it.
        axes: where rows are not the first axis of what goes into a block, by the argument's name.
        shared: modules whose output no perturbation reaches.
        catalogue: every block with self-attention, in forward order.
        blocks: the modules between which nothing but rows is handed on, in forward order.
    """

    kind: str
    axes: Mapping[str, int] = {}
    shared: Sequence[torch.nn.Module] = ()
    catalogue: Sequence[Block]
    blocks: Sequence[torch.nn.Module]

    @abstractmethod
    def fork(self, target: Target) -> int:
        """Return the number of the first of `blocks` that a change of a target reaches."""

    @abstractmethod
    def targets(self, selector: str) -> tuple[Target, ...]:
        """Return the self-attention layers that a selector names.

        Raises:
            ValueError: if it names none.
        """

    @abstractmethod
    def watching(self, label: str, selector: str) -> Selection:
        """Return the layers whose attention is looked at.

        Raises:
            ValueError: as `targets`, or if attention cannot be looked at.
        """

    @abstractmethod
    def changed(
        self, call: Call, options: Options, sites: list[Site], present: Present
    ) -> AbstractContextManager[Options]:
        """Change the attention of some rows for the length of one call.

        Args:
            call: the call of the host's model.
            options: the host's options as the network sees them; not written to.
            sites: what is changed, in which rows.
            present: the rows of the batch that are computed at a target.

        Returns:
            The options to call the network with.
        """

    @abstractmethod
    def watched(
        self, options: Options, label: str, targets: tuple[Target, ...], keep: Keep
    ) -> AbstractContextManager[Options]:
        """Show `keep` the queries and keys of some self-attentions in one call."""

    def obstacle(self, call: Call) -> str:
        """Return why a call cannot take more rows; empty if it can."""
        del call
        return ""

    def describe(self, targets: Iterable[Target]) -> str:
        """Return some of its layers in the selector language."""
        return describe_targets(targets, self.catalogue)

    def smoothing(self, label: str, selector: str, smooth: Smooth) -> BlockPerturbation:
        """Return the smoothing of the queries of selected blocks; raises as `targets`."""
        return self._perturbation(label, selector, SmoothQueries(smooth))

    def identity(self, label: str, selector: str, strength: float) -> BlockPerturbation:
        """Return the drawing of their attention maps to the identity; raises as `targets`."""
        return self._perturbation(label, selector, SeeItself(strength))

    def _perturbation(self, label: str, selector: str, change: Change) -> BlockPerturbation:
        selection = Selection(tuple(self.catalogue), self.targets(selector))
        return BlockPerturbation(label, selection, change)
