"""A perturbed prediction that is asked for: taken from what was put aside, or computed whole."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch

from ..calls.call import Call
from ..calls.control import ControlStandIn
from ..calls.mates import see_mates
from ..calls.network_call import NetworkCall, handled
from ..calls.trees import joined, map_tensors
from ..settings.branch import Branch
from ..settings.perturbation import BlockPerturbation
from .aside import Prediction
from .step import Step

Conds = list[dict[str, Any]]


class PerturbedPass:
    """One more prediction of some conds, in which a branch's perturbation is at work."""

    def __init__(self, step: Step, branch: Branch, *, different: str = "") -> None:
        self.step = step
        self.branch = branch
        self.different = different
        """Why nothing of the main pass can be the same; empty if something can."""
        self._mates: set[Hashable] = set()
        self._stand_ins: dict[int, ControlStandIn] = {}

    def conds(self, conds: Conds) -> Conds:
        """Return the conds of this pass: their own identities, and ControlNets that wait."""
        own = []
        for cond in conds:
            copy = {**cond, "uuid": self.step.run.private_uuid(self.branch, cond["uuid"])}
            control = cond.get("control")
            if control is not None and not self.different:
                # One stand-in for each: the host batches conds that share one object.
                stand_in = ControlStandIn(control, self._known_control)
                copy["control"] = self._stand_ins.setdefault(id(control), stand_in)
            own.append(copy)
        return own

    def mates(self, conds: Conds, others: Conds, options: dict[str, Any]) -> Conds:
        """Return which conds have to be evaluated beside those of a whole pass.

        Args:
            conds: those that the branch asks for.
            others: those of the other side.
            options: the host's options for the network.

        Returns:
            The others that were in one plain call with any of them, if a patch may have seen both.
        """
        if not see_mates(options):
            return []
        uuids = {cond["uuid"] for cond in conds}
        put_aside = {key[1] for key in self.step.aside.predictions if key[0] is self.branch}
        if uuids <= put_aside and not self.different:
            return []
        beside = set().union(*(call for call in self.step.together if call & uuids)) - uuids
        mates = [cond for cond in others if cond["uuid"] in beside]
        self._mates.update(self.step.run.private_uuid(self.branch, c["uuid"]) for c in mates)
        return mates

    def apply(self, call: Call) -> torch.Tensor:
        """Run one model call of the perturbed pass."""
        if self._mates.issuperset(call.uuids):  # alone they are nobody's
            return call.run()
        report = self.step.run.report
        before = report.counts(self.branch)
        compiled = self.step.run.is_compiled(call)
        with handled(call, partial(self._run, call), compiled=compiled):
            out = call.run()
        if report.counts(self.branch) == before:
            report.cached[self.branch] += 1
        return out

    def _run(self, call: Call, inner: NetworkCall) -> Any:
        """Return the network's output: put aside, or computed now."""
        report = self.step.run.report
        found = [self._find(call, inner, chunk) for chunk in range(len(call.uuids))]
        why = next((one for one in found if isinstance(one, str)), None)
        if why is not None:
            report.full[self.branch, why] += 1
            return self._computed(call, inner)
        report.shared[self.branch] += 1
        # A copy: nobody who writes into it may spoil it for whoever asks next.
        outs = [map_tensors(torch.clone, one.out) for one in found if isinstance(one, Prediction)]
        return joined(outs)

    def _find(self, call: Call, inner: NetworkCall, chunk: int) -> Prediction | str:
        if self.different:
            return self.different
        key = (self.branch, self.step.run.original_uuid(call.uuids[chunk]), call.place)
        return self.step.aside.find(key, inner, call.rows(chunk), proved=self.step.is_proved)

    def _computed(self, call: Call, inner: NetworkCall) -> Any:
        """Return the network's output, computed whole."""
        run, rows = self.step.run, inner.rows
        if not isinstance(self.branch.perturbation, BlockPerturbation):
            run.report.calls[self.branch] += 1
            return inner.run()
        view = run.view(call)
        site = run.site(self.branch, [slice(0, rows)])
        with view.changed(call, inner.options, [site], lambda _: rows) as changed:
            out = inner.replaced(transformer_options=changed).run()
        run.report.reached(self.branch, site)
        return out

    def _known_control(self, options: dict[str, Any], x: torch.Tensor) -> tuple[Any] | None:
        """Return a ControlNet's output for conds that need none or whose own is kept."""
        step = self.step
        call = Call(None, x, x, None, None, None, options, {})
        uuids = [step.run.original_uuid(uuid) for uuid in call.uuids]
        keys = [(self.branch, uuid, call.place) for uuid in uuids]
        if step.is_proved and all(step.aside.holds(key, call.chunk_rows) for key in keys):
            return (None,)
        for kept in step.aside.controls:
            known = kept.of(call, uuids)
            if known is not None:
                return known
        step.run.report.controls_evaluated += 1
        return None
