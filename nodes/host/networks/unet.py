"""UNet: which self-attention blocks there are, and in which order its layers run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from comfy.ldm.modules import attention
from comfy.ldm.modules.attention import SpatialTransformer

from ....seg_core import Block, Target, TokenGrid, all_targets, describe, describe_targets
from ..batch.call import Call
from ..batch.compiled import eager
from ..batch.network_call import NetworkCall
from ..batch.widening import Options, own_options, wrapped
from ..settings.changes import Auto
from ..settings.errors import GuidanceError
from .adapter import NetworkAdapter
from .attention import OVERRIDE, Attention, Span
from .blocks import Carried
from .editing import AttentionEditor

_SWAPPED = 6


class UNet(NetworkAdapter):
    """The blocks of a `UNetModel` that hold self-attention over an image's tokens."""

    kind = "UNet"

    def __init__(self, network: Any) -> None:
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
        return all(hasattr(network, part) for part in parts)

    def fork(self, target: Target) -> int:
        """Return the number of the layer that holds a target."""
        return self.blocks.index(self._spatial[target.part, target.index])

    def module(self, target: Target) -> Any:
        """Return the transformer block whose self-attention a target is."""
        return self._spatial[target.part, target.index].transformer_blocks[target.transformer]

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
        space, time = editor.over("space"), editor.over("time")
        places = [(self.module(target), target, space) for target in space.targets]
        for target in time.targets:
            layers = self._spatial[target.part, target.index].time_stack
            places.append((layers[target.transformer], target, time))
        alone = [target for target in space.targets if not _is_chained(call.options, target)]

        def own(number: int, options: Options) -> Options:
            _, target, over = places[number]
            return self._with_replacement(options, target, over, in_time=over is time)

        def project(number: int, run: NetworkCall) -> torch.Tensor:
            return space.project(alone[number], run)

        blocks = [module for module, _, _ in places]
        projections = [self.module(target).attn1.to_q for target in alone]
        with own_options(blocks, call.options, own), wrapped(projections, project):
            yield

    def _with_replacement(
        self, options: Options, target: Target, editor: AttentionEditor, *, in_time: bool
    ) -> Options:
        """Return a block's options in which the editor stands around what computes attention."""
        # Asked now: the block's options will hold this replacement, too.
        before, chained = _replacement(options, target), _is_chained(options, target)

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
            sizes = (own.queries, 1, 1) if in_time else (1, *extra["activations_shape"][-2:])
            span = self._checked_span(own, target, editor, TokenGrid(*sizes))
            return editor.run(own, target, span)

        tables = options.get("patches_replace", {})
        table = {**tables.get("attn1", {}), _place(target): replacement}
        return {**options, "patches_replace": {**tables, "attn1": table}}

    def _checked_span(
        self, own: Attention, target: Target, editor: AttentionEditor, grid: TokenGrid
    ) -> Span:
        """Return where the tokens of a grid lie in one attention.

        Raises:
            ValueError: if its tokens are others.
        """
        here, measuring = editor.acting(target), editor.measuring(target)
        smooths = [one.perturbation.smooth for one in here]
        # Smoothing needs the queries' grid alone: another node may add keys.
        own_keys = bool(measuring) or None in smooths
        if not measuring and not any(smooths):
            grid = TokenGrid(1, 1, own.queries)
        if own.rows != own.key.shape[0] or (own_keys and own.queries != own.keys):
            problem = (
                f"{own.rows} x {own.queries} queries for {own.key.shape[0]} x {own.keys} keys, so "
                "they are not the same tokens"
            )
        elif own.queries != grid.tokens:
            size = f"{grid.height}x{grid.width}"
            problem = f"{own.queries} tokens, which is not its grid of {size} = {grid.tokens}"
        else:
            return Span(0, grid, grid.width)
        label = here[0].perturbation.label if here else measuring[0].label
        name = describe_targets([target], self.catalogue)
        raise GuidanceError(
            f"{label}: block {name} has {problem}. A node such as HyperTile or ToMe tiles or "
            "merges tokens there; leave it out, or choose other blocks."
        )


def _place(target: Target) -> tuple[str, int, int]:
    """Return where the host looks for a replacement of a layer's attention."""
    return target.part, target.index, target.transformer


def _replacement(options: Options, target: Target) -> Any:
    """Return another node's replacement of a layer's attention, of it or of its block."""
    table, place = options.get("patches_replace", {}).get("attn1", {}), _place(target)
    return table.get(place, table.get(place[:2]))


def _is_chained(options: Options, target: Target) -> bool:
    """Tell whether another node's code computes a layer's attention."""
    return OVERRIDE in options or _replacement(options, target) is not None


def _attends(layer: Any) -> bool:
    """Tell whether a layer holds self-attention over an image's tokens."""
    if not isinstance(layer, SpatialTransformer):
        return False
    return not eager(layer.transformer_blocks[0]).disable_self_attn
