"""A perturbed prediction that is asked for: computed with the base predictions, or by itself."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.samplers
import torch

from ..batch.call import COMPILE_KEY, KEY, Call
from ..batch.compiled import CAN_RUN_EAGERLY
from ..batch.control import ControlStandIn
from ..batch.network_call import NetworkCall, intercepted
from ..batch.trees import joined, map_tensors
from ..settings.errors import GuidanceError
from ..settings.perturbation import BlockPerturbation
from .compat.caches import in_the_same_step
from .compat.foreign import patches_in
from .joining import REORDERED, cause_of, is_final
from .precomputed import Prediction
from .run import Run
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
        self._stand_ins: dict[int, ControlStandIn] = {}

    def evaluate(self, args: Args, side: str, x: torch.Tensor) -> torch.Tensor:
        """Return the perturbed prediction of one side.

        Args:
            args: of the host's post-CFG call.
            side: `cond` or `uncond`.
            x: the latent.
        """
        # Under the labels that the base pass gave these conds: others go by them.
        labels = self.step.labels
        known = (labels[c["uuid"]] for c in args[side] if c["uuid"] in labels)
        label = next(known, int(side == "uncond"))
        sides: list[Any] = [None] * (1 + max(1, label, *labels.values()))
        beside = self._mixed_conds(args, side)
        for at in {labels[cond["uuid"]] for cond in beside}:
            sides[at] = self._conds([cond for cond in beside if labels[cond["uuid"]] == at])
        sides[label] = self._conds(args[side])
        options = _evaluation_options(args["model_options"], self.run)
        evaluate = options.get("sampler_calc_cond_batch_function")
        with self.run.during(self):
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
        before = self.state.counts
        changes_blocks = isinstance(self.state.branch.perturbation, BlockPerturbation)
        compiled = changes_blocks and self.run.is_compiled(call)
        with intercepted(call, partial(self._run, call), compiled=compiled):
            out = call.run()
        if self.state.counts == before:
            self.state.cached += 1
        return out

    def _conds(self, conds: Conds) -> Conds:
        """Return the conds of this pass: their own identities, and stand-ins of ControlNets."""
        own = []
        for cond in conds:
            copy = {**cond, "uuid": self.run.private_uuid(self.state.branch, cond["uuid"])}
            control = cond.get("control")
            if control is not None and not self.different:
                # One stand-in for each: the host batches conds that share one object.
                stand_in = ControlStandIn(control, self._needs_control)
                copy["control"] = self._stand_ins.setdefault(id(control), stand_in)
            own.append(copy)
        return own

    def _mixed_conds(self, args: Args, side: str) -> Conds:
        """Return which conds of the other side have to be evaluated beside those of this one.

        Code of other nodes may make rows of other rows of their batch, or count on them. A pass of
        its own then sees the conds that the base prediction's call had, all perturbed.
        """
        joining, step = self.run.joining, self.step
        mixes = step.may_mix if joining.mixes is None else joining.mixes
        uuids = {cond["uuid"] for cond in args[side]}
        kept = {key[1] for key in step.precomputed.predictions if key[0] is self.state.branch}
        if not mixes or (uuids <= kept and not self.different):
            return []
        beside = set().union(*(call for call in step.together if call & uuids)) - uuids
        others = args["uncond" if side == "cond" else "cond"] or []
        conds = [cond for cond in others if cond["uuid"] in beside]
        branch = self.state.branch
        self._beside.update(self.run.private_uuid(branch, cond["uuid"]) for cond in conds)
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
            self.run.joining.reject(why)
        self.state.whole[why] += 1
        try:
            return self._computed(call, inner)
        except GuidanceError:
            raise
        except Exception as error:
            if is_final(error) or not (self.step.may_mix or patches_in(call.options)):
                raise
            raise GuidanceError(
                f"{self.state.label} cannot perturb {self.state.branch.perturbation.where} beside "
                f"another node that acts there: {cause_of(error)}. Choose other blocks, or leave "
                "that node out."
            ) from error

    def _find(self, call: Call, inner: NetworkCall, chunk: int) -> Prediction | str:
        if self.different:
            return self.different
        key = (self.state.branch, self.run.original_uuid(call.uuids[chunk]), call.window)
        rows = call.rows(chunk)
        return self.step.precomputed.find(key, inner, rows, direct=self.step.is_direct)

    def _computed(self, call: Call, inner: NetworkCall) -> Any:
        """Return the network's output, computed whole."""
        if not isinstance(self.state.branch.perturbation, BlockPerturbation):
            self.state.calls += 1
            return inner.run()
        rows = inner.rows
        active = self.run.perturbed(self.state, [slice(0, rows)])
        seen = replace(call, options=inner.options)
        with self.run.network(call).changed(seen, [active], lambda _: rows):
            out = inner.run()
        self.state.count(active)
        return out

    def _needs_control(self, options: dict[str, Any], x: torch.Tensor) -> bool:
        """Tell whether a ControlNet has to be evaluated: not where every prediction is there."""
        step = self.step
        call = Call(None, x, x, None, None, None, options, {})
        uuids = [self.run.original_uuid(uuid) for uuid in call.uuids]
        keys = [(self.state.branch, uuid, call.window) for uuid in uuids]
        if step.is_direct and all(step.precomputed.holds(key, call.chunk_rows) for key in keys):
            return False
        self.run.report.controls_evaluated += 1
        return True


def _evaluation_options(model_options: dict[str, Any], run: Run) -> dict[str, Any]:
    """Return the host's options for a pass of its own, in which the run meets every model call.

    Where torch cannot run compiled networks eagerly, ComfyUI's node does not compile this one:
    graphs ignore what is changed for one call.
    """
    options = in_the_same_step(model_options)
    wrappers = options["transformer_options"]["wrappers"]
    left_out = {KEY} if CAN_RUN_EAGERLY else {KEY, COMPILE_KEY}
    around = {k: fns for k, fns in wrappers.get("apply_model", {}).items() if k not in left_out}
    wrappers["apply_model"] = {**around, KEY: [run.apply_model]}
    return options
