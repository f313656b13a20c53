"""What the plain calls of one step put aside: perturbed predictions, until they are asked for."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..calls.call import Call, same_options
from ..calls.control import Control, control_rows
from ..calls.network_call import NetworkCall
from ..calls.trees import tensors_in
from ..settings.branch import Branch

Key = tuple[Branch, Hashable, Hashable]
"""Branch, identity of the cond, part of a long latent."""
REGROUPED = "another node regroups the rows"
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


@dataclass(frozen=True)
class KeptControl:
    """What ControlNets gave for one call of the main pass."""

    control: Control | None
    call: Call

    def of(self, call: Call, uuids: list[Hashable]) -> tuple[Control | None] | None:
        """Return its rows for some conds of another call, in a tuple of its own.

        Returns:
            None if they are not in it, or if others did something else to it: a ControlNet may act
            through the options instead of giving anything.
        """
        mine = self.call
        sizes = (mine.chunk_rows, mine.place), (len(call.x) // len(uuids), call.place)
        known = all(uuid in mine.uuids for uuid in uuids) and sizes[0] == sizes[1]
        if not known or not same_options(mine.options, call.options):
            return None
        chunks = [mine.rows(mine.uuids.index(uuid)) for uuid in uuids]
        rows = [row for chunk in chunks for row in range(chunk.start, chunk.stop)]
        return (control_rows(self.control, rows, len(mine.x)),)


class Aside:
    """The predictions that are put aside in one step, and why others are not."""

    def __init__(self) -> None:
        self.predictions: dict[Key, list[Prediction]] = {}
        self.reasons: dict[Key, str] = {}
        """Why there is none of a cond that was foreseen."""
        self.controls: list[KeptControl] = []
        self.regrouped: set[Branch] = set()
        """Branches whose rows were not those of the conds that they were taken for."""

    def put(self, key: Key, prediction: Prediction) -> None:
        """Put a prediction aside."""
        self.predictions.setdefault(key, []).append(prediction)

    def holds(self, key: Key, rows: int) -> bool:
        """Tell whether there is one prediction for a cond of so many rows, and no more."""
        known = self.predictions.get(key, [])
        return len(known) == 1 and known[0].rows.stop - known[0].rows.start == rows

    def find(self, key: Key, other: NetworkCall, rows: slice, *, proved: bool) -> Prediction | str:
        """Return the prediction for some rows of another call, or why there is none.

        Args:
            key: whose prediction.
            other: the call that asks.
            rows: its rows.
            proved: nothing stands between the host's batch and the network that may reorder rows.
        """
        known = self.predictions.get(key)
        if not known:
            return self.reasons.get(key, "cond was not evaluated")
        fitting = [one for one in known if one.fits(other, rows)]
        if not fitting:
            return "the latent has another shape or device"
        if proved and len(known) == 1:
            return fitting[0]
        same = [one for one in fitting if one.is_for(other, rows)]
        if not same:
            self.regrouped.add(key[0])
            return REGROUPED
        if len(same) > 1:
            same = [one for one in same if same_options(one.inputs.options, other.options)]
        return same[0] if same else "another node evaluated the cond in several ways"

    def clear(self) -> None:
        """Let go of every tensor."""
        self.predictions.clear()
        self.controls.clear()


def _first(call: NetworkCall) -> torch.Tensor:
    return next(tensors_in(call.arguments))


def _rows_of(call: NetworkCall, rows: slice) -> list[torch.Tensor]:
    batch = call.rows
    inputs = {n: v for n, v in call.arguments.items() if n not in _NOT_INPUTS}
    return [t[rows] if t.ndim and t.shape[0] == batch else t for t in tensors_in(inputs)]
