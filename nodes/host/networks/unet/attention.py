"""How the self-attention of a UNet is changed, or looked at, in one call of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules import attention

from .....seg_core import Target, column_mass
from ...calls.site import Site
from ..view import Mass, Watch
from .change import Attend, Change
from .place import Place

Options = dict[str, Any]


@contextmanager
def changed_attention(
    unet: Any, options: Options, sites: list[Site], present: Callable[[Target], int]
) -> Iterator[Options]:
    """Change the attention of some rows for the length of one call."""
    change = Change(unet, sites, present, partial(_minds_token_count, options))

    def attend(target: Target, q: Any, k: Any, v: Any, extra: Options, attend: Attend) -> Any:
        del target
        return change.attend(q, k, v, extra["n_heads"], attend)

    patches = dict(options.get("patches", {}))
    # First in line: what others do to the queries, they do to the smoothed ones.
    patches["attn1_patch"] = [change.before, *patches.get("attn1_patch", [])]
    patches["attn1_output_patch"] = [change.after, *patches.get("attn1_output_patch", [])]
    own = {**options, "patches": patches}
    with change.place.followed(change.targets(), change.over_time):
        yield replaced(own, change.attended(), attend)


@contextmanager
def watched_attention(
    unet: Any, options: Options, watch: Watch, present: Callable[[Target], int]
) -> Iterator[Options]:
    """Let somebody measure some self-attentions of one call."""
    place = Place(unet)

    def look(target: Target, q: Any, k: Any, v: Any, extra: Options, attend: Attend) -> Any:
        if place.target == target:
            if q.shape[:2] != k.shape[:2]:
                raise ValueError(
                    f"{watch.label}: block {place.name} has {q.shape[1]} queries for "
                    f"{k.shape[1]} keys, so its map cannot be laid over the image. A node such as "
                    "HyperTile or ToMe tiles or merges tokens there; leave it out, or choose other "
                    "blocks."
                )
            grid = place.grid(k, watch.label)

            def measure(rows: slice) -> Mass:
                return Mass(column_mass(q[rows], k[rows], extra["n_heads"]), grid)

            watch.keep(target, q.shape[0] // present(target), measure)
        return attend(q, k, v)

    chosen = list(watch.targets)
    with place.followed(chosen):
        yield replaced(options, chosen, look)


def replaced(
    options: Options, targets: Iterable[Target], instead: Callable[..., torch.Tensor]
) -> Options:
    """Return options in which `instead(target, q, k, v, extra, attend)` computes self-attention.

    `attend` is what would have computed it: another node's replacement, or the host.
    """
    tables = options.get("patches_replace", {})
    table = dict(tables.get("attn1", {}))
    for target in targets:
        place = (target.part, target.index, target.transformer)
        before = table.get(place, table.get(place[:2]))
        table[place] = _replacement(target, before, instead)
    return {**options, "patches_replace": {**tables, "attn1": table}}


def _replacement(
    target: Target, before: Callable[..., torch.Tensor] | None, instead: Callable[..., Any]
) -> Callable[..., torch.Tensor]:
    def replacement(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Options
    ) -> torch.Tensor:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if before is not None:
                return before(q, k, v, extra)
            return attention.optimized_attention(
                q,
                k,
                v,
                extra["n_heads"],
                attn_precision=extra.get("attn_precision"),
                transformer_options=extra,
            )

        return instead(target, q, k, v, extra, attend)

    return replacement


def _minds_token_count(options: Options, target: Target) -> bool:
    """Tell whether somebody works on a self-attention's rows and expects all of them."""
    patches = options.get("patches", {})
    table = options.get("patches_replace", {}).get("attn1", {})
    block = (target.part, target.index)
    return bool(
        patches.get("attn1_patch")
        or patches.get("attn1_output_patch")
        or table.keys() & {block, (*block, target.transformer)}
        or options.get("optimized_attention_override")
    )
