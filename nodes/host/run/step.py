"""One evaluation of the guided model: what is known of it, and what it holds until it is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..batch.call import COMPILE_KEY, KEY, Call
from ..batch.network_call import NetworkCall
from ..batch.rows import Join, Key, PrivateUuid
from ..batch.trees import tensors_in
from .run import Run
from .state import BranchState

Args = dict[str, Any]
REORDERED = "another node reorders the rows"
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
            return self._reasons.get(key, "its prompt was not evaluated")
        fitting = [one for one in known if one.fits(inputs)]
        if not fitting:
            return "the latent has another shape or device"
        if direct and len(known) == 1:
            return fitting[0]
        same = [one for one in fitting if one.is_of(inputs)]
        if not same:
            return REORDERED
        return same[0] if len(same) == 1 else "another node evaluated the prompt in several ways"


@dataclass(eq=False)
class Evaluation:
    """Base predictions that were made of one latent.

    Attributes:
        given: the latent itself, by which others name the evaluation.
        latent: a copy: others may write into theirs.
        predictions: by the identities of their conds, before anybody altered them.
    """

    given: torch.Tensor
    latent: torch.Tensor
    predictions: dict[tuple[Hashable, ...], torch.Tensor]


class Step:
    """One evaluation of the guided model, or several where other nodes look ahead in it.

    Attributes:
        number: which evaluation of the run it is, from 1.
        active: the branches whose window holds its noise level, and that hold no difference in it.
        evaluations: of the base predictions; rows join those of the first.
        labels: the side that the base pass took each cond for.
        together: the conds of each of its calls; none where the caller names none.
        times: how often it evaluated each cond, in each window of a long latent.
        guided: those that guided it.
        perturbed: the conds whose base predictions were perturbed themselves.
        measured: whose attention was measured in it, by who asks.
        in_base_pass: model calls are those of the base predictions.
        is_cut: the network ran with other rows than its call named.
        may_mix: code of other nodes may make rows of other rows of their batch, or count on them.
        guider: the host's; None if it does not let this pack wrap its evaluations.
        is_direct: nothing stands between the host's batch and the network that may reorder rows.
    """

    def __init__(
        self,
        run: Run,
        active: list[BranchState],
        latent: torch.Tensor,
        model_options: dict[str, Any],
        guider: Any = None,
    ) -> None:
        self.run = run
        self.number = run.report.evaluations
        self.active = [state for state in active if not state.holding.stands_in]
        self.evaluations = [Evaluation(latent, latent.clone(), {})]
        self.precomputed = Precomputed()
        self.labels: dict[Hashable, int] = {}
        self.together: list[set[Hashable]] = []
        self.times = Counter[Key]()
        self.guided = set[BranchState]()
        self.perturbed = set[Hashable]()
        self.measured = set[Hashable]()
        self.guider = guider
        self.is_cut = False
        self.in_base_pass = guider is not None
        wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
        others = set(wrappers.get("apply_model", {})) - {KEY, COMPILE_KEY}
        self.is_direct = "model_function_wrapper" not in model_options and not others
        self.may_mix = not self.is_direct

    def note(self, call: Call, *, mixes: bool) -> None:
        """Note the conds of one call of the base pass, and whether other nodes may mix its rows."""
        self.may_mix |= mixes
        self.labels.update(zip(call.uuids, call.options.get("cond_or_uncond", ()), strict=False))
        self.together.append(set(call.uuids))
        self.times.update((uuid, call.window) for uuid in call.uuids)

    def knows_rows(self, key: Key) -> bool:
        """Tell whether a cond's name says which rows are meant: of one call, in the host's order.

        Other nodes may evaluate a prompt several times: for each image of a batch, or each tile.
        """
        uuid, window = key
        original = uuid.original if isinstance(uuid, PrivateUuid) else uuid
        return self.is_direct and self.times[original, window] == 1

    def end_base_pass(self, args: Args) -> None:
        """Note what was predicted, from a pre-CFG call; what is evaluated later is not base."""
        given = args["input"]
        outs = zip(args["conds"], args["conds_out"], strict=False)
        predictions = {_names(conds): out.clone() for conds, out in outs}
        evaluation = Evaluation(given, given.clone(), predictions)
        if self.in_base_pass:
            self.in_base_pass = False
            self.evaluations = [evaluation]
        else:
            self.evaluations.append(evaluation)

    def evaluation(self, latent: torch.Tensor) -> Evaluation:
        """Return the evaluation that a latent names; the last, if a guider made the latent."""
        named = (one for one in reversed(self.evaluations) if one.given is latent)
        return next(named, self.evaluations[-1])

    def prediction(self, evaluation: Evaluation, args: Args, side: str) -> torch.Tensor | None:
        """Return the prediction of one side as it was evaluated; None if none was made.

        Other nodes may have altered it since: their change is theirs, and not to be multiplied by
        a scale of ours.
        """
        name = _names(args[side])
        if name in evaluation.predictions:
            return evaluation.predictions[name]
        altered = args[f"{side}_denoised"]
        seen = not self.labels or any(uuid in self.labels for uuid in name)
        return altered if seen and torch.is_tensor(altered) else None

    def close(self) -> None:
        """Note whose rows were computed for nothing."""
        owners = {uuid.owner for uuid, _ in self.precomputed.predictions}
        for state in self.active:
            if state.branch in owners and state.asked != self.number:
                state.unused = True
                self.run.report.warn_once(
                    f"{state.label}: its prediction was made and nobody used it, because another "
                    "node takes the place of guidance. It is no longer made beforehand."
                )


def _names(conds: Any) -> tuple[Hashable, ...]:
    return tuple(cond["uuid"] for cond in conds or ())
