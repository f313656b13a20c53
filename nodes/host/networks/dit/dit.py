"""Diffusion transformers: which blocks there are, and where the image's tokens lie.

What differs from family to family stands in the table; how attention is changed, beside it.
"""

from __future__ import annotations

import operator
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, NoReturn

import torch

from .....seg_core import Block, Target, select
from ...calls.call import Call
from ...calls.site import Site
from ..view import Keep, Options, Present, View
from .attention import changed_attention
from .families import Family, auto_range, references
from .known import family_of
from .layout import Layout


class DiT(View):
    """The blocks of a diffusion transformer in which an image's tokens attend to each other."""

    kind = "diffusion transformer"

    def __init__(self, network: Any, family: Family) -> None:
        self.network = network
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
        return DiT(network, family)

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

    def targets(self, selector: str) -> tuple[Target, ...]:
        """Return the blocks that a selector names; `auto` is a middle range of the depth.

        Raises:
            ValueError: if it names none.
        """
        auto = [
            Target(self.catalogue[n].part, self.catalogue[n].index)
            for n in auto_range(self.family, len(self.catalogue))
        ]
        return select(selector, self.catalogue, auto)

    def watching(self, label: str, selector: str) -> NoReturn:
        """Refuse: the attention of these networks is not looked at."""
        raise ValueError(
            f"{label}: a mask from attention (blocks {selector!r}) needs a UNet, and "
            f"{self.family.name} is a {self.kind}. Set mask to 'everywhere'."
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
            references(call, patch) if family.references else 0,
        )

    def changed(
        self, call: Call, options: Options, sites: list[Site], present: Present
    ) -> AbstractContextManager[Options]:
        """Change the attention of some rows for the length of one call."""
        modules = {
            t: self.blocks[self.fork(t)] for site in sites for t in site.perturbation.targets
        }
        return changed_attention(
            modules, self.layout(call), options, sites, present, first_only=self.family.first_only
        )

    def watched(
        self, options: Options, label: str, targets: tuple[Target, ...], keep: Keep
    ) -> AbstractContextManager[Options]:
        """Refuse, as `watching` does."""
        del options, targets, keep
        self.watching(label, "")
