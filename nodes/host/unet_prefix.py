"""Exact reuse in a UNet: what the blocks before a fork gave in the main pass, they give again.

In the main pass the output of each input block (the skips) and the input of the layer at the fork
are kept. In the perturbed pass every layer before the fork is passed over, and what was kept takes
the place of its output. All of it through per-call patches of the host; no module is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules import openaimodel

from .call import Call
from .prefix import Control, Kept, NotReusable, joined

_PARTS = ("input", "middle", "output")
_ADVANCED = ("activations_shape", "block_index")
_LAYERS = "forward_timestep_embed_patch"


@dataclass(frozen=True)
class Fork:
    """The layer of a block before which two passes are the same."""

    part: str
    block: int
    layer: int

    def is_after(self, part: str, block: int) -> bool:
        """Tell whether the whole of a block lies before the fork."""
        return (_PARTS.index(part), block) < (_PARTS.index(self.part), self.block)

    def reaches(self, part: str, block: int) -> bool:
        """Tell whether what comes between the blocks up to the start of this one lies before it."""
        return (_PARTS.index(part), block) <= (_PARTS.index(self.part), self.block)


class Layers:
    """A set of layers that the host may ask `isinstance(layer, this)` of."""

    def __init__(self, layers: Iterator[torch.nn.Module]) -> None:
        self._ids = {id(layer) for layer in layers}

    def __instancecheck__(self, layer: object) -> bool:
        return id(layer) in self._ids


def fork_before(parts: dict[str, Any], target: Any) -> Fork | None:
    """Return the fork before a target's transformer; None if no layer precedes it in its block."""
    block = parts[target.part][target.index]
    for position, layer in enumerate(block):
        if isinstance(layer, SpatialTransformer):
            usable = position > 0 and not isinstance(block[position - 1], SpatialTransformer)
            return Fork(target.part, target.index, position) if usable else None
    return None


def record(parts: dict[str, Any], call: Call, kept: list[Kept], forks: list[Fork]) -> None:
    """Make a main pass keep the skips and the inputs of the forks.

    Args:
        parts: the network's blocks by part.
        call: the model call; its patches are extended.
        kept: where to keep, one for each wanted cond of the call.
        forks: where later passes will begin.
    """
    if not layers_can_be_replaced():
        for one in kept:
            one.missing = "this ComfyUI cannot pass over layers (0.17 and newer can)"
        return
    needed = set[int]().union(*(_needed_skips(parts, fork) for fork in forks))

    def keep_skip(h: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        part, block = options["block"]
        if part == "input" and block in needed:
            for one in kept:
                one.keep(("skip", block), h)
        return h

    call.patch("input_block_patch", [*call.patches("input_block_patch"), keep_skip])
    others = call.patches(_LAYERS)
    handlers = [_keep_output(_layer_before(parts, fork), fork, kept, others) for fork in set(forks)]
    call.patch(_LAYERS, [*handlers, *others])


def _keep_output(
    layer: torch.nn.Module, fork: Fork, kept: list[Kept], others: list[Any]
) -> tuple[Layers, Callable[..., torch.Tensor]]:
    def run_and_keep(
        layer: torch.nn.Module,
        x: torch.Tensor,
        emb: torch.Tensor,
        context: Any,
        options: dict[str, Any],
        output_shape: Any,
        time_context: Any,
        frames: Any,
        image_only: Any,
    ) -> torch.Tensor:
        plain = {**options, "patches": {**options["patches"], _LAYERS: others}}
        h = openaimodel.forward_timestep_embed(
            [layer], x, emb, context, plain, output_shape, time_context, frames, image_only
        )
        for one in kept:
            one.keep(fork, h)
            one.options = {name: options[name] for name in _ADVANCED if name in options}
        return h

    return Layers(iter([layer])), run_and_keep


def replay(parts: dict[str, Any], call: Call, kept: list[Kept], fork: Fork, *, last: bool) -> None:
    """Make a perturbed pass begin at its fork.

    Args:
        parts: the network's blocks by part.
        call: the model call; its patches and its ControlNet output are replaced.
        kept: what the main pass kept, in the order of the call's conds.
        fork: where the pass begins.
        last: no later pass needs what was kept, so that it need not be copied.

    Raises:
        NotReusable: if something that is needed was not kept; the call is then as it was.
    """
    skips = sorted(_needed_skips(parts, fork))
    if any(key not in one.tensors for one in kept for key in [fork, *(("skip", b) for b in skips)]):
        raise NotReusable("another node answered for the model in the main pass")
    given = {block: joined([one.tensors["skip", block] for one in kept]) for block in skips}
    if not last and len(kept) == 1:
        given = {block: skip.clone() for block, skip in given.items()}
    resumed = joined([one.tensors[fork] for one in kept])

    _give_skips(call, fork, given)
    _pass_over_middle(call, fork)
    _pass_over_output(call, fork)
    layers = _layer_before(parts, fork)
    handler = _pass_over(layers, resumed, kept[0].options)
    over = Layers(_layers_before(parts, fork))
    call.patch(_LAYERS, [(over, handler), *call.patches(_LAYERS)])
    call.control = control_after(call.control, fork)


def _pass_over(
    last_layer: torch.nn.Module, resumed: torch.Tensor, advanced: dict[str, Any]
) -> Callable[..., torch.Tensor]:
    def pass_over(
        layer: torch.nn.Module,
        x: torch.Tensor,
        _emb: Any,
        _context: Any,
        options: dict[str, Any],
        *_: Any,
    ) -> torch.Tensor:
        if isinstance(layer, SpatialTransformer) and "transformer_index" in options:
            options["transformer_index"] += 1
        if layer is not last_layer:
            return x
        options.update(advanced)
        return resumed

    return pass_over


def _give_skips(call: Call, fork: Fork, given: dict[int, torch.Tensor]) -> None:
    others = call.patches("input_block_patch")
    later = call.patches("input_block_patch_after_skip")

    def give_skip(h: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        part, block = options["block"]
        if fork.is_after(part, block):
            return given.pop(block, h)
        return functools.reduce(lambda h, patch: patch(h, options), others, h)

    def after_skip(h: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        if fork.is_after(*options["block"]):
            return h
        return functools.reduce(lambda h, patch: patch(h, options), later, h)

    call.patch("input_block_patch", [give_skip])
    if later:
        call.patch("input_block_patch_after_skip", [after_skip])


def _pass_over_middle(call: Call, fork: Fork) -> None:
    if fork.part == "output" and call.patches("middle_block_after_patch"):
        call.patch("middle_block_after_patch", [])


def _pass_over_output(call: Call, fork: Fork) -> None:
    if fork.part != "output":
        return
    others = call.patches("output_block_patch")

    def pass_over_skip(
        h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if fork.reaches(*options["block"]):
            return h, h[:, :0]  # joins to h itself
        for patch in others:
            h, skip = patch(h, skip, options)
        return h, skip

    call.patch("output_block_patch", [pass_over_skip])


def control_after(control: Control | None, fork: Fork) -> Control | None:
    """Return a ControlNet's output without what is already in the kept tensors.

    The host takes one residual for each block from the end of a part's list.
    """
    if control is None:
        return None
    return {
        part: [
            None if _is_before(part, len(residuals) - 1 - i, fork) else residual
            for i, residual in enumerate(residuals)
        ]
        for part, residuals in control.items()
    }


def _is_before(part: str, block: int, fork: Fork) -> bool:
    # In the output part the residual is added to the skip before the block's layers run.
    return fork.reaches(part, block) if part == "output" else fork.is_after(part, block)


def _needed_skips(parts: dict[str, Any], fork: Fork) -> set[int]:
    if fork.part == "input":
        return set(range(fork.block))
    taken = fork.block + 1 if fork.part == "output" else 0
    return set(range(len(parts["input"]) - taken))


def _layer_before(parts: dict[str, Any], fork: Fork) -> torch.nn.Module:
    return parts[fork.part][fork.block][fork.layer - 1]


def _layers_before(parts: dict[str, Any], fork: Fork) -> Iterator[torch.nn.Module]:
    for part, blocks in parts.items():
        for index, block in enumerate(blocks):
            if fork.is_after(part, index):
                yield from block
            elif (part, index) == (fork.part, fork.block):
                yield from list(block)[: fork.layer]


@functools.cache
def layers_can_be_replaced() -> bool:
    """Tell whether this ComfyUI lets a patch stand in for any layer; older ones only for a few."""

    class Probe(openaimodel.TimestepBlock):
        def forward(self, *_: Any) -> Any:
            return None

    probe = Probe()
    handlers = [(Layers(iter([probe])), lambda _, x, *__: x)]
    options = {"patches": {_LAYERS: handlers}}
    return openaimodel.forward_timestep_embed([probe], 1, None, None, options) == 1
