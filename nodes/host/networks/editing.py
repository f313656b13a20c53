"""The one editor of attention: what is done to queries and outputs, whatever network they are of.

A network hands over one call of self-attention and says where the image's tokens lie. Queries
arrive as attention gets them, after normalisation, rotary embedding and other nodes' patches, so
that smoothing them is smoothing the attention's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from ....seg_core import (
    BlurMatrices,
    Target,
    TokenGrid,
    repeat_rows,
    require_heads,
    softened_attention,
)
from ..batch.active import ActivePerturbation, RowGroup, row_groups
from ..settings.changes import Change, ChangeOutput, SmoothQueries
from ..settings.errors import GuidanceError
from .attention import Attention, Span, laid_out
from .saliency import SaliencyRequest, image_mass


@dataclass(frozen=True)
class AttentionEditor:
    """What is changed in the self-attention of one model call, and what is measured of it.

    Attributes:
        active: the changes.
        present: returns the rows of the batch that are computed at a target.
        measured: for whom the attention that tokens draw is measured.
    """

    active: Sequence[ActivePerturbation]
    present: Callable[[Target], int]
    measured: Sequence[SaliencyRequest] = ()

    @property
    def targets(self) -> list[Target]:
        """Return the layers that are changed or measured."""
        changed = [target for one in self.active for target in one.perturbation.targets]
        measured = [target for request in self.measured for target in request.targets]
        return list(dict.fromkeys(changed + measured))

    def acting(self, target: Target, axis: str | None = None) -> list[ActivePerturbation]:
        """Return what changes a layer, over one `axis` where it attends over each by itself."""
        here = [one for one in self.active if target in one.perturbation.targets]
        return here if axis is None else [one for one in here if axis in _axes(one)]

    def needs_one_query(self, target: Target, group: RowGroup) -> bool:
        """Tell whether one query of each row is enough for a group, and nobody measures others."""
        change = _only_change(group, target)
        measured = any(target in request.targets for request in self.measured)
        if change is None or measured or group.active[0].probe is not None:
            return False
        if isinstance(change, SmoothQueries):
            return change.one_query and change.strength == 1
        return isinstance(change, ChangeOutput) and not change.needs_map

    def measure(
        self,
        attention: Attention,
        target: Target,
        span: Span,
        patch: tuple[int, int, int] | None = None,
    ) -> None:
        """Measure how much attention the image's tokens draw from each other, for who asks."""
        for request in self.measured:
            if target in request.targets:
                mass = partial(image_mass, attention, span, patch)
                request.keep(target, attention.rows // self.present(target), mass)

    def run(
        self, attention: Attention, target: Target, span: Span, here: list[ActivePerturbation]
    ) -> torch.Tensor:
        """Return the output of an attention of which `here` changes some rows."""
        for one in here:
            _require_heads(one, target, attention.heads)
            one.reached.add(target)
        groups = row_groups(here, self.present(target), attention.rows)
        _show_probes(attention, span, groups, target)
        is_short = partial(_is_short, attention, span, target)
        neighbours = [(short, list(some)) for short, some in groupby(groups, is_short)]
        attending = [group for short, some in neighbours if not short for group in some]
        query = _smoothed_queries(attention, span, attending, target)
        outs: list[torch.Tensor] = []
        for short, some in neighbours:
            if short:
                outs += [_short(attention.of(g.rows), span, g.active[0]) for g in some]
            else:
                rows = slice(some[0].rows.start, some[-1].rows.stop)
                outs.append(attention.of(rows).run(query[rows]))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        out = _softened_output(attention, groups, out)
        return _mixed_output(attention, span, groups, out, target)


def _axes(one: ActivePerturbation) -> str:
    """Return the axes that a perturbation acts over."""
    smooth = one.perturbation.smooth
    return "space" if smooth is None else smooth.axes


def _require_heads(one: ActivePerturbation, target: Target, count: int) -> None:
    try:
        name = one.perturbation.name([target])
        require_heads(one.perturbation.heads(target) or (), count, name)
    except ValueError as error:
        raise GuidanceError(f"{one.perturbation.label}: {error}") from None


def _only_change(group: RowGroup, target: Target) -> Change | None:
    """Return the change of a group, if there is just one and it is of all heads."""
    if len(group.active) != 1 or group.active[0].perturbation.heads(target) is not None:
        return None
    return group.active[0].perturbation.change


def _is_short(attention: Attention, span: Span, target: Target, group: RowGroup) -> bool:
    """Tell whether a group's output needs no attention of every query of the image."""
    change = _only_change(group, target)
    if attention.chained or not span.is_solid:
        return False
    if isinstance(change, SmoothQueries):
        return change.one_query and not attention.masks_queries
    is_whole = span.length == attention.queries == attention.keys
    return isinstance(change, ChangeOutput) and not change.needs_map and is_whole


def _short(attention: Attention, span: Span, one: ActivePerturbation) -> torch.Tensor:
    """Return attention in which few queries stand for the image's; their output, for all.

    Where nothing is left of the attention map, return the values in the layout of the output.
    """
    smooth = one.perturbation.smooth
    if smooth is None:
        return laid_out(attention.of_each_head(attention.value), attention.out_axis)
    query = attention.by_heads(attention.query, attention.axis)
    heads = query.shape[2:]
    means = smooth.mean(_tokens(span.view(query, 1)), span.grid).unflatten(2, heads)
    start, stop = span.start, span.start + span.length
    short = torch.cat([query[:, :start], means, query[:, stop:]], dim=1)
    out = attention.run(laid_out(short, attention.axis))
    out = attention.by_heads(out, attention.out_axis)
    stop = start + means.shape[1]
    rows = out[:, start:stop].flatten(2)
    image = repeat_rows(rows, span.grid, axes=smooth.axes).unflatten(2, heads)
    whole = torch.cat([out[:, :start], image, out[:, stop:]], dim=1)
    return laid_out(whole, attention.out_axis)


def _smoothing(
    groups: list[RowGroup],
) -> list[tuple[slice, ActivePerturbation, SmoothQueries]]:
    """Return who smooths which rows, and how."""
    acting = [(g.rows, one, one.perturbation.change) for g in groups for one in g.active]
    return [(rows, one, it) for rows, one, it in acting if isinstance(it, SmoothQueries)]


def _smoothed_queries(
    attention: Attention, span: Span, groups: list[RowGroup], target: Target
) -> torch.Tensor:
    """Return queries, the image's smoothed over their grid as each group's perturbations ask."""
    smoothing = _smoothing(groups)
    query = attention.query.clone() if smoothing else attention.query
    for rows, one, smooth in smoothing:
        image = span.view(attention.by_heads(query, attention.axis)[rows], 1)
        change = partial(_smoothed, smooth, span.grid, one.matrices)
        _change_heads(image, one.perturbation.heads(target), change)
    return query


def _smoothed(
    smooth: SmoothQueries, grid: TokenGrid, matrices: BlurMatrices, image: torch.Tensor
) -> torch.Tensor:
    return smooth(_tokens(image), grid, matrices).reshape(image.shape)


def _softened_output(
    attention: Attention, groups: list[RowGroup], out: torch.Tensor
) -> torch.Tensor:
    """Return an output that is drawn to that of smoothed queries as far as each group asks."""
    soft = [(rows, smooth) for rows, _, smooth in _smoothing(groups) if smooth.strength < 1]
    if not soft:
        return out
    out = out.clone()
    # Another node's code may go by the labels of all rows.
    whole = attention.run() if attention.chained else None
    for rows, smooth in soft:
        own = attention.of(rows).run() if whole is None else whole[rows]
        out[rows] = softened_attention(own, out[rows], smooth.strength)
    return out


def _mixed_output(
    attention: Attention, span: Span, groups: list[RowGroup], out: torch.Tensor, target: Target
) -> torch.Tensor:
    """Return an output whose image rows are others, made of them and their own values."""
    changes = [(g, one, one.perturbation.change) for g in groups for one in g.active]
    mixes = [(g, one, it.mix) for g, one, it in changes if isinstance(it, ChangeOutput)]
    out = out.clone() if mixes else out
    for group, one, mix in mixes:
        own = attention.of(group.rows)
        value = span.view(own.of_each_head(own.value), 1, span.key_offset)
        image = span.view(attention.by_heads(out, attention.out_axis)[group.rows], 1)
        _change_heads(image, one.perturbation.heads(target), mix, value)
    return out


def _change_heads(
    image: torch.Tensor,
    heads: tuple[int, ...] | None,
    change: Callable[..., torch.Tensor],
    *others: torch.Tensor,
) -> None:
    """Write into some heads of an image's tokens, or all, what `change` makes of them.

    It is given those heads of the image and of the others, `(rows, lines, columns, heads, dim)`.
    """
    index = slice(None) if heads is None else list(heads)
    image[..., index, :] = change(*(tokens[..., index, :] for tokens in (image, *others)))


def _show_probes(attention: Attention, span: Span, groups: list[RowGroup], target: Target) -> None:
    """Show probes the image's queries, and all keys, of the first sample that is smoothed."""
    for rows, one, smooth in _smoothing(groups):
        if one.probe is not None:
            first = attention.of(slice(rows.start, rows.start + 1))
            query = span.view(first.by_heads(first.query, first.axis), 1).flatten(1, 2)
            key = first.by_heads(first.key, first.axis)
            query, key = (tokens[0].transpose(0, 1) for tokens in (query, key))
            one.probe.measure(target, query, key, span.grid, smooth, one.matrices, attention.scale)


def _tokens(image: torch.Tensor) -> torch.Tensor:
    """Return `(rows, lines, columns, heads, dim)` as `(rows, tokens, channels)`."""
    return image.flatten(1, 2).flatten(2)
