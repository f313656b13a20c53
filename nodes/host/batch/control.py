"""ControlNets beside a perturbed prediction that was made with the base prediction already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Control = dict[str, list[torch.Tensor | None]]


class ControlStandIn:
    """A ControlNet that is evaluated only if its output is needed.

    To whoever looks at it, it is the ControlNet: what others set, delete or ask of it, they set,
    delete or ask of that one.

    Args:
        original: the ControlNet.
        needed: is given the host's options and the latent of a call.
    """

    def __init__(self, original: Any, needed: Callable[[Any, torch.Tensor], bool]) -> None:
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_needed", needed)

    def get_control(
        self, x_noisy: torch.Tensor, t: Any, cond: Any, batched_number: int, options: dict[str, Any]
    ) -> Control | None:
        """Return nothing where nothing is needed, or else evaluate the ControlNet."""
        if not self._needed(options, x_noisy):
            return None
        return self._original.get_control(x_noisy, t, cond, batched_number, options)

    def get_instance_for_device(self, device: torch.device) -> ControlStandIn:
        """Return the stand-in for a device; where its ControlNet lies matters only if it runs."""
        return ControlStandIn(self._original.get_instance_for_device(device), self._needed)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._original, name)
