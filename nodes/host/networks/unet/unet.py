"""UNet: which self-attention blocks there are, and in which order its layers run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from .....seg_core import Block, Target, describe, select
from ...calls.call import Call
from ...calls.compiled import eager
from ...calls.site import Site
from ...settings.perturbation import Selection
from ..view import Keep, Options, Present, View
from .attention import changed_attention, watched_attention


class UNet(View):
    """The blocks of a `UNetModel` that hold self-attention over an image's tokens."""

    kind = "UNet"

    def __init__(self, network: UNetModel) -> None:
        self.network = network

    @staticmethod
    def is_one(network: object) -> bool:
        """Tell whether a network is of this kind, whatever other nodes made of its class."""
        parts = ("input_blocks", "middle_block", "output_blocks", "time_embed", "out")
        return isinstance(network, UNetModel) or all(hasattr(network, part) for part in parts)

    @property
    def parts(self) -> dict[str, Any]:
        """Return the parts in forward order, each a sequence of blocks of layers."""
        middle = self.network.middle_block
        return {
            "input": self.network.input_blocks,
            "middle": [] if middle is None else [middle],
            "output": self.network.output_blocks,
        }

    @cached_property
    def catalogue(self) -> list[Block]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return every block with self-attention, in forward order."""
        return [
            Block(part, index, len(transformer.transformer_blocks))
            for part, blocks in self.parts.items()
            for index, block in enumerate(blocks)
            for transformer in _transformers(block)
        ]

    @cached_property
    def blocks(self) -> list[torch.nn.Module]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the layers of all blocks, in forward order."""
        return [layer for blocks in self.parts.values() for block in blocks for layer in block]

    def fork(self, target: Target) -> int:
        """Return the number of the layer that holds a target."""
        layer = self.spatial(target)
        return next(n for n, other in enumerate(self.blocks) if other is layer)

    def spatial(self, target: Target) -> Any:
        """Return the layer that holds a target, and knows the size of its image."""
        return _transformers(self.parts[target.part][target.index])[0]

    def transformer(self, target: Target) -> Any:
        """Return the transformer block whose self-attention a target is."""
        return self.spatial(target).transformer_blocks[target.transformer]

    def targets(self, selector: str) -> tuple[Target, ...]:
        """Return the self-attention layers that a selector names; `auto` is the middle block.

        Raises:
            ValueError: if it names none, or `auto` has no self-attention here.
        """
        middle = [block for block in self.catalogue if block.part == "middle"]
        if not middle and "auto" in selector.lower():
            raise ValueError(
                "blocks 'auto' means the middle block, and the middle block of this model has no "
                f"self-attention. Blocks that have it: {describe(self.catalogue) or 'none'}."
            )
        auto = [Target(b.part, b.index, t) for b in middle for t in range(b.transformers)]
        return select(selector, self.catalogue, auto)

    def watching(self, label: str, selector: str) -> Selection:
        """Return the blocks whose attention is looked at; `auto` is the first of the middle.

        Raises:
            ValueError: as `targets`.
        """
        del label
        targets = self.targets(selector)
        first_only = selector.strip().lower() == "auto"
        return Selection(tuple(self.catalogue), targets[:1] if first_only else targets)

    def changed(
        self, call: Call, options: Options, sites: list[Site], present: Present
    ) -> AbstractContextManager[Options]:
        """Change the attention of some rows for the length of one call."""
        del call
        return changed_attention(self, options, sites, present)

    def watched(
        self, options: Options, label: str, targets: tuple[Target, ...], keep: Keep
    ) -> AbstractContextManager[Options]:
        """Show `keep` the queries and keys of some self-attentions in one call."""
        return watched_attention(self, options, label, targets, keep)


def _transformers(block: Any) -> list[Any]:
    return [
        layer
        for layer in block
        if isinstance(eager(layer), SpatialTransformer)
        and not eager(layer.transformer_blocks[0]).disable_self_attn
    ]
