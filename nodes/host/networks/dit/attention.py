"""How the self-attention of a diffusion transformer is changed in one call of the model.

Through the host's `optimized_attention_override`: queries arrive there after normalisation and
rotary embedding, so that smoothing them is smoothing the attention's logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .....seg_core import Target, column_mass, frame_shares, repeat_rows, require_heads
from ...calls.blocks import hooked
from ...calls.site import Part, Site, parts_of
from ...settings.changes import ChangeOutput, Smooth, SmoothQueries
from ..heads import in_heads
from ..span import Span
from ..view import Mass, Watch
from .host_attention import Attention
from .layout import Layout

Options = dict[str, Any]
_OVERRIDE = "optimized_attention_override"


class Place:
    """Which target's block runs, and the how manieth attention in it."""

    def __init__(self, targets: list[Target], *, first_only: bool) -> None:
        self._targets = targets
        self._first_only = first_only
        self._target: Target | None = None
        self._nth = 0

    def enter(self, number: int, *_: Any) -> None:
        """Note that a block begins."""
        self._target, self._nth = self._targets[number], 0

    def leave(self, *_: Any) -> None:
        """Note that it ends."""
        self._target = None

    @property
    def is_first(self) -> bool:
        """Tell whether the attention that runs is the block's first."""
        return self._nth == 1

    def next(self) -> Target | None:
        """Return the target whose self-attention comes next; None if it is another's."""
        self._nth += 1
        return None if self._first_only and self._nth > 1 else self._target


@contextmanager
def changed_attention(
    modules: dict[Target, torch.nn.Module],
    layout: Layout,
    options: Options,
    sites: list[Site],
    present: Callable[[Target], int],
    watches: Sequence[Watch],
) -> Iterator[Options]:
    """Change the attention of some rows for the length of one call, or look at it.

    Args:
        modules: the targets' blocks.
        layout: where the image's tokens lie.
        options: the host's options; not written to.
        sites: what is changed, in which rows.
        present: the rows of the batch that are computed at a target.
        watches: who looks.
    """
    before = options.get(_OVERRIDE)
    place = Place(list(modules), first_only=layout.family.first_only)

    def override(func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        attend = func if before is None else functools.partial(before, func)
        attention = Attention(attend, args, kwargs, chained=before is not None)
        target = place.next()
        if target is None:
            return attention.run()
        seen = kwargs.get("transformer_options") or {}
        span = layout.find(attention.queries, attention.keys, seen)
        if span is None:
            return attention.run()
        for watch in watches:
            # A block may attend twice: what counts is the one in which all tokens are.
            if target in watch.targets and place.is_first:
                measure = functools.partial(image_mass, attention, span, layout.patch)
                watch.keep(target, attention.query.shape[0] // present(target), measure)
        here = [site for site in sites if target in site.perturbation.targets]
        if not here:
            return attention.run()
        parts = parts_of(here, present(target), attention.query.shape[0])
        for site in here:
            require_heads(
                site.perturbation.heads(target) or (),
                attention.heads,
                site.perturbation.selection.name([target]),
            )
            site.reached.add(target)
        show_queries(attention, span, parts, target)
        return changed(attention, span, parts, target)

    with hooked(list(modules.values()), place.enter, place.leave):
        yield {**options, _OVERRIDE: override}


def image_mass(attention: Attention, span: Span, patch: tuple[int, int, int], rows: slice) -> Mass:
    """Return how much attention the image's tokens draw from each other, in some rows."""
    own = attention.of(rows)
    query, key = own.as_sequences()
    image = span.view(query, 1).flatten(1, 2)
    mask = own.mask_of(span)
    mass = column_mass(image, key, own.heads, scale=own.scale, mask=mask)
    image_keys = span.view(mass, 1, span.key_offset).flatten(1, 2)
    return Mass(frame_shares(image_keys, span.grid), span.grid, patch)


def changed(attention: Attention, span: Span, parts: list[Part], target: Target) -> torch.Tensor:
    """Return an attention whose image rows are changed, part by part of the batch."""
    outs: list[torch.Tensor] = []
    waiting: list[tuple[Part, torch.Tensor]] = []  # neighbours that attend together

    def attend_waiting() -> None:
        if waiting:
            rows = slice(waiting[0][0].rows.start, waiting[-1][0].rows.stop)
            queries = [query for _, query in waiting]
            query = queries[0] if len(queries) == 1 else torch.cat(queries)
            out = attention.of(rows).run(query)
            outs.extend(out.split([query.shape[0] for query in queries]))
            waiting.clear()

    for part in parts:
        own = attention.of(part.rows)
        if _is_one_query(own, span, part, target):
            attend_waiting()
            outs.append(one_query(own, span, part.sites[0]))
        else:
            waiting.append((part, smoothed_queries(own, span, part, target)))
    attend_waiting()
    mixed = [
        mixed_output(attention, span, part, out, target)
        for part, out in zip(parts, outs, strict=True)
    ]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def smoothed_queries(attention: Attention, span: Span, part: Part, target: Target) -> torch.Tensor:
    """Return queries, the image's smoothed over their grid as the sites of a part ask."""
    query, axis = attention.query, attention.axis
    for site in part.sites:
        change = site.perturbation.change
        if isinstance(change, SmoothQueries):
            smooth = functools.partial(_smoothed, change.smooth, axis, span, site)
            heads = site.perturbation.heads(target)
            query = in_heads(smooth, heads, attention.heads, query, apart=axis == 2)
    return query


def _smoothed(
    smooth: Smooth, axis: int, span: Span, site: Site, query: torch.Tensor
) -> torch.Tensor:
    query = query.clone()
    view = span.view(query, axis)
    smoothed = smooth(_sequences(view, axis), span.grid, site.matrices, False)
    view.copy_(smoothed.reshape(view.shape))
    return query


def mixed_output(
    attention: Attention, span: Span, part: Part, out: torch.Tensor, target: Target
) -> torch.Tensor:
    """Return an output whose image rows are others, made of them and their own values."""
    for site in part.sites:
        change = site.perturbation.change
        if isinstance(change, ChangeOutput):
            axis = attention.out_axis
            own = span.view(attention.of(part.rows).value_as_output(), axis, span.key_offset)
            out = out.clone()
            image = span.view(out, axis)
            heads = site.perturbation.heads(target)
            apart = axis == 2
            image.copy_(in_heads(change.mix, heads, attention.heads, image, own, apart=apart))
    return out


def one_query(attention: Attention, span: Span, site: Site) -> torch.Tensor:
    """Return attention in which few queries stand for the image's; their output, for all."""
    smooth: Smooth = site.perturbation.change.smooth  # type: ignore[union-attr]
    query, axis, grid = attention.query, attention.axis, span.grid
    view = span.view(query, axis)
    means = smooth(_sequences(view, axis), grid, site.matrices, True)
    count = means.shape[1]
    means = means.reshape(*query.shape[:axis], count, *query.shape[axis + 1 :])
    rest = attention.queries - span.start - span.length
    tail = query.narrow(axis, span.start + span.length, rest)
    short = torch.cat([query.narrow(axis, 0, span.start), means, tail], dim=axis)
    out, axis = attention.run(short), attention.out_axis
    before, rows, after = out.split([span.start, count, rest], dim=axis)
    flat = rows.flatten(0, 1) if axis == 2 else rows
    rows = repeat_rows(flat, grid, axes=smooth.axes).reshape(
        *rows.shape[:axis], grid.tokens, *rows.shape[axis + 1 :]
    )
    return torch.cat([before, rows, after], dim=axis)


def show_queries(attention: Attention, span: Span, parts: list[Part], target: Target) -> None:
    """Show probes the image's queries, and all keys, of the first sample that is smoothed."""
    for part in parts:
        for site in part.sites:
            smooth = site.perturbation.smooth
            if site.look is None or smooth is None:
                continue
            first = attention.of(slice(part.rows.start, part.rows.start + 1))
            axis = attention.axis
            query = _sequences(span.view(first.query, axis), axis)
            key = first.args[1]
            if axis == 1:
                width = query.shape[-1] // attention.heads
                query, key = (t[0].unflatten(-1, (-1, width)).transpose(0, 1) for t in (query, key))
            else:
                key = key[0]
            scale = attention.kwargs.get("scale")
            site.look.at_queries(target, query, key, span.grid, smooth, site.matrices, scale)


def _is_one_query(attention: Attention, span: Span, part: Part, target: Target) -> bool:
    if len(part.sites) != 1 or part.sites[0].perturbation.heads(target) is not None:
        return False
    change = part.sites[0].perturbation.change
    one = isinstance(change, SmoothQueries) and change.one_query
    return one and span.is_solid and not attention.chained and not attention.masks_queries


def _sequences(view: torch.Tensor, axis: int) -> torch.Tensor:
    tokens = view.flatten(axis, axis + 1)
    return tokens.flatten(0, 1) if axis == 2 else tokens
