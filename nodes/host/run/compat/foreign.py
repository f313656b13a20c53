"""Whether code that is not the host's acts inside of a network, by where the host lets it in."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from ...batch.call import Call
from ...batch.compiled import is_compiled
from .caches import exchanged_methods


def foreign_code(call: Call) -> frozenset[Hashable]:
    """Return what acts inside of a network in one call besides the host; empty if nothing does.

    Patches and replacements, an attention override, parts and methods of the network that were
    exchanged. Wrappers are not among them: rows join inside of those, where nobody sees them. Each
    is named by where it acts and whose code it is, so that a patch that is made anew for each call
    is the same one.
    """
    methods = exchanged_methods(call.model.diffusion_model).items()
    patcher = getattr(call.model, "current_patcher", None)
    parts = getattr(patcher, "object_patches", {}).items()
    exchanged = (n for n, v in parts if n.startswith("diffusion_model") and not is_compiled(v))
    own = ((name, _code(value)) for name, value in methods)
    return patches_in(call.options).union(own, exchanged)


def may_mix_rows(foreign: frozenset[Hashable]) -> bool:
    """Tell whether any of what acts there may make rows of other rows, or count on them.

    A replacement of self-attention, as ComfyUI's SAG has one, does neither: it notes what it sees
    of one side, and a pass of its own for the other side would disturb it.
    """
    return any(not isinstance(one, tuple) or one[0] != "attn1" for one in foreign)


def patches_in(options: dict[str, Any]) -> frozenset[Hashable]:
    """Return the patches among the host's options, as the network sees them."""
    return frozenset(_patches(options))


def _patches(options: dict[str, Any]) -> Iterator[Hashable]:
    for name, patches in options.get("patches", {}).items():
        yield from ((name, _code(patch)) for patch in patches)
    for name, table in options.get("patches_replace", {}).items():
        yield from ((name, _code(patch)) for patch in table.values())
    if "optimized_attention_override" in options:
        yield "override", _code(options["optimized_attention_override"])


def _code(function: Any) -> Hashable:
    """Return whose code a function is: it outlives the function itself."""
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", type(function))
