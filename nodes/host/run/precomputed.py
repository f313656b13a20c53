"""Perturbed predictions that base calls have made, until they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..batch.network_call import NetworkCall
from ..batch.rows import Join, Key
from ..batch.trees import tensors_in

REORDERED = "another node reorders the rows"
NOT_EVALUATED = "its prompt was not evaluated"
_NOT_INPUTS = {"transformer_options", "control"}


def inputs_of(call: NetworkCall, rows: slice) -> list[torch.Tensor]:
    """Return what a network is given for some rows of its batch; the latent comes first."""
    inputs = {n: v for n, v in call.arguments.items() if n not in _NOT_INPUTS}
    return [t[rows] if t.ndim and len(t) == call.rows else t for t in tensors_in(inputs)]


@dataclass
class Prediction:
    """One cond's rows of the network's output, and of what it was computed from."""

    out: Any
    inputs: list[torch.Tensor]

    def fits(self, inputs: list[torch.Tensor]) -> bool:
        """Tell whether it was computed from a latent of the same shape, on the same device."""
        mine, theirs = self.inputs[0], inputs[0]
        return mine.shape == theirs.shape and mine.device == theirs.device

    def is_of(self, inputs: list[torch.Tensor]) -> bool:
        """Tell whether it was computed from the same values, at the cost of a wait."""
        if [t.shape for t in self.inputs] != [t.shape for t in inputs]:
            return False
        equal = [(a == b).all() for a, b in zip(self.inputs, inputs, strict=True)]
        return bool(torch.stack(equal).all())


class Precomputed:
    """The perturbed predictions that are kept in one step, and why others are not."""

    def __init__(self) -> None:
        self.predictions: dict[Key, list[Prediction]] = {}
        self._reasons: dict[Key, str] = {}

    def keep(self, key: Key, prediction: Prediction) -> None:
        """Keep a prediction until it is asked for."""
        self.predictions.setdefault(key, []).append(prediction)

    def take(self, key: Key) -> list[Prediction]:
        """Return what is kept under a key, and keep it no longer."""
        return self.predictions.pop(key, [])

    def explain(self, joins: Iterable[Join], why: str) -> None:
        """Note why there are no predictions of some rows, where there are none."""
        for join in joins:
            if join.key not in self.predictions:
                self._reasons.setdefault(join.key, why)

    def holds(self, key: Key, rows: int) -> bool:
        """Tell whether there is one prediction for a cond of so many rows, and no more."""
        known = self.predictions.get(key, [])
        return len(known) == 1 and len(known[0].inputs[0]) == rows

    def find(self, key: Key, inputs: list[torch.Tensor], *, direct: bool) -> Prediction | str:
        """Return the prediction for some rows of another call, or why there is none.

        Values are compared unless the key says which rows are meant (`direct`).
        """
        known = self.predictions.get(key)
        if not known:
            return self._reasons.get(key, NOT_EVALUATED)
        fitting = [one for one in known if one.fits(inputs)]
        if not fitting:
            return "the latent has another shape or device"
        if direct and len(known) == 1:
            return fitting[0]
        same = [one for one in fitting if one.is_of(inputs)]
        if not same:
            return REORDERED
        return same[0] if len(same) == 1 else "another node evaluated the prompt in several ways"
