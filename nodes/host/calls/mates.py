"""Patches that make rows of other conds' rows: a perturbed prediction has mates of its own.

Some nodes make the attention of one side of cfg of that of both. A perturbed prediction is then one
of both sides, too, and such a patch is shown its rows in the order of the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .code import codes_of
from .rows import Rows

_PATCHES = "attn1_output_patch"
_LABELS = ("cond_or_uncond", "uuids")
Options = dict[str, Any]
Patch = Callable[[torch.Tensor, Options], torch.Tensor]


def see_mates(options: Options) -> bool:
    """Tell whether there are patches that may make rows of other conds' rows."""
    return any(map(_sees_mates, options.get("patches", {}).get(_PATCHES, ())))


def _sees_mates(patch: Patch) -> bool:
    """Tell whether a patch asks which rows are whose, as it must to make some of others."""
    return any(_LABELS[0] in code.co_consts for code in codes_of(patch))


def among_mates(options: Options, rows: Rows) -> Options:
    """Return options whose patches see each prediction of a batch by itself.

    Args:
        options: the host's options of the plain batch; not written to.
        rows: the batch, in which each prediction has rows of all conds.
    """
    chunks = len(options["cond_or_uncond"])
    patches = options.get("patches", {})
    if not rows.joins or chunks < 2 or _PATCHES not in patches:
        return options
    own = [
        _one_by_one(patch, chunks) if _sees_mates(patch) else patch for patch in patches[_PATCHES]
    ]
    return {**options, "patches": {**patches, _PATCHES: own}}


def _one_by_one(patch: Patch, chunks: int) -> Patch:
    def patched(out: torch.Tensor, extra: Options) -> torch.Tensor:
        count = len(extra["cond_or_uncond"])
        labels = {name: extra[name] for name in _LABELS if name in extra}
        own = {**extra, **{name: known[:chunks] for name, known in labels.items()}}
        predictions = out.unflatten(0, (count // chunks, -1))
        result = torch.cat([patch(one, own) for one in predictions])
        extra.update({**own, **labels})
        return result

    return patched
