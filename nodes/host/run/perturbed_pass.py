"""A perturbed prediction that is asked for: computed with the base predictions, or by itself."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.samplers
import torch

from ..batch.call import Call
from ..batch.network_call import NetworkCall, are_options, exchanged, intercepted
from ..batch.rows import PrivateUuid
from ..batch.trees import joined, map_tensors
from ..settings.errors import GuidanceError
from ..settings.perturbation import BlockPerturbation
from .compat import in_the_same_step, patches_in
from .joining import BLAMELESS, cause_of
from .precomputed import NOT_EVALUATED, REORDERED, Prediction, inputs_of
from .state import BranchState
from .step import Step

Conds = list[dict[str, Any]]
Args = dict[str, Any]


class PerturbedPass:
    """One more prediction of some conds, in which a branch's perturbation is at work."""

    def __init__(self, step: Step, state: BranchState, *, different: str = "") -> None:
        self.step = step
        self.run = step.run
        self.state = state
        self.different = different
        """Why nothing of the base pass can be the same; empty if something can."""
        self._beside: set[Hashable] = set()

    def evaluate(self, args: Args, side: str, x: torch.Tensor) -> torch.Tensor:
        """Return the perturbed prediction of one side, `cond` or `uncond`, of a latent."""
        # Under the labels that the base pass gave these conds: others go by them.
        labels = self.step.labels
        known = (labels[c["uuid"]] for c in args[side] if c["uuid"] in labels)
        label = next(known, int(side == "uncond"))
        sides: list[Any] = [None] * (1 + max(1, label, *labels.values()))
        beside = self._mixed_conds(args, side)
        for at in {labels[cond["uuid"]] for cond in beside}:
            sides[at] = self._conds([cond for cond in beside if labels[cond["uuid"]] == at])
        sides[label] = self._conds(args[side])
        options = self.run.met_in(in_the_same_step(args["model_options"]))
        evaluate = options.get("sampler_calc_cond_batch_function")
        with self.run.during(self), self._sparing_controls(sides):
            if evaluate is None:
                model, sigma = args["model"], args["sigma"]
                return comfy.samplers.calc_cond_batch(model, sides, x, sigma, options)[label]
            # Another node evaluates the conds in its own way: these too.
            own = {"conds": sides, "input": x, "sigma": args["sigma"], "model": args["model"]}
            return evaluate({**own, "model_options": options})[label]

    def __call__(self, call: Call) -> torch.Tensor:
        """Run one model call of the perturbed pass."""
        if call.uuids and self._beside.issuperset(call.uuids):
            return call.run()  # not in one call with those that are asked for
        self.state.met = True
        changes_blocks = isinstance(self.state.branch.perturbation, BlockPerturbation)
        compiled = changes_blocks and self.run.is_compiled(call)
        with intercepted(call, partial(self._run, call), compiled=compiled):
            return call.run()

    def _conds(self, conds: Conds) -> Conds:
        """Return conds with identities of their own in this branch's predictions."""
        return [{**one, "uuid": PrivateUuid(self.state.branch, one["uuid"])} for one in conds]

    @contextmanager
    def _sparing_controls(self, sides: list[Conds | None]) -> Iterator[None]:
        """Evaluate ControlNets only where a prediction that they act on is not there already."""
        controls = {cond.get("control") for side in sides for cond in side or ()} - {None}
        with ExitStack() as stack:
            for control in () if self.different else controls:
                for one in (control, *getattr(control, "multigpu_clones", {}).values()):
                    stack.enter_context(exchanged(one, "get_control", self._control))
            yield

    def _control(self, control: NetworkCall) -> Any:
        """Return what a ControlNet gives; nothing where nothing will be computed with it."""
        step, x = self.step, control.x
        options = next(filter(are_options, control.arguments.values()))
        call = Call(None, x, x, None, None, None, options, {})
        keys = [(uuid, call.window) for uuid in call.uuids]
        kept = [step.precomputed.holds(key, call.chunk_rows) for key in keys]
        known = all(step.knows_rows(key) for key in keys)
        return None if keys and all(kept) and known else control.run()

    def _mixed_conds(self, args: Args, side: str) -> Conds:
        """Return which conds of the other side have to be evaluated beside those of this one.

        Code of other nodes may make rows of other rows of their batch, or count on them. A pass of
        its own then sees the conds that the base prediction's call had, all perturbed.
        """
        run, step, branch = self.run, self.step, self.state.branch
        mixes = run.obstacle or (step.may_mix and not run.proved)
        uuids = {cond["uuid"] for cond in args[side]}
        found = step.precomputed.predictions
        kept = {uuid.original for uuid, _ in found if uuid.owner is branch}
        if not mixes or (uuids <= kept and not self.different):
            return []
        beside = set().union(*(call for call in step.together if call & uuids)) - uuids
        others = args["uncond" if side == "cond" else "cond"] or []
        conds = [cond for cond in others if cond["uuid"] in beside]
        self._beside.update(PrivateUuid(branch, cond["uuid"]) for cond in conds)
        return conds

    def _run(self, call: Call, inner: NetworkCall) -> Any:
        """Return the network's output: precomputed, or computed now."""
        asked = [n for n, uuid in enumerate(call.uuids) if uuid not in self._beside]
        found = [self._find(call, inner, n) for n in asked] or ["another node names no prompts"]
        why = next((one for one in found if isinstance(one, str)), None)
        if why is None:
            self.state.joined += 1
            # A copy: nobody who writes into it may spoil it for whoever asks next.
            kept = [one for one in found if isinstance(one, Prediction)]
            return joined([map_tensors(torch.clone, one.out) for one in kept])
        if why == REORDERED:
            self.run.obstacle = why
        self.state.whole[why] += 1
        try:
            return self._computed(call, inner)
        except Exception as error:
            beside = self.step.may_mix or patches_in(call.options)
            if isinstance(error, BLAMELESS) or not beside:
                raise
            raise GuidanceError(
                f"{self.state.label} cannot perturb {self.state.branch.perturbation.where} beside "
                f"another node that acts there: {cause_of(error)}. Choose other blocks, or leave "
                "that node out."
            ) from error

    def _find(self, call: Call, inner: NetworkCall, chunk: int) -> Prediction | str:
        if self.different:
            return self.different
        key = call.uuids[chunk], call.window
        inputs = inputs_of(inner, call.rows(chunk))
        found = self.step.precomputed.find(key, inputs, direct=self.step.knows_rows(key))
        if found == NOT_EVALUATED and getattr(key[0], "original", None) in self.step.labels:
            return "its prompt was not expected to be asked for"
        return found

    def _computed(self, call: Call, inner: NetworkCall) -> Any:
        """Return the network's output, computed whole."""
        if not isinstance(self.state.branch.perturbation, BlockPerturbation):
            return inner.run()
        rows = inner.rows
        active = self.run.perturbed(self.state, [slice(0, rows)])
        seen = replace(call, options=inner.options)
        with self.run.network(call).changed(seen, [active], lambda _: rows):
            out = inner.run()
        self.state.count(active)
        return out
