"""Diffusion transformers: which blocks there are, where the image's tokens lie, what is reused.

What differs from family to family stands in the table; how attention is changed, beside it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NoReturn

from ...seg_core import Block, Target, describe_targets, select
from . import dit_prefix
from .call import Call
from .dit_attention import AttentionChange, see_itself, smooth_queries
from .dit_families import Family, auto_range, family_of, references
from .dit_layout import Blocks, Layout
from .dit_prefix import Fork
from .perturbation import Smooth
from .prefix import Kept

_WIDTHS = ("hidden_size", "inner_dim", "dim", "model_channels", "hidden_size_x")


class DiT:
    """The blocks of a diffusion transformer in which an image's tokens attend to each other."""

    kind = "diffusion transformer"

    def __init__(self, network: Any, family: Family) -> None:
        self.network = network
        self.family = family

    @staticmethod
    def of(network: object) -> DiT | None:
        """Return the view of a network; None if its family is not in the table.

        Raises:
            ValueError: if its family is known to be out of reach; says why.
        """
        family = family_of(network)
        if family is None:
            return None
        if family.unsupported:
            raise ValueError(
                f"{family.name} models ({type(network).__name__}) cannot be guided by perturbed "
                f"attention: {family.unsupported}."
            )
        return DiT(network, family)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Return the number of blocks in each part."""
        return {
            part: len(operator.attrgetter(path)(self.network))
            for part, path in self.family.parts.items()
        }

    @cached_property
    def catalogue(self) -> list[Block]:
        """Return every block, in forward order."""
        return [Block(part, index) for part, size in self.sizes.items() for index in range(size)]

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

    def smoothing(self, label: str, selector: str, smooth: Smooth) -> AttentionChange:
        """Return the smoothing of the image's queries in selected blocks.

        Raises:
            ValueError: as `targets`.
        """
        change = functools.partial(smooth_queries, smooth)
        return AttentionChange(label, self, self.targets(selector), change, smooth)

    def identity(self, label: str, selector: str, strength: float) -> AttentionChange:
        """Return the drawing of the image's attention in selected blocks towards the identity.

        Raises:
            ValueError: as `targets`.
        """
        change = functools.partial(see_itself, strength)
        return AttentionChange(label, self, self.targets(selector), change)

    def watching(self, label: str, selector: str) -> NoReturn:
        """Refuse: the attention of these networks is not looked at."""
        raise ValueError(
            f"{label}: a mask from attention (blocks {selector!r}) needs a UNet, and "
            f"{self.family.name} is a {self.kind}. Set mask to 'everywhere'."
        )

    def describe(self, targets: Iterable[Target]) -> str:
        """Return some of its blocks in the selector language."""
        return describe_targets(targets, self.catalogue)

    def blocks(self, call: Call) -> Blocks:
        """Return what tells the blocks of one call apart."""
        return Blocks(self.family, self.network, call, self.sizes)

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

    def fork(self, targets: tuple[Target, ...]) -> Fork:
        """Return where a pass that changes these targets first differs from the plain one."""
        first = self.catalogue[0]
        if (targets[0].part, targets[0].index) == (first.part, first.index):
            return Fork(targets[0], "the first block is perturbed")
        return Fork(targets[0], self.family.obstacle)

    def record(self, call: Call, kept: list[Kept], forks: list[Fork]) -> None:
        """Make one call keep what passes that differ from these forks on can reuse."""
        dit_prefix.record(call, kept, forks, self.family.streams)

    def replay(self, call: Call, kept: list[Kept], fork: Fork, *, last: bool) -> None:
        """Make one call begin at a fork, from what was kept."""
        blocks = [Target(block.part, block.index) for block in self.catalogue]
        before = blocks[: blocks.index(fork.target)]
        dit_prefix.replay(call, kept, fork, before, last=last)

    def prefix_bytes(self, model: Any, shape: list[int]) -> int:
        """Return a generous estimate of what is kept for one sample, in bytes."""
        if self.family.obstacle:
            return 0
        tokens = math.prod(shape[2:]) // math.prod(self.family.patch(self.network))
        if len(shape) == 3:  # packed: channels and cells in one axis
            tokens //= self.network.in_channels
        widths = (getattr(self.network, name, None) for name in _WIDTHS)
        width = next((w for w in widths if isinstance(w, int)), 4096)
        # As much again for reference images, and a long prompt.
        return (2 * tokens + 1024) * width * model.get_dtype_inference().itemsize
