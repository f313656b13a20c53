"""Guiders: which prompts each of ComfyUI's own compares, before their first evaluation."""

from __future__ import annotations

import uuid
from collections.abc import Hashable
from typing import Any

from ...settings.branch import Branch

_SIDES = {"positive", "negative", "middle", "empty_negative_prompt"}


def expected_conds(guider: Any, branch: Branch) -> set[Hashable]:
    """Return the conds that a branch will ask for under a guider that ComfyUI ships.

    Under others with more than two sides `free` waits an evaluation: what it perturbs for nothing
    would be in the base prediction.
    """
    conds = getattr(guider, "conds", {})
    cond, uncond = "positive", "negative"
    if "middle" in conds:  # DualCFGGuider compares neighbours
        nested = getattr(guider, "nested", False)
        cond, uncond = ("positive", "middle") if nested else ("middle", "negative")
    if branch.side == "free" and conds.keys() - _SIDES:
        return set()
    side = cond if branch.side == "conditional" else uncond
    return {one["uuid"] for one in conds.get(side) or ()}


def tell_conds_apart(guider: Any) -> None:
    """Give each cond of a run an identity of its own.

    Where one prompt has an area and the other has none, the host copies a cond of the one to the
    other side together with its uuid. The dictionaries belong to this run alone.
    """
    seen = set[Hashable]()
    for conds in getattr(guider, "conds", {}).values():
        for cond in conds or ():
            if cond["uuid"] in seen:
                cond["uuid"] = uuid.uuid4()
            seen.add(cond["uuid"])
