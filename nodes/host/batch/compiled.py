"""Networks that torch has compiled: how they are known, and run without it where need be."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

CAN_RUN_EAGERLY = hasattr(torch.compiler, "set_stance")
"""Since torch 2.6 whatever is compiled can be run as it was before."""


def eager(module: Any) -> Any:
    """Return the module itself, where torch has put a compiled one around it."""
    return getattr(module, "_orig_mod", module)


def is_compiled_in_place(module: Any) -> bool:
    """Tell whether a module's own call is compiled, so that hooks on it are parts of the graph."""
    return getattr(module, "_compiled_call_impl", None) is not None


def is_compiled(module: Any) -> bool:
    """Tell whether torch has compiled a module: in place, or as an object around it."""
    return hasattr(module, "_orig_mod") or is_compiled_in_place(module)


def compiled_blocks(
    network: torch.nn.Module, blocks: Sequence[torch.nn.Module]
) -> frozenset[int] | None:
    """Return which blocks of a network are compiled, as wholes or parts of them.

    Returns:
        None if anything else of the network is compiled, or if blocks cannot be run eagerly.
    """
    inside = [set(block.modules()) for block in blocks]
    compiled = {module for module in network.modules() if is_compiled(module)}
    if compiled - set().union(*inside) or (compiled and not CAN_RUN_EAGERLY):
        return None
    return frozenset(n for n, modules in enumerate(inside) if not modules.isdisjoint(compiled))


def eagerly() -> AbstractContextManager[Any]:
    """Run compiled networks as they were before; graphs ignore what is changed for one call."""
    return torch.compiler.set_stance("force_eager") if CAN_RUN_EAGERLY else nullcontext()
