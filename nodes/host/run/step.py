"""One evaluation of the guided model: what is known of it, and what it holds until it is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..batch.call import COMPILE_KEY, KEY, Call
from ..batch.rows import Key, PrivateUuid
from .precomputed import Precomputed
from .run import Run
from .state import BranchState

Args = dict[str, Any]
Names = tuple[Hashable, ...]


@dataclass(eq=False)
class Evaluation:
    """Base predictions that were made of one latent.

    Attributes:
        given: the latent itself, by which others name the evaluation.
        latent: a copy: others may write into theirs.
        predictions: by the identities of their conds, before anybody altered them.
        models: what made them, by the same; a guider may have several models.
    """

    given: torch.Tensor
    latent: torch.Tensor
    predictions: dict[Names, torch.Tensor] = field(default_factory=dict)
    models: dict[Names, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, latent: torch.Tensor) -> Evaluation:
        """Return an evaluation of a latent, of which no prediction is known yet."""
        return cls(latent, latent.clone())

    def note(self, model: Any, conds: Iterable[Any], outs: Iterable[torch.Tensor]) -> None:
        """Note what a model predicted for each side; the first prediction of a side stands."""
        for side, out in zip(conds, outs, strict=False):
            name = _names(side)
            if name not in self.predictions:
                self.predictions[name], self.models[name] = out.clone(), model

    def model(self, args: Args, side: str) -> Any:
        """Return the model that predicted one side of a post-CFG call."""
        return self.models.get(_names(args[side]), args["model"])


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
        is_cut: the network ran with other rows than its call named, or in another order.
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
        self.evaluations = [Evaluation.of(latent)]
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

    def evaluated(self, model: Any, conds: Any, x: torch.Tensor, outs: Any) -> None:
        """Note base predictions where the host evaluates them; a guider may alter them by itself.

        Those of parts of the latent are left out. A copy of the latent is recognised by its values,
        at the cost of a wait.
        """
        first = self.evaluations[0]
        if not self.in_base_pass or x.shape != first.latent.shape:
            return
        known = self._named(x)
        alike = (x.device, x.dtype) == (first.latent.device, first.latent.dtype)
        if known is None and alike and torch.equal(x, first.latent):
            known = first
        if known is None:
            known = Evaluation.of(x)
            self.evaluations = [*(one for one in self.evaluations if one.predictions), known]
        known.note(model, conds, outs)

    def end_base_pass(self, args: Args) -> None:
        """Note what was predicted, from a pre-CFG call; what is evaluated later is not base.

        It is what other nodes made of the host's evaluations: of several, or of parts.
        """
        evaluation = Evaluation.of(args["input"])
        evaluation.note(args["model"], args["conds"], args["conds_out"])
        if self.in_base_pass:
            self.in_base_pass = False
            self.evaluations = [evaluation]
        else:
            self.evaluations.append(evaluation)

    def evaluation(self, latent: torch.Tensor) -> Evaluation:
        """Return the evaluation that a latent names; the last, if a guider made the latent."""
        return self._named(latent) or self.evaluations[-1]

    def _named(self, latent: torch.Tensor) -> Evaluation | None:
        """Return the last evaluation of a latent itself; None if there is none."""
        return next((one for one in reversed(self.evaluations) if one.given is latent), None)

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


def _names(conds: Any) -> Names:
    return tuple(cond["uuid"] for cond in conds or ())
