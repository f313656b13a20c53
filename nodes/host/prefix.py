"""The record of one step: what the main pass left behind, for which cond, and if it may be used.

It holds values and judges them; which hooks of a network fill and use it is the network's business.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

Control = dict[str, list[torch.Tensor | None]]

_MIXED = "only some conds of the batch have a ControlNet"


class NotReusable(Exception):  # noqa: N818 (control flow with a reason, no error)
    """Why a perturbed pass has to compute everything itself."""


@dataclass
class Kept:
    """What the main pass left behind for one cond: its rows of each tensor, no others."""

    rows: slice
    shape: torch.Size
    device: torch.device
    signature: Hashable
    control: Control | None = None
    tensors: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    missing: str = ""
    """Why there are no tensors, where that is known."""

    def keep(self, name: Hashable, batch: torch.Tensor) -> None:
        """Keep this cond's rows of a tensor. A copy: the host adds ControlNet output in place."""
        if batch.shape[0] % self.shape[0] == 0:
            scale = batch.shape[0] // self.shape[0]  # frames of a video lie in the batch
            self.tensors[name] = batch[self.rows.start * scale : self.rows.stop * scale].clone()

    def keep_control(self, control: Control | None) -> None:
        """Keep this cond's rows of a ControlNet's output, in lists that the host will not empty."""
        if control is None:
            return
        self.control = {
            part: [None if t is None else self._control_rows(t) for t in tensors]
            for part, tensors in control.items()
        }

    def _control_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[0] == 1:
            return tensor  # one for all: the host broadcasts it
        scale = tensor.shape[0] // self.shape[0]
        return tensor[self.rows.start * scale : self.rows.stop * scale]


class Prefix:
    """The kept conds of one step, by cond identity and context window."""

    def __init__(self) -> None:
        self.open = False
        self._kept: dict[Hashable, Kept | None] = {}

    def begin(self, key: Hashable, kept: Kept) -> bool:
        """Reserve a place for a cond; False if its identity turns out to be ambiguous."""
        first = key not in self._kept
        # Seen twice in one main pass: something cuts the latent into pieces of its own.
        self._kept[key] = kept if first else None
        return first

    def find(self, key: Hashable) -> Kept:
        """Return what was kept for a cond.

        Raises:
            NotReusable: if nothing was, or if it is not certain to be this cond's.
        """
        kept = self._kept.get(key)
        if kept is None:
            raise NotReusable(
                "another node splits the latent" if key in self._kept else "cond was not evaluated"
            )
        return kept

    def clear(self) -> None:
        """Let go of every tensor."""
        self._kept.clear()
        self.open = False


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the rows of several conds as one batch."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def joined_control(controls: list[Control | None], rows: int) -> Control | None:
    """Return the ControlNet output of several conds as one batch, in lists of its own.

    Args:
        controls: what was kept for each cond.
        rows: the rows of one cond; residuals of one row serve all of them.

    Raises:
        NotReusable: if only some of the conds have a ControlNet.
    """
    present = [control for control in controls if control is not None]
    if not present:
        return None
    if len(present) < len(controls):
        raise NotReusable(_MIXED)
    return {
        part: [_joined_residual([c[part][i] for c in present], rows) for i in range(len(residuals))]
        for part, residuals in present[0].items()
    }


def _joined_residual(residuals: list[torch.Tensor | None], rows: int) -> torch.Tensor | None:
    if all(r is residuals[0] for r in residuals):
        return residuals[0]
    present = [r for r in residuals if r is not None]
    if len(present) < len(residuals):
        raise NotReusable(_MIXED)
    return torch.cat([r.expand(rows, *r.shape[1:]) if len(r) == 1 else r for r in present])
