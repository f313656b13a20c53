"""Networks that torch has compiled: how they are known, and run without it where need be."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..settings.errors import GuidanceError

COMPILED_CALL = "_compiled_call_impl"
"""What runs a module that is compiled in place."""


def eager(module: Any) -> Any:
    """Return the module itself, where torch has put a compiled one around it."""
    return getattr(module, "_orig_mod", module)


def is_compiled_in_place(module: Any) -> bool:
    """Tell whether a module's own call is compiled: its graph knows nothing of a later forward."""
    return getattr(module, COMPILED_CALL, None) is not None


def is_compiled(module: Any) -> bool:
    """Tell whether torch has compiled a module: in place, or as an object around it."""
    return hasattr(module, "_orig_mod") or is_compiled_in_place(module)


def compiled_blocks(
    network: torch.nn.Module, blocks: Sequence[torch.nn.Module]
) -> frozenset[int] | None:
    """Return which blocks of a network are compiled, as wholes or parts; None if more of it is."""
    inside = [set(block.modules()) for block in blocks]
    compiled = {module for module in network.modules() if is_compiled(module)}
    if compiled - set().union(*inside):
        return None
    return frozenset(n for n, modules in enumerate(inside) if not modules.isdisjoint(compiled))


def eagerly() -> AbstractContextManager[Any]:
    """Run compiled networks as they were before; graphs ignore what is changed for one call.

    Raises:
        GuidanceError: if this torch cannot.
    """
    if not hasattr(torch.compiler, "set_stance"):
        raise GuidanceError(
            "To guide a compiled network takes torch 2.6 or later. Update torch, or leave out the "
            "node that compiles the model."
        )
    return torch.compiler.set_stance("force_eager")
