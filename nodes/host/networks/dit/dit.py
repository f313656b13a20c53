"""Diffusion transformers: which blocks there are, and where the image's tokens lie.

What differs from family to family stands in the table; how attention is changed, beside it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch

from .....seg_core import Block, Target, all_targets
from ...calls.call import Call
from ...calls.site import Site
from ...settings.changes import Auto, Change, ChangeTokens, PassBy
from ...settings.perturbation import Selection
from ..entering import Carried
from ..span import Span
from ..view import Options, Present, View, Watch
from .attention import changed_attention
from .families import Family, auto_range
from .grids import references
from .known import family_of
from .layout import Layout

_HEADS = ("num_heads", "n_heads", "heads", "n_local_heads", "num_attention_heads")


class DiT(View):
    """The blocks of a diffusion transformer in which an image's tokens attend to each other."""

    kind = "diffusion transformer"

    def __init__(self, network: Any, family: Family, *, video: bool = False) -> None:
        self.network = network
        self.video = video
        self.family = family
        self.axes = family.axes

    @staticmethod
    def of(network: object, model: object) -> DiT | None:
        """Return the view of a model's network; None if its family is not in the table.

        Raises:
            ValueError: if its family is known to be out of reach; says why.
        """
        family = family_of(network, model)
        if family is None:
            return None
        if family.unsupported:
            raise ValueError(
                f"{family.name} models ({type(network).__name__}) cannot be guided by perturbed "
                f"attention: {family.unsupported}."
            )
        dimensions = getattr(getattr(model, "latent_format", None), "latent_dimensions", 2)
        return DiT(network, family, video=family.video and dimensions > 2)

    @cached_property
    def catalogue(self) -> list[Block]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return every block, in forward order."""
        return [
            Block(part, index)
            for part, path in self.family.parts.items()
            for index in range(len(operator.attrgetter(path)(self.network)))
        ]

    @cached_property
    def shared(self) -> list[torch.nn.Module]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the modules of the family's `shared`, as far as the network has them."""
        found = [getattr(self.network, name, None) for name in self.family.shared]
        modules = [m if isinstance(m, torch.nn.ModuleList) else [m] for m in found if m is not None]
        return [module for several in modules for module in several]

    @cached_property
    def blocks(self) -> list[torch.nn.Module]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the modules of all blocks, in forward order."""
        lists = [operator.attrgetter(path)(self.network) for path in self.family.parts.values()]
        return [
            block
            for blocks in lists
            for block in (blocks.values() if isinstance(blocks, torch.nn.ModuleDict) else blocks)
        ]

    def fork(self, target: Target) -> int:
        """Return the number of a target's block."""
        return self.catalogue.index(Block(target.part, target.index))

    def module(self, target: Target) -> torch.nn.Module:
        """Return a target's block."""
        return self.blocks[self.fork(target)]

    def auto(self, purpose: Auto) -> Sequence[Target]:
        """Return a middle range of the depth, or the blocks that are usually skipped."""
        depth = len(self.catalogue)
        usual = [number for number in self.family.skip if number < depth]
        skips = purpose == "skip" and usual and len(usual) == len(self.family.skip)
        numbers = usual if skips else auto_range(self.family, depth)
        return [Target(self.catalogue[n].part, self.catalogue[n].index) for n in numbers]

    def heads(self, target: Target) -> int | None:
        """Return the number of heads of a block, by the names that networks give it."""
        modules = [vars(module) for module in self.module(target).modules()]
        found = (space[name] for space in modules for name in _HEADS if name in space)
        return next((count for count in found if isinstance(count, int)), None)

    @property
    def one_picture(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return why there are no frames to smooth over; empty if there are."""
        if self.video:
            return ""
        return f"{self.family.name} makes single pictures"

    def frames(self, call: Call) -> int:
        """Return the number of frames that attend to each other in one call."""
        return self.layout(call).grid.frames

    def carried(self, target: Target) -> Carried:
        """Return which arguments of a target's block become its result."""
        return self.family.carried.get(target.part, Carried((), None))

    def span(self, call: Call, tokens: int, options: Options) -> Span | None:
        """Return where the image's tokens lie among those that enter a block; None if nowhere."""
        return self.layout(call).find(tokens, tokens, options)

    def require(self, label: str, selection: Selection, change: Change) -> None:
        """Refuse other tokens for blocks through which the image's do not go."""
        shuffled = isinstance(change, ChangeTokens)
        if not shuffled and not isinstance(change, PassBy):
            return
        carried = {target: self.carried(target) for target in selection.targets}
        lacking = [t for t, c in carried.items() if not c.names or (shuffled and c.image is None)]
        if lacking:
            what = "the image's tokens do not enter" if shuffled else "it is not known how to pass"
            raise ValueError(
                f"{label}: {what} block {selection.name(lacking)} of {self.family.name}. Choose "
                f"other blocks of {self.describe(all_targets(self.catalogue))}."
            )

    def obstacle(self, call: Call) -> str:
        """Return why a call cannot take more rows; empty if it can."""
        return self.family.obstacle(call)

    def layout(self, call: Call) -> Layout:
        """Return where one call keeps the image's tokens."""
        family, network = self.family, self.network
        patch = family.patch(network)
        grid = family.grid(network, call, patch)
        return Layout(
            family,
            grid,
            family.beside(network, call, grid),
            family.row(network, call, grid),
            patch,
            references(call, patch) if family.references else 0,
        )

    def changed_attention(
        self,
        call: Call,
        options: Options,
        sites: list[Site],
        present: Present,
        watches: Sequence[Watch],
    ) -> AbstractContextManager[Options]:
        """Change the self-attention of some rows for the length of one call, or look at it."""
        targets = [t for site in sites for t in site.perturbation.targets]
        targets += [t for watch in watches for t in watch.targets]
        return changed_attention(
            {target: self.module(target) for target in dict.fromkeys(targets)},
            self.layout(call),
            options,
            sites,
            present,
            watches,
        )
