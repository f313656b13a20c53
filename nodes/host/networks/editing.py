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

from ....seg_core import Target, column_mass, frame_shares, repeat_rows, require_heads
from ..batch.active import ActivePerturbation, RowGroup, row_groups
from ..settings.changes import Change, ChangeOutput, SmoothQueries
from ..settings.errors import GuidanceError
from .attention import Attention, laid_out
from .saliency import Mass, SaliencyRequest
from .span import Span


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
        """Return what changes a layer.

        Args:
            target: the layer.
            axis: ``"space"`` or ``"time"`` where the layer attends over each by itself.
        """
        here = [one for one in self.active if target in one.perturbation.targets]
        return here if axis is None else [one for one in here if _acts_over(one, axis)]

    def needs_one_query(self, target: Target, group: RowGroup) -> bool:
        """Tell whether one query of each row is enough for a group, and nobody measures others."""
        measured = any(target in request.targets for request in self.measured)
        change = _only_change(group, target)
        if change is None or measured or group.active[0].probe is not None:
            return False
        if isinstance(change, SmoothQueries):
            return change.one_query
        return isinstance(change, ChangeOutput) and not change.mix.needs_map

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
                mass = partial(_image_mass, attention, span, patch)
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
        ways = partial(_shortcut, attention, span, target)
        neighbours = [(way, list(some)) for way, some in groupby(groups, ways)]
        attending = [group for way, some in neighbours if way is None for group in some]
        query = _smoothed_queries(attention, span, attending, target)
        outs: list[torch.Tensor] = []
        for way, some in neighbours:
            if way is None:
                rows = slice(some[0].rows.start, some[-1].rows.stop)
                outs.append(attention.of(rows).run(query[rows]))
            else:
                outs += [way(attention.of(group.rows), span, group.active[0]) for group in some]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return _mixed_output(attention, span, groups, out, target)


def _acts_over(one: ActivePerturbation, axis: str) -> bool:
    change = one.perturbation.change
    return change.acts_over(axis) if isinstance(change, SmoothQueries) else axis == "space"


def _require_heads(one: ActivePerturbation, target: Target, count: int) -> None:
    try:
        name = one.perturbation.name([target])
        require_heads(one.perturbation.heads(target) or (), count, name)
    except ValueError as error:
        raise GuidanceError(f"{one.perturbation.label}: {error}") from None


def _image_mass(
    attention: Attention, span: Span, patch: tuple[int, int, int] | None, rows: slice
) -> Mass:
    """Return how much attention the image's tokens draw from each other, in some rows."""
    own = attention.of(rows)
    image = _tokens(span.view(own.by_heads(own.query, own.axis), 1))
    key = own.of_each_head(own.key).flatten(2)
    mass = column_mass(image, key, own.heads, scale=own.scale, mask=own.mask_of(span))
    image_keys = span.view(mass, 1, span.key_offset).flatten(1, 2)
    return Mass(frame_shares(image_keys, span.grid), span.grid, patch)


def _only_change(group: RowGroup, target: Target) -> Change | None:
    """Return the change of a group, if there is just one and it is of all heads."""
    if len(group.active) != 1 or group.active[0].perturbation.heads(target) is not None:
        return None
    return group.active[0].perturbation.change


def _shortcut(
    attention: Attention, span: Span, target: Target, group: RowGroup
) -> Callable[[Attention, Span, ActivePerturbation], torch.Tensor] | None:
    """Return what gives a group's output without attention of every query; None if nothing does."""
    change = _only_change(group, target)
    if attention.chained or not span.is_solid:
        return None
    if isinstance(change, SmoothQueries) and change.one_query and not attention.masks_queries:
        return _one_query
    is_whole = span.length == attention.queries == attention.keys
    if isinstance(change, ChangeOutput) and not change.mix.needs_map and is_whole:
        return _values
    return None


def _one_query(attention: Attention, span: Span, one: ActivePerturbation) -> torch.Tensor:
    """Return attention in which few queries stand for the image's; their output, for all."""
    smooth = one.perturbation.smooth
    assert smooth is not None
    query = attention.by_heads(attention.query, attention.axis)
    heads = query.shape[2:]
    means = smooth(_tokens(span.view(query, 1)), span.grid, one.matrices, True)
    before, _, after = query.split(
        [span.start, span.length, query.shape[1] - span.start - span.length], dim=1
    )
    short = torch.cat([before, means.unflatten(2, heads), after], dim=1)
    out = attention.run(laid_out(short, attention.axis))
    out = attention.by_heads(out, attention.out_axis)
    sizes = [before.shape[1], means.shape[1], after.shape[1]]
    before, rows, after = out.split(sizes, dim=1)
    image = repeat_rows(rows.flatten(2), span.grid, axes=smooth.axes).unflatten(2, heads)
    return laid_out(torch.cat([before, image, after], dim=1), attention.out_axis)


def _values(attention: Attention, span: Span, one: ActivePerturbation) -> torch.Tensor:
    """Return the values in the layout of the output, of whose map nothing will be left."""
    del span, one
    return laid_out(attention.of_each_head(attention.value), attention.out_axis)


def _smoothed_queries(
    attention: Attention, span: Span, groups: list[RowGroup], target: Target
) -> torch.Tensor:
    """Return queries, the image's smoothed over their grid as each group's perturbations ask."""
    smoothing = [(g, one) for g in groups for one in g.active if one.perturbation.smooth]
    query = attention.query.clone() if smoothing else attention.query
    for group, one in smoothing:
        image = span.view(attention.by_heads(query, attention.axis)[group.rows], 1)
        _change_heads(image, one.perturbation.heads(target), partial(_smoothed, span, one))
    return query


def _smoothed(span: Span, one: ActivePerturbation, image: torch.Tensor) -> torch.Tensor:
    smooth = one.perturbation.smooth
    assert smooth is not None
    return smooth(_tokens(image), span.grid, one.matrices, False).reshape(image.shape)


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
    """Write into some heads of an image's tokens what `change` makes of them.

    Args:
        image: `(rows, lines, columns, heads, dim)`.
        heads: the chosen ones; None for all.
        change: is given the chosen heads of the image and of the others, in that layout.
        others: whatever it needs besides, in the shape of the image.
    """
    if heads is None:
        image.copy_(change(image, *others))
        return
    chosen = [torch.stack([t.select(3, head) for head in heads], dim=3) for t in (image, *others)]
    for head, changed in zip(heads, change(*chosen).unbind(3), strict=True):
        image.select(3, head).copy_(changed)


def _show_probes(attention: Attention, span: Span, groups: list[RowGroup], target: Target) -> None:
    """Show probes the image's queries, and all keys, of the first sample that is smoothed."""
    for group in groups:
        for one in group.active:
            smooth = one.perturbation.smooth
            if one.probe is None or smooth is None:
                continue
            first = attention.of(slice(group.rows.start, group.rows.start + 1))
            query = span.view(first.by_heads(first.query, first.axis), 1).flatten(1, 2)
            key = first.by_heads(first.key, first.axis)
            query, key = (tokens[0].transpose(0, 1) for tokens in (query, key))
            one.probe.measure(target, query, key, span.grid, smooth, one.matrices, attention.scale)


def _tokens(image: torch.Tensor) -> torch.Tensor:
    """Return `(rows, lines, columns, heads, dim)` as `(rows, tokens, channels)`."""
    return image.flatten(1, 2).flatten(2)
