"""Networks that torch has compiled: how they are known, and run without it for one call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def eager(module: Any) -> Any:
    """Return the module itself, where torch has put a compiled one around it."""
    return getattr(module, "_orig_mod", module)


def is_compiled(network: Any) -> bool:
    """Tell whether a network, or any part of it, is compiled: as a whole, in place or by blocks."""
    return isinstance(network, torch.nn.Module) and any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in network.modules()
    )


def eagerly() -> AbstractContextManager[Any]:
    """Run compiled networks as they were before; graphs ignore what is changed for one call."""
    stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    return nullcontext() if stance is None else stance("force_eager")
