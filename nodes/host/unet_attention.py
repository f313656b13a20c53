"""How the self-attention of a UNet is changed, or looked at, in one call of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules import attention

from ...seg_core import Target, TokenGrid, halved_grid
from .call import Call
from .perturbation import BlockPerturbation, Site, Smooth

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Place = tuple[str, int, int]
Keep = Callable[[Target, torch.Tensor, torch.Tensor, int, TokenGrid], None]


@dataclass(frozen=True, eq=False)
class QuerySmoothing(BlockPerturbation):
    """Changes the queries of chosen self-attention blocks.

    The tokens that the queries are made from are smoothed instead of the queries: `to_q` is linear
    and has no bias, so both are the same. Keys and values, masks, precision, attention overrides
    and the patches of other nodes stay the host's business, in their own order after this one.
    """

    smooth: Smooth

    def install(self, call: Call, site: Site) -> None:
        """Apply the change to one call."""
        places = _places(self.targets)
        one_query = self.smooth.collapses and site.rows is None and not _minds_token_count(call)

        def smooth_queries(
            tokens: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra: dict[str, Any]
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            target = places.get(_place(extra))
            if target is None or target in site.reached:  # reached twice: attention over time
                return tokens, context, value
            grid = token_grid(tokens, extra, self.name([target]))
            site.reached.add(target)
            smoothed = self._smoothed(tokens, grid, site, one_query, call.x.shape[0])
            if site.look is not None:
                first = site.rows[0].start * tokens.shape[0] // call.x.shape[0] if site.rows else 0
                shown = tokens[first], smoothed[first], context[first]
                attn = self.network.self_attention(target)
                site.look.at_tokens(target, attn, *shown, grid, self.smooth)
            return smoothed, context, value

        # First in line: what others do to the queries, they do to the smoothed ones.
        call.patch("attn1_patch", [smooth_queries, *call.patches("attn1_patch")])

    def _smoothed(
        self, tokens: torch.Tensor, grid: TokenGrid, site: Site, one_query: bool, batch: int
    ) -> torch.Tensor:
        if site.rows is None:
            return self.smooth(tokens, grid, site, one_query)
        changed = tokens.clone()
        frames = tokens.shape[0] // batch
        for rows in site.rows:
            part = slice(rows.start * frames, rows.stop * frames)
            changed[part] = self.smooth(tokens[part], grid, site, False)
        return changed


@dataclass(frozen=True, eq=False)
class IdentityAttention(BlockPerturbation):
    r"""Draws the attention map of chosen blocks towards the identity, each token seeing itself.

    $$O = (1 - s)\,A V + s\,V$$

    Source: PAG, arXiv:2403.17377, for strength 1; SoftPAG, arXiv:2506.10978, between.
    """

    strength: float

    def install(self, call: Call, site: Site) -> None:
        """Apply the change to one call."""

        def see_itself(
            target: Target,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            extra: dict[str, Any],
            attend: Attend,
        ) -> torch.Tensor:
            del extra
            if target in site.reached:  # reached twice: attention over time
                return attend(q, k, v)
            if q.shape[:2] != v.shape[:2]:
                raise ValueError(
                    f"{self.label}: block {self.name([target])} has {q.shape[1]} queries for "
                    f"{v.shape[1]} values, so no token can see itself. A node such as HyperTile or "
                    "ToMe tiles or merges them there; leave it out, or choose other blocks."
                )
            site.reached.add(target)
            if self.strength == 1 and site.rows is None:
                return v
            return self._towards(v, attend(q, k, v), site.rows, call.x.shape[0])

        replace_attention(call, self.targets, see_itself)

    def _towards(
        self, v: torch.Tensor, out: torch.Tensor, rows: list[slice] | None, batch: int
    ) -> torch.Tensor:
        if rows is None:
            return torch.lerp(out, v.to(out.dtype), self.strength)
        changed = out.clone()
        frames = out.shape[0] // batch
        for one in rows:
            part = slice(one.start * frames, one.stop * frames)
            changed[part] = torch.lerp(out[part], v[part].to(out.dtype), self.strength)
        return changed


def watch_attention(
    call: Call, targets: Iterable[Target], keep: Keep, name: Callable[[list[Target]], str]
) -> None:
    """Show `keep` the queries and keys of some self-attentions of one call."""
    seen: set[Target] = set()

    def look(
        target: Target,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        extra: dict[str, Any],
        attend: Attend,
    ) -> torch.Tensor:
        if target not in seen:  # the second time it is attention over time
            seen.add(target)
            keep(target, q, k, extra["n_heads"], token_grid(k, extra, name([target])))
        return attend(q, k, v)

    replace_attention(call, targets, look)


def replace_attention(call: Call, targets: Iterable[Target], instead: Callable[..., Any]) -> None:
    """Let `instead(target, q, k, v, extra, attend)` compute some self-attentions of one call.

    `attend` is what would have computed them: another node's replacement, or the host.
    """
    replaced = call.options.get("patches_replace", {})
    table = dict(replaced.get("attn1", {}))
    for place, target in _places(targets).items():
        before = table.get(place, table.get(place[:2]))
        table[place] = _replacement(target, before, instead)
    call.options = {**call.options, "patches_replace": {**replaced, "attn1": table}}


def _replacement(
    target: Target, before: Callable[..., torch.Tensor] | None, instead: Callable[..., Any]
) -> Callable[..., torch.Tensor]:
    def replacement(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]
    ) -> torch.Tensor:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if before is not None:
                return before(q, k, v, extra)
            return attention.optimized_attention(
                q,
                k,
                v,
                extra["n_heads"],
                attn_precision=extra["attn_precision"],
                transformer_options=extra,
            )

        return instead(target, q, k, v, extra, attend)

    return replacement


def _places(targets: Iterable[Target]) -> dict[Place, Target]:
    return {(t.part, t.index, t.transformer): t for t in targets}


def _place(extra: dict[str, Any]) -> Place:
    return (*extra["block"], extra.get("block_index", 0))


def _minds_token_count(call: Call) -> bool:
    """Tell whether another node works on the self-attention's rows and expects all of them."""
    return bool(
        call.patches("attn1_patch")
        or call.patches("attn1_output_patch")
        or call.options.get("patches_replace", {}).get("attn1")
        or call.options.get("optimized_attention_override")
    )


def token_grid(tokens: torch.Tensor, extra: dict[str, Any], block: str) -> TokenGrid:
    """Return the grid of a block's tokens, as the host tells it.

    Raises:
        ValueError: if the tokens are not that grid.
    """
    shape = extra.get("activations_shape")
    candidates = [tuple(shape[-2:])] if shape else _halvings(extra["original_shape"])
    for height, width in candidates:
        if height * width == tokens.shape[1]:
            return TokenGrid(1, height, width)
    expected = " or ".join(f"{h}x{w} = {h * w}" for h, w in candidates)
    raise ValueError(
        f"Smoothed Energy Guidance: block {block} has {tokens.shape[1]} tokens, which is not its "
        f"grid of {expected}. A node before it merges or tiles tokens in a way of its own; leave "
        "that node out, or choose other blocks."
    )


def _halvings(shape: list[int]) -> list[tuple[int, int]]:
    return [halved_grid(shape[-2], shape[-1], level) for level in range(8)]
