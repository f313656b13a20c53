"""UNet: which self-attention blocks there are, and what can be done to them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...seg_core import Block, Target, describe, describe_targets, select
from . import unet_prefix
from .call import Call
from .perturbation import Smooth
from .prefix import Kept
from .saliency import Watched
from .unet_attention import IdentityAttention, Keep, QuerySmoothing, watch_attention
from .unet_prefix import Fork


class UNet:
    """The blocks of a `UNetModel` that hold self-attention over an image's tokens."""

    kind = "UNet"

    def __init__(self, network: UNetModel) -> None:
        self.network = network

    @staticmethod
    def is_one(network: object) -> bool:
        """Tell whether a network is of this kind."""
        return isinstance(network, UNetModel)

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
    def catalogue(self) -> list[Block]:
        """Return every block with self-attention, in forward order."""
        return [
            Block(part, index, len(transformer.transformer_blocks))
            for part, blocks in self.parts.items()
            for index, block in enumerate(blocks)
            for transformer in _transformers(block)
        ]

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

    def smoothing(self, label: str, selector: str, smooth: Smooth) -> QuerySmoothing:
        """Return the smoothing of the queries of selected blocks.

        Raises:
            ValueError: as `targets`.
        """
        return QuerySmoothing(label, self, self.targets(selector), smooth)

    def identity(self, label: str, selector: str, strength: float) -> IdentityAttention:
        """Return the drawing of selected blocks' attention maps towards the identity.

        Raises:
            ValueError: as `targets`.
        """
        return IdentityAttention(label, self, self.targets(selector), strength)

    def watching(self, label: str, selector: str) -> Watched:
        """Return the blocks whose attention is looked at; `auto` is the first of the middle.

        Raises:
            ValueError: as `targets`.
        """
        del label
        targets = self.targets(selector)
        first_only = selector.strip().lower() == "auto"
        return Watched(self, targets[:1] if first_only else targets)

    def watch(self, call: Call, targets: tuple[Target, ...], keep: Keep) -> None:
        """Show `keep` the queries and keys of some self-attentions in one call."""
        watch_attention(call, targets, keep, self.describe)

    def self_attention(self, target: Target) -> Any:
        """Return the self-attention module of a target."""
        transformer = _transformers(self.parts[target.part][target.index])[0]
        return transformer.transformer_blocks[target.transformer].attn1

    def describe(self, targets: Iterable[Target]) -> str:
        """Return some of its blocks in the selector language."""
        return describe_targets(targets, self.catalogue)

    def fork(self, targets: tuple[Target, ...]) -> Fork | None:
        """Return where a pass that changes these targets first differs from the plain one."""
        return unet_prefix.fork_before(self.parts, targets[0])

    def record(self, call: Call, kept: list[Kept], forks: list[Fork]) -> None:
        """Make one call keep what passes that differ from these forks on can reuse."""
        unet_prefix.record(self.parts, call, kept, forks)

    def replay(self, call: Call, kept: list[Kept], fork: Fork, *, last: bool) -> None:
        """Make one call begin at a fork, from what was kept."""
        unet_prefix.replay(self.parts, call, kept, fork, last=last)

    def prefix_bytes(self, model: Any, shape: list[int]) -> int:
        """Return an upper bound of what is kept for one sample, in bytes."""
        # Skips of SD 1.5 and SDXL add up to 5 tensors of the first level's size.
        size = model.get_dtype_inference().itemsize
        return 6 * self.network.model_channels * shape[-1] * shape[-2] * size


def _transformers(block: Any) -> list[Any]:
    return [
        layer
        for layer in block
        if isinstance(layer, SpatialTransformer)
        and not layer.transformer_blocks[0].disable_self_attn
    ]
