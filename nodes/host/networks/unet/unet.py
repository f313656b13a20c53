"""UNet: which self-attention blocks there are, and in which order its layers run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from .....seg_core import Block, Target, TokenGrid, all_targets, describe
from ...calls.call import Call
from ...calls.compiled import eager
from ...calls.site import Site
from ...settings.changes import Auto
from ..entering import Carried
from ..span import Span
from ..view import Options, Present, View, Watch
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

    @cached_property
    def parts(self) -> dict[str, list[Any]]:
        """Return the parts in forward order, each a list of blocks of layers."""
        middle = self.network.middle_block
        return {
            "input": list(self.network.input_blocks),
            "middle": [] if middle is None else [middle],
            "output": list(self.network.output_blocks),
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

    def module(self, target: Target) -> Any:
        """Return the transformer block whose self-attention a target is."""
        return self.spatial(target).transformer_blocks[target.transformer]

    def module_over_time(self, target: Target) -> Any:
        """Return the transformer block over frames that follows a target's."""
        return self.spatial(target).time_stack[target.transformer]

    @cached_property
    def one_picture(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return why there are no frames to smooth over; empty if there are."""
        layers = [self.spatial(target) for target in all_targets(self.catalogue)]
        if layers and all(hasattr(layer, "time_stack") for layer in layers):
            return ""
        return "this UNet makes single pictures: it has no attention over time"

    def frames(self, call: Call) -> int:
        """Return the number of frames that attend to each other in one call."""
        return 1 if self.one_picture else int(call.extra.get("num_video_frames") or 1)

    def heads(self, target: Target) -> int:
        """Return the number of heads of a layer."""
        return self.module(target).n_heads

    def carried(self, target: Target) -> Carried:
        """Return which arguments of a target's block become its result."""
        del target
        return Carried(("x",), "x")

    def span(self, call: Call, tokens: int, options: Options) -> Span:
        """Return where the image's tokens lie: there are no others."""
        del call, options
        return Span(0, TokenGrid(1, 1, tokens), tokens)

    def auto(self, purpose: Auto) -> Sequence[Target]:
        """Return the middle block, or for other tokens all but the first quarter of the encoder.

        Raises:
            ValueError: if these parts have no self-attention here.
        """
        part = "input" if purpose == "tokens" else "middle"
        layers = list(all_targets(block for block in self.catalogue if block.part == part))
        if not layers:
            name = "encoder" if purpose == "tokens" else "middle block"
            raise ValueError(
                f"blocks 'auto' means the {name}, and the {name} of this model has no "
                f"self-attention. Blocks that have it: {describe(self.catalogue) or 'none'}."
            )
        return layers[len(layers) // 4 :] if purpose == "tokens" else layers

    @contextmanager
    def changed_attention(
        self,
        call: Call,
        options: Options,
        sites: list[Site],
        present: Present,
        watches: Sequence[Watch],
    ) -> Iterator[Options]:
        """Change the self-attention of some rows for the length of one call, or look at it."""
        del call
        with ExitStack() as stack:
            for watch in watches:
                options = stack.enter_context(watched_attention(self, options, watch, present))
            if sites:
                changed = changed_attention(self, options, sites, present)
                options = stack.enter_context(changed)
            yield options


def _transformers(block: Any) -> list[Any]:
    return [
        layer
        for layer in block
        if isinstance(eager(layer), SpatialTransformer)
        and not eager(layer.transformer_blocks[0]).disable_self_attn
    ]
