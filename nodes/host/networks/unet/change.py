"""What happens to the rows of a UNet's self-attention, from its tokens to its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .....seg_core import Target
from ...calls.site import Part, Site, parts_of
from ...settings.changes import ChangeOutput, SmoothQueries
from ..heads import in_heads, is_mapless, smoothed_heads
from .place import Place

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Options = dict[str, Any]


@dataclass(frozen=True)
class Lane:
    """Neighbouring rows of a block's tokens that are treated alike, and their queries' tokens."""

    part: Part
    tokens: torch.Tensor
    is_short: bool
    """One token stands for all of a row's."""


class Change:
    """The changes of one call, from the tokens of a block to the output of its self-attention.

    The tokens that the queries are made from are smoothed instead of the queries: `to_q` is linear
    and has no bias, so both are the same. Keys and values, masks, precision, attention overrides
    and the patches of other nodes stay the host's business, in their own order after this one.
    Where one query is enough for a row, just one is projected, attends and is projected back; if
    the batch has other rows too, all their tokens stand in one long row meanwhile.
    """

    def __init__(
        self,
        unet: Any,
        sites: list[Site],
        present: Callable[[Target], int],
        minded: Callable[[Target], bool],
    ) -> None:
        self.place = Place(unet)
        self._sites = sites
        self._present = present
        self._minded = minded
        self._lanes: list[Lane] = []
        self._tokens = torch.empty(0)

    def targets(self) -> dict[Target, None]:
        """Return the targets of all changes, in the sites' order."""
        return dict.fromkeys(t for site in self._sites for t in site.perturbation.targets)

    @property
    def over_time(self) -> bool:
        """Tell whether any acts in attention over time."""
        return any(_acts(site, over_time=True) for site in self._sites)

    def attended(self) -> dict[Target, None]:
        """Return the targets whose attention must be computed by `attend`."""
        own = {
            target: None
            for site in self._sites
            for target in site.perturbation.targets
            if isinstance(site.perturbation.change, ChangeOutput) or site.perturbation.heads(target)
        }
        short = [s for s in self._sites if getattr(s.perturbation.change, "one_query", False)]
        targets = [t for site in short for t in site.perturbation.targets if not self._minded(t)]
        lengths_differ = {
            t: None
            for t in targets
            if len(parts_of(self._sites, self._present(t), self._present(t))) > 1
        }
        return own | lengths_differ

    def before(
        self, tokens: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra: Options
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the tokens that the queries of a block are made from."""
        del extra
        target = self.place.target
        self._lanes = []
        if target is None:
            return tokens, context, value
        sites = [
            site
            for site in self._sites
            if target in site.perturbation.targets and _acts(site, over_time=self.place.over_time)
        ]
        parts = parts_of(sites, self._present(target), tokens.shape[0])
        self._tokens = tokens
        self._lanes = [self._lane(part, target, tokens, context) for part in parts]
        return self._joined([lane.tokens for lane in self._lanes]), context, value

    def _lane(
        self, part: Part, target: Target, tokens: torch.Tensor, context: torch.Tensor
    ) -> Lane:
        own = tokens[part.rows]
        short = False
        for site in part.sites:
            alone = len(part.sites) == 1 and not self._minded(target)
            change, heads = site.perturbation.change, site.perturbation.heads(target)
            if isinstance(change, ChangeOutput):
                short = alone and is_mapless(change, heads)
                own = own[:, :1] if short else own
            if not isinstance(change, SmoothQueries) or heads is not None:
                continue
            grid = self.place.grid(tokens, site.perturbation.label)
            site.reached.add(target)
            short = alone and change.one_query
            smoothed = change.smooth(own, grid, site.matrices, short)
            if site.look is not None:
                attn = self.place.attn
                shown = own[0], smoothed[0], context[part.rows.start]
                site.look.at_tokens(target, attn, *shown, grid, change.smooth)
            own = smoothed
        return Lane(part, own, short)

    def _joined(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Return pieces of a batch as one: row by row, or in one long row if lengths differ."""
        if len(pieces) == 1:
            return pieces[0]
        if len({piece.shape[1] for piece in pieces}) > 1:
            return torch.cat([piece.reshape(1, -1, piece.shape[-1]) for piece in pieces], dim=1)
        return torch.cat(pieces)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, attend: Attend
    ) -> torch.Tensor:
        """Return the attention of a block whose queries were made by `before`."""
        lanes = self._lanes
        if not lanes:
            return attend(q, k, v)
        if any(self._smoothed_in_heads(lane) for lane in lanes):
            q = self._in_heads(q, k, heads)
        if any(lane.is_short for lane in lanes):
            outs = self._apart(q, k, v, attend)
        else:
            out = attend(q, k, v)
            outs = [out[lane.part.rows] for lane in lanes]
        changed = [
            self._mixed(lane, out, q, v, heads) for lane, out in zip(lanes, outs, strict=True)
        ]
        self._lanes = [
            Lane(lane.part, out, lane.is_short) for lane, out in zip(lanes, changed, strict=True)
        ]
        return self._joined(changed)

    def _apart(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attend: Attend
    ) -> list[torch.Tensor]:
        """Return the outputs lane by lane; neighbours with equally many queries attend together."""
        sizes = [lane.tokens.shape[:2] for lane in self._lanes]
        flat = self._parted(q)
        outs: list[torch.Tensor] = []
        first = 0
        while first < len(sizes):
            last = first + 1
            while last < len(sizes) and sizes[last][1] == sizes[first][1]:
                last += 1
            rows = slice(self._lanes[first].part.rows.start, self._lanes[last - 1].part.rows.stop)
            query = torch.cat(flat[first:last]) if last - first > 1 else flat[first]
            needed = [lane for lane in self._lanes[first:last] if not _is_replaced(lane)]
            out = attend(query, k[rows], v[rows]) if needed else query
            outs.extend(out.split([size[0] for size in sizes[first:last]]))
            first = last
        return outs

    def _smoothed_in_heads(self, lane: Lane) -> list[Site]:
        """Return the sites that smooth only some heads of a lane: the queries, not the tokens."""
        return [
            site
            for site in lane.part.sites
            if isinstance(site.perturbation.change, SmoothQueries)
            and site.perturbation.heads(self._target) is not None
        ]

    def _in_heads(self, q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
        """Return queries of which some heads are smoothed."""
        pieces = []
        for lane, own in zip(self._lanes, self._parted(q), strict=True):
            for site in self._smoothed_in_heads(lane):
                grid = self.place.grid(own, site.perturbation.label)
                own = smoothed_heads(site, self._target, heads, own, k[lane.part.rows.start], grid)
            pieces.append(own.reshape(-1, q.shape[-1]))
        return torch.cat(pieces).reshape(q.shape)

    def _parted(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return each lane's rows of queries, or of what became of them."""
        sizes = [lane.tokens.shape[:2] for lane in self._lanes]
        flat = tensor.reshape(-1, tensor.shape[-1]).split([rows * length for rows, length in sizes])
        return [one.reshape(*size, -1) for one, size in zip(flat, sizes, strict=True)]

    @property
    def _target(self) -> Target:
        assert self.place.target is not None
        return self.place.target

    def _mixed(
        self, lane: Lane, out: torch.Tensor, q: torch.Tensor, v: torch.Tensor, heads: int
    ) -> torch.Tensor:
        """Return a lane's output, drawn towards the values where it is to see itself."""
        for site in lane.part.sites:
            change = site.perturbation.change
            if not isinstance(change, ChangeOutput):
                continue
            own = v[lane.part.rows]
            if not lane.is_short and q.shape[:2] != v.shape[:2]:
                name = self.place.name
                raise ValueError(
                    f"{site.perturbation.label}: block {name} has {q.shape[1]} queries for "
                    f"{v.shape[1]} values, so no token can see itself. A node such as HyperTile or "
                    "ToMe tiles or merges them there; leave it out, or choose other blocks."
                )
            site.reached.add(self._target)
            chosen = site.perturbation.heads(self._target)
            out = in_heads(change.mix, chosen, heads, own if lane.is_short else out, own)
        return out

    def after(self, out: torch.Tensor, extra: Options) -> torch.Tensor:
        """Return the output of a block's self-attention with a token for each place again."""
        del extra
        lanes = self._lanes
        if len({lane.tokens.shape[1] for lane in lanes}) < 2:
            return out  # one token for each row: the host adds it to all of them
        tokens = self._tokens.shape[1]
        whole = [piece.expand(-1, tokens, -1) for piece in self._parted(out)]
        return torch.cat(whole)


def _is_replaced(lane: Lane) -> bool:
    return lane.is_short and isinstance(lane.part.sites[0].perturbation.change, ChangeOutput)


def _acts(site: Site, *, over_time: bool) -> bool:
    """Tell whether a site acts in attention over space, or over time."""
    change = site.perturbation.change
    if isinstance(change, SmoothQueries):
        return change.acts_over("time" if over_time else "space")
    return not over_time
