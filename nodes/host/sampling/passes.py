"""From the host's innermost `apply_model` wrapper to the pass that a model call belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..calls.call import KEY, Call


def apply_model(
    executor: Callable[..., torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: torch.Tensor | None = None,
    c_crossattn: torch.Tensor | None = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Wrap one model call of the host for the pass that it belongs to."""
    options = transformer_options or {}
    call = Call(executor, x, t, c_concat, c_crossattn, control, options, kwargs)
    return options[KEY].apply(call)
