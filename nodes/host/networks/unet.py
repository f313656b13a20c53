"""UNet: which self-attention blocks there are, and in which order its layers run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from comfy.ldm.modules import attention
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ....seg_core import Block, Target, TokenGrid, all_targets, describe
from ..batch.active import RowGroup, row_groups
from ..batch.call import Call
from ..batch.compiled import eager
from ..batch.widening import own_options
from ..settings.changes import Auto
from ..settings.errors import GuidanceError
from .adapter import NetworkAdapter, Options
from .attention import Attention, Span
from .blocks import Carried
from .editing import AttentionEditor
from .projection import projected_once

_SWAPPED = 6
_OVERRIDE = "optimized_attention_override"


class UNet(NetworkAdapter):
    """The blocks of a `UNetModel` that hold self-attention over an image's tokens."""

    kind = "UNet"

    def __init__(self, network: UNetModel) -> None:
        self.network = network
        middle = network.middle_block
        parts: dict[str, list[Any]] = {
            "input": list(network.input_blocks),
            "middle": [] if middle is None else [middle],
            "output": list(network.output_blocks),
        }
        self.blocks = [layer for some in parts.values() for block in some for layer in block]
        self._spatial = {
            (part, index): layer
            for part, some in parts.items()
            for index, block in enumerate(some)
            for layer in block
            if _attends(eager(layer))
        }
        layers = self._spatial.items()
        self.catalogue = [Block(*place, len(layer.transformer_blocks)) for place, layer in layers]
        if not layers or not all(hasattr(layer, "time_stack") for _, layer in layers):
            self.one_picture = "this UNet makes single pictures: it has no attention over time"

    @staticmethod
    def is_one(network: object) -> bool:
        """Tell whether a network is of this kind, whatever other nodes made of its class."""
        parts = ("input_blocks", "middle_block", "output_blocks", "time_embed", "out")
        return isinstance(network, UNetModel) or all(hasattr(network, part) for part in parts)

    def fork(self, target: Target) -> int:
        """Return the number of the layer that holds a target."""
        return self.blocks.index(self._spatial[target.part, target.index])

    def module(self, target: Target) -> Any:
        """Return the transformer block whose self-attention a target is."""
        return self._spatial[target.part, target.index].transformer_blocks[target.transformer]

    def module_over_time(self, target: Target) -> Any:
        """Return the transformer block over frames that follows a target's."""
        return self._spatial[target.part, target.index].time_stack[target.transformer]

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

    def span(self, call: Call, queries: int, keys: int, options: Options) -> Span:
        """Return where the image's tokens lie: there are no others."""
        del call, keys, options
        return Span(0, TokenGrid(1, 1, queries), queries)

    def auto(self, purpose: Auto) -> Sequence[Target]:
        """Return the middle block, or the blocks of the papers that change tokens.

        Shuffled tokens enter all but the first quarter of the encoder. Swapped ones enter the first
        six layers of the decoder if its first block has as many, as in SDXL.

        Raises:
            ValueError: if these parts have no self-attention here.
        """
        if purpose == "swap":
            decoder = [block for block in self.catalogue if block.part == "output"]
            first = list(all_targets(decoder[:1]))[:_SWAPPED]
            if len(first) == _SWAPPED:
                return first
        part = "input" if purpose == "tokens" else "middle"
        layers = list(all_targets(block for block in self.catalogue if block.part == part))
        if not layers:
            name = "encoder" if purpose == "tokens" else "middle block"
            raise GuidanceError(
                f"blocks 'auto' means the {name}, and the {name} of this model has no "
                f"self-attention. Blocks that have it: {describe(self.catalogue) or 'none'}."
            )
        return layers[len(layers) // 4 :] if purpose == "tokens" else layers

    @contextmanager
    def edited_attention(self, call: Call, editor: AttentionEditor) -> Iterator[None]:
        """Change the self-attention of some rows for the length of one call, or measure it."""
        places = [(self.module(target), target, "space") for target in editor.targets]
        places += [
            (self.module_over_time(target), target, "time")
            for target in editor.targets
            if editor.acting(target, "time")
        ]

        chained: dict[Target, bool] = {}

        def own(number: int, options: Options) -> Options:
            _, target, axis = places[number]
            chained[target] = _other(options, target)[1] is not None or _OVERRIDE in options
            return self._with_replacement(options, editor, target, axis)

        def groups(number: int, rows: int) -> list[RowGroup]:
            target = editor.targets[number]
            return row_groups(editor.acting(target, "space"), editor.present(target), rows)

        def is_short(number: int, group: RowGroup) -> bool:
            target = editor.targets[number]
            return not chained[target] and editor.needs_one_query(target, group)

        blocks = [module for module, _, _ in places]
        projections = [self.module(target).attn1.to_q for target in editor.targets]
        with own_options(blocks, call.options, own), projected_once(projections, groups, is_short):
            yield

    def _with_replacement(
        self, options: Options, editor: AttentionEditor, target: Target, axis: str
    ) -> Options:
        """Return a block's options in which the editor stands around what computes attention."""
        place, before = _other(options, target)
        tables = options.get("patches_replace", {})
        table = tables.get("attn1", {})
        chained = before is not None or _OVERRIDE in options

        def replacement(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Options
        ) -> torch.Tensor:
            def attend(*qkv: torch.Tensor, heads: int) -> torch.Tensor:
                if before is not None:
                    return before(*qkv, extra)
                precision = extra.get("attn_precision")
                return attention.optimized_attention(
                    *qkv, heads, attn_precision=precision, transformer_options=extra
                )

            own = Attention(attend, (q, k, v), {"heads": extra["n_heads"]}, chained=chained)
            return self._edited(own, editor, target, axis, options)

        return {**options, "patches_replace": {**tables, "attn1": {**table, place: replacement}}}

    def _edited(
        self, own: Attention, editor: AttentionEditor, target: Target, axis: str, options: Options
    ) -> torch.Tensor:
        """Return the output of one attention over space or time, edited and measured."""
        here = editor.acting(target, axis)
        measured = [r for r in editor.measured if axis == "space" and target in r.targets]
        if not here and not measured:
            return own.run()
        smooths = [one.perturbation.smooth for one in here]
        grid = TokenGrid(1, 1, own.queries)
        if axis == "time":
            grid = TokenGrid(own.queries, 1, 1)
        elif measured or any(smooths):
            grid = TokenGrid(1, *_size(own.queries, options))
        # Smoothing needs the queries' grid alone: another node may add keys.
        problem = _mismatch(own, grid, own_keys=bool(measured or None in smooths))
        if problem:
            label = here[0].perturbation.label if here else measured[0].label
            raise GuidanceError(
                f"{label}: block {self.describe([target])} has {problem}. A node such as HyperTile "
                "or ToMe tiles or merges tokens there; leave it out, or choose other blocks."
            )
        span = Span(0, grid, grid.width)
        if measured:
            editor.measure(own, target, span)
        return editor.run(own, target, span, here)


def _other(options: Options, target: Target) -> tuple[tuple[Any, ...], Any]:
    """Return where the host looks for a replacement of a block's attention, and another node's."""
    block = options["block"][:2]
    place = (*block, options.get("block_index", target.transformer))
    table = options.get("patches_replace", {}).get("attn1", {})
    return place, table.get(place, table.get(block))


def _mismatch(own: Attention, grid: TokenGrid, *, own_keys: bool) -> str:
    """Return how the tokens of an attention differ from its grid's or its keys'; empty if not."""
    if own.rows != own.key.shape[0] or (own_keys and own.queries != own.keys):
        return (
            f"{own.rows} x {own.queries} queries for {own.key.shape[0]} x {own.keys} keys, so they "
            "are not the same tokens"
        )
    if own.queries != grid.tokens:
        size = f"{grid.height}x{grid.width}"
        return f"{own.queries} tokens, which is not its grid of {size} = {grid.tokens}"
    return ""


def _size(tokens: int, options: Options) -> tuple[int, int]:
    """Return rows and columns of the tokens of a layer, by the host's note or from the latent's."""
    if "activations_shape" in options:
        height, width = options["activations_shape"][-2:]
        return height, width
    height, width = options["original_shape"][-2:]
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def _attends(layer: Any) -> bool:
    """Tell whether a layer holds self-attention over an image's tokens."""
    if not isinstance(layer, SpatialTransformer):
        return False
    return not eager(layer.transformer_blocks[0]).disable_self_attn
