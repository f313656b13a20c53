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
from .attention import Attention
from .blocks import Carried
from .editing import AttentionEditor
from .projection import projected_once
from .span import Span

_OVERRIDE = "optimized_attention_override"


class UNet(NetworkAdapter):
    """The blocks of a `UNetModel` that hold self-attention over an image's tokens."""

    kind = "UNet"

    def __init__(self, network: UNetModel) -> None:
        self.network = network
        middle = network.middle_block
        self.parts: dict[str, list[Any]] = {
            "input": list(network.input_blocks),
            "middle": [] if middle is None else [middle],
            "output": list(network.output_blocks),
        }
        self.blocks = [layer for some in self.parts.values() for block in some for layer in block]
        self.catalogue = [
            Block(part, index, len(transformer.transformer_blocks))
            for part, some in self.parts.items()
            for index, block in enumerate(some)
            for transformer in _transformers(block)
        ]
        layers = [self.spatial(target) for target in all_targets(self.catalogue)]
        if not layers or not all(hasattr(layer, "time_stack") for layer in layers):
            self.one_picture = "this UNet makes single pictures: it has no attention over time"

    @staticmethod
    def is_one(network: object) -> bool:
        """Tell whether a network is of this kind, whatever other nodes made of its class."""
        parts = ("input_blocks", "middle_block", "output_blocks", "time_embed", "out")
        return isinstance(network, UNetModel) or all(hasattr(network, part) for part in parts)

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
        """Return the middle block, or for other tokens all but the first quarter of the encoder.

        Raises:
            ValueError: if these parts have no self-attention here.
        """
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
        targets = editor.targets
        modules = [(self.module(target), target, False) for target in targets]
        modules += [
            (self.module_over_time(target), target, True)
            for target in targets
            if editor.acting(target, "time")
        ]
        chained: dict[int, bool] = {}

        def own(number: int, options: Options) -> Options:
            _, target, over_time = modules[number]
            chained[number] = self._is_chained(options, target)
            return self._with_replacement(options, editor, target, over_time)

        def groups(number: int, rows: int) -> list[RowGroup]:
            target = targets[number]
            return row_groups(editor.acting(target, "space"), editor.present(target), rows)

        def is_short(number: int, group: RowGroup) -> bool:
            return not chained[number] and editor.needs_one_query(targets[number], group)

        blocks = [module for module, _, _ in modules]
        projections = [self.module(target).attn1.to_q for target in targets]
        with own_options(blocks, call.options, own), projected_once(projections, groups, is_short):
            yield

    def _place(self, options: Options, target: Target) -> tuple[Any, ...]:
        """Return under which name the host looks for replacements of a block's attention."""
        return (*options["block"][:2], options.get("block_index", target.transformer))

    def _is_chained(self, options: Options, target: Target) -> bool:
        """Tell whether another node computes a block's self-attention."""
        place = self._place(options, target)
        table = options.get("patches_replace", {}).get("attn1", {})
        return bool(table.keys() & {place, place[:2]}) or _OVERRIDE in options

    def _with_replacement(
        self, options: Options, editor: AttentionEditor, target: Target, over_time: bool
    ) -> Options:
        """Return a block's options in which the editor computes its self-attention.

        What computes it otherwise is another node's replacement, or the host.
        """
        place = self._place(options, target)
        tables = options.get("patches_replace", {})
        table = tables.get("attn1", {})
        before = table.get(place, table.get(place[:2]))
        chained = self._is_chained(options, target)

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
            return self._edited(own, editor, target, over_time, options)

        return {**options, "patches_replace": {**tables, "attn1": {**table, place: replacement}}}

    def _edited(
        self,
        own: Attention,
        editor: AttentionEditor,
        target: Target,
        over_time: bool,
        options: Options,
    ) -> torch.Tensor:
        here = editor.acting(target, "time" if over_time else "space")
        measured = [] if over_time else [r for r in editor.measured if target in r.targets]
        asking = [one.perturbation.label for one in here] + [r.label for r in measured]
        if not asking:
            return own.run()
        smooths = measured or any(one.perturbation.smooth is not None for one in here)
        others = measured or any(one.perturbation.smooth is None for one in here)
        self._require_own_tokens(own, target, asking[0], tokens=bool(others))
        grid = TokenGrid(own.queries, 1, 1) if over_time else TokenGrid(1, 1, own.queries)
        if smooths and not over_time:
            grid = self._grid(own.queries, options, target, asking[0])
        span = Span(0, grid, grid.width)
        if measured:
            editor.measure(own, target, span)
        return editor.run(own, target, span, here) if here else own.run()

    def _require_own_tokens(
        self, own: Attention, target: Target, label: str, *, tokens: bool
    ) -> None:
        """Refuse keys that are not of the queries' rows, or where it matters not of their tokens.

        Smoothing needs the queries' grid alone: another node may add keys.
        """
        if own.rows != own.key.shape[0] or (tokens and own.queries != own.keys):
            raise GuidanceError(
                f"{label}: block {self.describe([target])} has {own.rows} x {own.queries} queries "
                f"for {own.key.shape[0]} x {own.keys} keys, so they are not the same tokens. A "
                "node such as HyperTile or ToMe tiles or merges tokens there; leave it out, or "
                "choose other blocks."
            )

    def _grid(self, tokens: int, options: Options, target: Target, label: str) -> TokenGrid:
        """Return the grid of a block's tokens, as its layer notes it for the blocks inside."""
        height, width = _size(tokens, options)
        if height * width != tokens:
            raise GuidanceError(
                f"{label}: block {self.describe([target])} has {tokens} tokens, which is not its "
                f"grid of {height}x{width} = {height * width}. A node such as HyperTile or ToMe "
                "tiles or merges tokens there; leave it out, or choose other blocks."
            )
        return TokenGrid(1, height, width)


def _size(tokens: int, options: Options) -> tuple[int, int]:
    """Return rows and columns of the tokens of a layer, by the host's note or from the latent's."""
    if "activations_shape" in options:
        height, width = options["activations_shape"][-2:]
        return height, width
    height, width = options["original_shape"][-2:]
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def _transformers(block: Any) -> list[Any]:
    return [
        layer
        for layer in block
        if isinstance(eager(layer), SpatialTransformer)
        and not eager(layer.transformer_blocks[0]).disable_self_attn
    ]
