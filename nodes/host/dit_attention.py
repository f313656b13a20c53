"""How the self-attention of a diffusion transformer is changed in one call of the model.

Through the host's `optimized_attention_override`: queries arrive there after normalisation and
rotary embedding, so that smoothing them is smoothing the attention's logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...seg_core import Target
from .call import Call
from .dit_layout import Span
from .dit_prefix import hook_block
from .perturbation import BlockPerturbation, Site, Smooth

_OVERRIDE = "optimized_attention_override"
_BLOCK = ("block_index", "block_type")


@dataclass(frozen=True)
class Attention:
    """One call of the host's attention function."""

    attend: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    chained: bool
    """Another node's override computes it."""

    @property
    def axis(self) -> int:
        """Return the tokens' axis of queries, keys and values."""
        return 2 if self.kwargs.get("skip_reshape") else 1

    @property
    def out_axis(self) -> int:
        """Return the tokens' axis of the output."""
        return 2 if self.kwargs.get("skip_output_reshape") else 1

    @property
    def query(self) -> torch.Tensor:
        """Return the queries."""
        return self.args[0]

    @property
    def queries(self) -> int:
        """Return the number of queries."""
        return self.query.shape[self.axis]

    @property
    def keys(self) -> int:
        """Return the number of keys."""
        return self.args[1].shape[self.axis]

    @property
    def masks_queries(self) -> bool:
        """Tell whether a mask treats queries differently."""
        mask = self.args[4] if len(self.args) > 4 else self.kwargs.get("mask")
        return mask is not None and mask.shape[-2] != 1

    def run(self, query: torch.Tensor | None = None) -> torch.Tensor:
        """Compute it, with other queries if given."""
        if query is None:
            return self.attend(*self.args, **self.kwargs)
        return self.attend(query, *self.args[1:], **self.kwargs)

    def value_as_output(self) -> torch.Tensor:
        """Return the values in the layout of the output."""
        value = self.args[2]
        heads = self.args[3] if len(self.args) > 3 else self.kwargs["heads"]
        if self.axis == 1:
            value = value.flatten(2)  # of SD3 they come with heads parted already
            groups = heads * value.shape[2] // self.query.shape[2]
            value = value.unflatten(2, (groups, -1)).transpose(1, 2)
        if value.shape[1] != heads:  # grouped queries
            value = value.repeat_interleave(heads // value.shape[1], dim=1)
        return value if self.out_axis == 2 else value.transpose(1, 2).flatten(2)


@dataclass(frozen=True, eq=False)
class AttentionChange(BlockPerturbation):
    """Changes the image's rows of chosen blocks' self-attention, and no other token's."""

    change: Callable[[Attention, Span, Site, list[slice]], torch.Tensor]
    smooth: Smooth | None = None
    """What the change does to queries; None if it does something else."""

    def install(self, call: Call, site: Site) -> None:
        """Apply the change to one call."""
        before = call.options.get(_OVERRIDE)
        blocks = self.network.blocks(call)
        layout = self.network.layout(call)
        options = {k: v for k, v in call.options.items() if k not in _BLOCK}  # of an earlier call

        def override(func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
            attend = func if before is None else functools.partial(before, func)
            attention = Attention(attend, args, kwargs, chained=before is not None)
            seen = kwargs.get("transformer_options") or {}
            target = blocks.next(seen)
            if target is None or target not in self.targets:
                return attention.run()
            span = layout.find(attention.queries, attention.keys, seen)
            if span is None:
                return attention.run()
            site.reached.add(target)
            frames = attention.query.shape[0] // call.x.shape[0]
            rows = [slice(None)] if site.rows is None else _scaled(site.rows, frames)
            if self.smooth is not None and site.look is not None:
                show_queries(self.smooth, attention, span, site, rows[0], target)
            return self.change(attention, span, site, rows)

        call.options = {**options, _OVERRIDE: override}
        if self.network.family.identity == "hook":
            for target in self.targets:
                hook_block(call, target, blocks.around(target))


def smooth_queries(
    smooth: Smooth, attention: Attention, span: Span, site: Site, rows: list[slice]
) -> torch.Tensor:
    """Return the attention whose image queries are smoothed over their grid."""
    if smooth.collapses and site.rows is None and _may_shorten(attention, span):
        return _one_query(smooth, attention, span, site)
    query = attention.query
    changed = query.clone()
    for part in rows:
        view = span.view(query[part], attention.axis)
        smoothed = smooth(_sequences(view, attention.axis), span.grid, site, False)
        span.view(changed[part], attention.axis).copy_(smoothed.reshape(view.shape))
    return attention.run(changed)


def show_queries(
    smooth: Smooth, attention: Attention, span: Span, site: Site, rows: slice, target: Target
) -> None:
    """Show a probe the image's queries, and all keys, of the first sample that is smoothed."""
    if site.look is None:
        return
    axis, first = attention.axis, slice(rows.start or 0, (rows.start or 0) + 1)
    query = _sequences(span.view(attention.query[first], axis), axis)
    key = attention.args[1][first]
    if axis == 1:
        heads = attention.args[3] if len(attention.args) > 3 else attention.kwargs["heads"]
        width = query.shape[-1] // heads
        query, key = (t[0].unflatten(-1, (-1, width)).transpose(0, 1) for t in (query, key))
    else:
        key = key[0]
    scale = attention.kwargs.get("scale")
    site.look.at_queries(target, query, key, span.grid, smooth, site, scale)


def see_itself(
    strength: float, attention: Attention, span: Span, site: Site, rows: list[slice]
) -> torch.Tensor:
    """Return the attention whose image rows are drawn towards the identity map."""
    del site
    out = attention.run()
    value = attention.value_as_output()
    axis = attention.out_axis
    changed = out.clone()
    for part in rows:
        own = span.view(value[part], axis, span.key_offset).to(out.dtype)
        image = span.view(changed[part], axis)
        image.copy_(torch.lerp(image, own, strength))
    return changed


def _one_query(smooth: Smooth, attention: Attention, span: Span, site: Site) -> torch.Tensor:
    """Return attention in which one query stands for each frame; its row of output, for all."""
    query, axis, grid = attention.query, attention.axis, span.grid
    view = span.view(query, axis)
    means = smooth(_sequences(view, axis), grid, site, True)
    means = means.reshape(*query.shape[:axis], grid.frames, *query.shape[axis + 1 :])
    rest = attention.queries - span.start - span.length
    tail = query.narrow(axis, span.start + span.length, rest)
    short = torch.cat([query.narrow(axis, 0, span.start), means, tail], dim=axis)
    out, axis = attention.run(short), attention.out_axis
    before, frames, after = out.split([span.start, grid.frames, rest], dim=axis)
    frames = frames.repeat_interleave(grid.cells, dim=axis)
    return torch.cat([before, frames, after], dim=axis)


def _may_shorten(attention: Attention, span: Span) -> bool:
    return span.is_solid and not attention.chained and not attention.masks_queries


def _sequences(view: torch.Tensor, axis: int) -> torch.Tensor:
    tokens = view.flatten(axis, axis + 1)
    return tokens.flatten(0, 1) if axis == 2 else tokens


def _scaled(rows: list[slice], frames: int) -> list[slice]:
    return [slice(one.start * frames, one.stop * frames) for one in rows]
