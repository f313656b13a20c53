"""Perturbed predictions that were made with the base predictions, until they are asked for."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..batch.network_call import NetworkCall
from ..batch.trees import tensors_in
from .joining import REORDERED

Key = tuple[Any, Hashable, Hashable]
"""Branch, identity of the cond, part of a long latent."""
_NOT_INPUTS = {"transformer_options", "control"}


@dataclass
class Prediction:
    """One cond's rows of the network's output, and of what it was computed from."""

    out: Any
    inputs: NetworkCall
    rows: slice

    def fits(self, other: NetworkCall, rows: slice) -> bool:
        """Tell whether some rows of another call are as many, as large, and on the same device."""
        mine, theirs = _first(self.inputs), _first(other)
        size = self.rows.stop - self.rows.start
        return (
            size == rows.stop - rows.start
            and mine.shape[1:] == theirs.shape[1:]
            and mine.device == theirs.device
        )

    def is_for(self, other: NetworkCall, rows: slice) -> bool:
        """Tell whether some rows of another call hold the same values, at the cost of a wait."""
        mine, theirs = _rows_of(self.inputs, self.rows), _rows_of(other, rows)
        if [t.shape for t in mine] != [t.shape for t in theirs]:
            return False
        equal = [(a == b).all() for a, b in zip(mine, theirs, strict=True)]
        return bool(torch.stack(equal).all()) if equal else True


class Precomputed:
    """The perturbed predictions that are kept in one step, and why others are not."""

    def __init__(self) -> None:
        self.predictions: dict[Key, list[Prediction]] = {}
        self.reasons: dict[Key, str] = {}
        """Why there is none of a cond that was foreseen."""

    def keep(self, key: Key, prediction: Prediction) -> None:
        """Keep a prediction until it is asked for."""
        self.predictions.setdefault(key, []).append(prediction)

    def take(self, key: Key) -> list[Prediction]:
        """Return what is kept under a key, and keep it no longer."""
        return self.predictions.pop(key, [])

    def explain(self, keys: Iterable[Key], why: str) -> None:
        """Note why there are no predictions, where they will be looked for."""
        for key in keys:
            if key not in self.predictions:
                self.reasons.setdefault(key, why)

    def holds(self, key: Key, rows: int) -> bool:
        """Tell whether there is one prediction for a cond of so many rows, and no more."""
        known = self.predictions.get(key, [])
        return len(known) == 1 and known[0].rows.stop - known[0].rows.start == rows

    def find(self, key: Key, other: NetworkCall, rows: slice, *, direct: bool) -> Prediction | str:
        """Return the prediction for some rows of another call, or why there is none.

        Args:
            key: whose prediction.
            other: the call that asks.
            rows: its rows.
            direct: nothing stands between the host's batch and the network that may reorder rows.
        """
        known = self.predictions.get(key)
        if not known:
            return self.reasons.get(key, "its prompt was not evaluated")
        fitting = [one for one in known if one.fits(other, rows)]
        if not fitting:
            return "the latent has another shape or device"
        if direct and len(known) == 1:
            return fitting[0]
        same = [one for one in fitting if one.is_for(other, rows)]
        if not same:
            return REORDERED
        return same[0] if len(same) == 1 else "another node evaluated the prompt in several ways"

    def clear(self) -> None:
        """Let go of every tensor."""
        self.predictions.clear()


def _first(call: NetworkCall) -> torch.Tensor:
    return next(tensors_in(call.arguments))


def _rows_of(call: NetworkCall, rows: slice) -> list[torch.Tensor]:
    batch = call.rows
    inputs = {n: v for n, v in call.arguments.items() if n not in _NOT_INPUTS}
    return [t[rows] if t.ndim and t.shape[0] == batch else t for t in tensors_in(inputs)]
