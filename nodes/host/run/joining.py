"""Whether rows of perturbed predictions may join the calls of the base prediction.

Nothing is predicted of other nodes' code: where any acts on the network, the first joined call of a
run is proved. The call is made alone as the host made it; in the joined one its rows must come out
the same, and so must rows that join it without a perturbation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

import comfy.model_management
import torch

from ..batch.trees import tensors_in

REORDERED = "another node reorders the rows"
_TF32 = 2.0**-10


class Joining:
    """What one run knows of joining.

    Attributes:
        obstacle: why rows no longer join; empty while they may.
        mixes: code of other nodes makes rows of other rows of their batch; None if not measured.
    """

    def __init__(self) -> None:
        self.obstacle = ""
        self.mixes: bool | None = None
        self._proved = set[Hashable]()

    def stop(self, obstacle: str) -> None:
        """Let no more rows join in this run."""
        self.obstacle = self.obstacle or obstacle

    def unproved(self, foreign: frozenset[Hashable]) -> frozenset[Hashable]:
        """Return which code of other nodes no call of this run was proved with."""
        return foreign - self._proved

    def accept(self, foreign: Iterable[Hashable]) -> None:
        """Note that a call was proved."""
        self._proved.update(foreign)
        self.mixes = bool(self.mixes)

    def reject(self, obstacle: str) -> None:
        """Note that a call was not as the host made it, and let no more rows join."""
        self.mixes = True
        self.stop(obstacle)


def equal_within_rounding(one: Any, other: Any, dtype: torch.dtype) -> bool:
    """Tell whether two outputs of a network are the same but for rounding, at the cost of a wait.

    Their root mean square distance is compared with the square root of the dtype's precision: half
    of its digits.
    """
    epsilon = torch.finfo(dtype).eps if dtype.is_floating_point else _TF32
    for a, b in zip(tensors_in(one), tensors_in(other), strict=True):
        if a.shape != b.shape:
            return False
        if a.is_cuda and torch.backends.cudnn.allow_tf32:
            epsilon = max(epsilon, _TF32)
        a, b = a.double(), b.double()
        if not (a - b).norm() <= epsilon**0.5 * b.norm():
            return False
    return True


class RandomNumbers:
    """The state of the generators that code of other nodes may draw from."""

    def __init__(self, device: torch.device) -> None:
        self._restore: list[Callable[[], Any]] = [
            partial(torch.set_rng_state, torch.get_rng_state()),
            partial(random.setstate, random.getstate()),
        ]
        if device.type == "cuda":
            state = torch.cuda.get_rng_state(device)
            self._restore.append(partial(torch.cuda.set_rng_state, state, device))

    def restore(self) -> None:
        """Let everybody draw the same numbers again."""
        for restore in self._restore:
            restore()


def is_final(error: Exception) -> bool:
    """Tell whether an error is no reason to try again: the person stopped the run."""
    return isinstance(error, comfy.model_management.InterruptProcessingException)


def cause_of(error: Exception) -> str:
    """Return the first line of an error, and what kind it is."""
    if isinstance(error, comfy.model_management.OOM_EXCEPTION):
        return "memory ran out"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
