"""ControlNets beside a perturbed prediction: evaluated once, by the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Control = dict[str, list[torch.Tensor | None]]


class ControlStandIn:
    """A ControlNet that is evaluated only if nobody has its output already.

    To whoever looks at it, it is the ControlNet: what others set, delete or ask of it, they set,
    delete or ask of that one.
    """

    def __init__(self, original: Any, known: Callable[..., tuple[Any] | None]) -> None:
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_known", known)

    def get_control(
        self, x_noisy: torch.Tensor, t: Any, cond: Any, batched_number: int, options: dict[str, Any]
    ) -> Control | None:
        """Return what is known, in a tuple of its own, or else evaluate the ControlNet."""
        known = self._known(options, x_noisy)
        if known is not None:
            return known[0]
        return self._original.get_control(x_noisy, t, cond, batched_number, options)

    def get_instance_for_device(self, device: torch.device) -> ControlStandIn:
        """Return the stand-in for a device; where its ControlNet lies matters only if it runs."""
        return ControlStandIn(self._original.get_instance_for_device(device), self._known)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._original, name)


def control_rows(control: Control | None, rows: list[int], batch: int) -> Control | None:
    """Return some rows of a ControlNet's output, in lists that the host will not empty."""
    if control is None:
        return None

    def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
        # One row serves all; frames of a video may lie in the batch.
        if tensor is None or tensor.shape[0] == 1:
            return tensor
        return tensor.unflatten(0, (batch, -1))[rows].flatten(0, 1)

    return {part: [of(tensor) for tensor in residuals] for part, residuals in control.items()}
