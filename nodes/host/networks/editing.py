"""The one editor of attention: what is done to queries and outputs, whatever network they are of.

A network hands over one call of self-attention and says where the image's tokens lie. Queries
arrive as attention gets them, after normalisation, rotary embedding and other nodes' patches, so
that smoothing them is smoothing the attention's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ....seg_core import Target, mean_queries, repeat_rows, require_heads, softened_attention
from ..batch.active import ActivePerturbation, RowGroup, row_groups
from ..batch.network_call import NetworkCall
from ..batch.trees import joined
from ..settings.changes import ChangeOutput, SmoothQueries
from ..settings.errors import GuidanceError
from .attention import Attention, SaliencyRequest, Span, laid_out


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
        some = [*(one.perturbation for one in self.active), *self.measured]
        return list(dict.fromkeys(target for one in some for target in one.targets))

    def over(self, axis: str) -> AttentionEditor:
        """Return what acts over space or over time, where attention over each is by itself."""
        smooths = [(one, one.perturbation.smooth) for one in self.active]
        active = [o for o, it in smooths if axis in ("space" if it is None else it.axes)]
        return replace(self, active=active, measured=self.measured if axis == "space" else ())

    def acting(self, target: Target) -> list[ActivePerturbation]:
        """Return what changes a layer."""
        return [one for one in self.active if target in one.perturbation.targets]

    def measuring(self, target: Target) -> list[SaliencyRequest]:
        """Return who measures a layer."""
        return [request for request in self.measured if target in request.targets]

    def _groups(self, target: Target, size: int) -> list[RowGroup]:
        """Return the rows of a layer's tensor, `size` of them, grouped by what changes them."""
        return row_groups(self.acting(target), self.present(target), size)

    def _needs_one_query(self, target: Target, group: RowGroup) -> bool:
        """Tell whether one query of each row is enough for a group, and nobody measures others."""
        change = _short_cut(group, target)
        if change is None or self.measuring(target) or group.active[0].probe is not None:
            return False
        return isinstance(change, ChangeOutput) or change.strength == 1

    def project(self, target: Target, projection: NetworkCall) -> torch.Tensor:
        """Return the projected queries of a layer; where one stands for all, the mean token's.

        A projection is linear: that of the mean token is the mean of the projected tokens.
        """
        name, tokens = next(iter(projection.arguments.items()))
        groups = self._groups(target, tokens.shape[0])
        short = [self._needs_one_query(target, group) for group in groups]
        if not any(short):
            return projection.run()
        pieces = [
            tokens[group.rows].mean(dim=1, keepdim=True) if is_short else tokens[group.rows]
            for group, is_short in zip(groups, short, strict=True)
        ]
        flat = torch.cat([piece.flatten(0, 1) for piece in pieces])
        few = projection.replaced(**{name: flat}).run()
        few = few.split([piece.shape[:2].numel() for piece in pieces])
        shaped = [
            one.unflatten(0, piece.shape[:2]).expand(-1, tokens.shape[1], -1)
            for one, piece in zip(few, pieces, strict=True)
        ]
        return torch.cat(shaped)

    def run(self, attention: Attention, target: Target, span: Span) -> torch.Tensor:
        """Return the output of an attention, changed in some rows, and let it be measured."""
        for request in self.measuring(target):
            mass = partial(attention.image_mass, span)
            request.keep(target, attention.rows // self.present(target), mass)
        for one in self.acting(target):
            _require_heads(one, target, attention.heads)
            one.reached.add(target)
        parts = [
            _Part(attention.of(group.rows), span, target, group)
            for group in self._groups(target, attention.rows)
        ]
        for part in parts:
            part.show_probes()
        sizes = [part.attention.rows for part in parts]
        if attention.chained:  # another node's code may go by the labels of all rows
            outs = attention.run(joined([part.query() for part in parts])).split(sizes)
            plain = attention.run().split(sizes) if any(part.is_soft for part in parts) else outs
        else:
            outs = [part.run() for part in parts]
            plain = [
                part.attention.run() if part.is_soft else out
                for part, out in zip(parts, outs, strict=True)
            ]
        pairs = zip(parts, outs, plain, strict=True)
        return joined([part.changed(out, own) for part, out, own in pairs])


@dataclass(frozen=True)
class _Part:
    """Rows of an attention that the same perturbations change.

    Attributes:
        attention: that of these rows.
        span: where the image's tokens lie.
        target: the layer.
        group: the rows, and what changes them.
    """

    attention: Attention
    span: Span
    target: Target
    group: RowGroup

    @property
    def smoothing(self) -> list[tuple[ActivePerturbation, SmoothQueries]]:
        """Return who smooths the queries, and how."""
        changes = [(one, one.perturbation.smooth) for one in self.group.active]
        return [(one, smooth) for one, smooth in changes if smooth is not None]

    @property
    def is_soft(self) -> bool:
        """True if the plain output is mixed with that of smoothed queries."""
        return any(smooth.strength < 1 for _, smooth in self.smoothing)

    def query(self) -> torch.Tensor:
        """Return the queries, the image's smoothed over their grid."""
        attention = self.attention
        query = attention.query.clone() if self.smoothing else attention.query
        for one, smooth in self.smoothing:
            change = partial(smooth, grid=self.span.grid, matrices=one.matrices)
            self._change_image(one, attention.by_heads(query, attention.axis), change)
        return query

    def run(self) -> torch.Tensor:
        """Return the output for smoothed queries, computed for no more of them than it takes."""
        attention, span = self.attention, self.span
        change = _short_cut(self.group, self.target) if span.is_solid else None
        if isinstance(change, SmoothQueries) and not attention.masks_queries:
            return _of_mean_queries(attention, span, change)
        is_whole = span.length == attention.queries == attention.keys
        if isinstance(change, ChangeOutput) and is_whole:  # any output will do
            return laid_out(attention.of_each_head(attention.value), attention.out_axis)
        return attention.run(self.query())

    def changed(self, out: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """Return the output as it is asked for, from that of smoothed queries and the plain one."""
        attention, span = self.attention, self.span
        for _, smooth in self.smoothing:
            if smooth.strength < 1:
                out = softened_attention(plain, out, smooth.strength)
        for one in self.group.active:
            change = one.perturbation.change
            if isinstance(change, ChangeOutput):
                out = out.clone()
                value = span.view(attention.of_each_head(attention.value), 1, span.key_offset)
                tokens = attention.by_heads(out, attention.out_axis)
                self._change_image(one, tokens, change.mix, value)
        return out

    def _change_image(
        self,
        one: ActivePerturbation,
        tokens: torch.Tensor,
        change: Callable[..., torch.Tensor],
        *others: torch.Tensor,
    ) -> None:
        """Write into the chosen heads of the image's tokens what `change` makes of them.

        It is given those heads of the image, and of others, as `(rows, tokens, channels)`.
        """
        image, heads = self.span.view(tokens, 1), one.perturbation.heads[self.target]
        index = slice(None) if heads is None else list(heads)
        chosen = [some[..., index, :] for some in (image, *others)]
        image[..., index, :] = change(*map(_flat, chosen)).reshape(chosen[0].shape)

    def show_probes(self) -> None:
        """Show probes the image's queries, and all keys, of the first sample."""
        for one, smooth in self.smoothing:
            if one.probe is not None:
                first, grid = self.attention.of(slice(0, 1)), self.span.grid
                query = self.span.view(first.by_heads(first.query, first.axis), 1).flatten(1, 2)
                key = first.by_heads(first.key, first.axis)
                query, key = (tokens[0].transpose(0, 1) for tokens in (query, key))
                one.probe.measure(self.target, query, key, grid, smooth, one.matrices, first.scale)


def _require_heads(one: ActivePerturbation, target: Target, count: int) -> None:
    try:
        name = one.perturbation.name([target])
        require_heads(one.perturbation.heads[target] or (), count, name)
    except ValueError as error:
        raise GuidanceError(f"{one.perturbation.label}: {error}") from None


def _short_cut(group: RowGroup, target: Target) -> SmoothQueries | ChangeOutput | None:
    """Return the change of some rows if it is the only one, of all heads, and needs no map."""
    if len(group.active) != 1 or group.active[0].perturbation.heads[target] is not None:
        return None
    change = group.active[0].perturbation.change
    if isinstance(change, SmoothQueries):
        return change if change.one_query else None
    return change if isinstance(change, ChangeOutput) and not change.needs_map else None


def _of_mean_queries(attention: Attention, span: Span, smooth: SmoothQueries) -> torch.Tensor:
    """Return attention in which few queries stand for the image's; their output, for all."""
    query = attention.by_heads(attention.query, attention.axis)
    heads = query.shape[2:]
    means = mean_queries(_flat(span.view(query, 1)), span.grid, axes=smooth.axes)
    means = means.unflatten(2, heads)
    start, stop = span.start, span.start + span.length
    short = torch.cat([query[:, :start], means, query[:, stop:]], dim=1)
    out = attention.run(laid_out(short, attention.axis))
    out = attention.by_heads(out, attention.out_axis)
    stop = start + means.shape[1]
    rows = out[:, start:stop].flatten(2)
    image = repeat_rows(rows, span.grid, axes=smooth.axes).unflatten(2, heads)
    whole = torch.cat([out[:, :start], image, out[:, stop:]], dim=1)
    return laid_out(whole, attention.out_axis)


def _flat(image: torch.Tensor) -> torch.Tensor:
    """Return `(rows, lines, columns, heads, dim)` as `(rows, tokens, channels)`."""
    return image.flatten(1, 2).flatten(2)
