"""The plain predictions of a step: calls of the model that the perturbed ones join."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ....seg_core import Target
from ..calls.blocks import growing
from ..calls.call import Call
from ..calls.mates import among_mates
from ..calls.network_call import NetworkCall, handled
from ..calls.rows import Join, Rows
from ..calls.site import Site
from ..calls.trees import joined, map_tensors
from ..settings.branch import Branch
from ..settings.perturbation import BlockPerturbation
from .aside import KeptControl, Prediction
from .joining import Batch, batches_of, say_why
from .saliency import watch
from .step import Step


class MainPass:
    """The ordinary predictions of one step."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def apply(self, call: Call) -> torch.Tensor:
        """Run one model call of the main pass."""
        step = self.step
        if not step.in_main_pass:
            return call.run()
        call.again = any(uuid in step.labels for uuid in call.uuids)
        step.labels.update(zip(call.uuids, call.options["cond_or_uncond"], strict=True))
        step.together.append(set(call.uuids))
        self._bury(call)
        step.run.memories.see(call.model.diffusion_model)
        batches = batches_of(step, call) if step.is_open else []
        if step.is_open:
            self._keep_control(call, batches)
        if not (batches or any(b.side == "free" or b.watches for b in step.active)):
            return call.run()
        compiled = self.step.run.is_compiled(call)
        with handled(call, partial(self._run, call, batches), compiled=compiled):
            out = call.run()
        for batch in batches:
            for join in batch.joins:
                why = "another node answered for the model in the main pass"
                say_why(step, batch.call, [(join.owner, join.chunk)], why)
        return out

    def _bury(self, call: Call) -> None:
        """Spare the branches whose perturbation changes nothing in calls like this one."""
        run = self.step.run
        for branch in self.step.active:
            perturbation = branch.perturbation
            if isinstance(perturbation, BlockPerturbation) and branch not in run.dead:
                why = run.view(call).pointless(perturbation, call)
                if why:
                    run.dead.add(branch)
                    run.report.spare(branch, why)

    def _key(self, call: Call, join: Join) -> tuple[Branch, Hashable, Hashable]:
        return join.owner, call.uuids[join.chunk], call.place

    def _keep_control(self, call: Call, batches: list[Batch]) -> None:
        """Keep what ControlNets gave for conds of which a whole pass will be made."""
        joined = {(j.owner, b.call.uuids[j.chunk]) for b in batches for j in b.joins}
        wanted = {(b, u) for b in self.step.active if b.joins for u in self.step.wanted(b)}
        if call.control is not None and not wanted.isdisjoint(
            {(b, u) for b in self.step.active for u in call.uuids} - joined
        ):
            lists = {part: list(residuals) for part, residuals in call.control.items()}
            # As they are now: older hosts let the network write into the options.
            as_now = replace(call, options=dict(call.options))
            self.step.aside.controls.append(KeptControl(lists, as_now))

    def _run(self, call: Call, batches: list[Batch], inner: NetworkCall) -> Any:
        """Run the network, in one batch or several."""
        if inner.rows != len(call.x):  # another node parts or repeats the rows inside of the call
            return self._run_batch(call, [], inner)
        if len(batches) < 2:
            return self._run_batch(call, batches[0].joins if batches else [], inner)
        outs = []
        first = 0
        for batch in batches:
            rows = slice(first, first + len(batch.call.x))
            labels = {n: batch.call.options[n] for n in ("uuids", "cond_or_uncond")}
            own = inner.part(rows).replaced(transformer_options={**inner.options, **labels})
            outs.append(self._run_batch(batch.call, batch.joins, own))
            first = rows.stop
        return joined(outs)

    def _run_batch(self, call: Call, joins: list[Join], inner: NetworkCall) -> Any:
        """Run the network with the rows that join it, and put those aside."""
        view = self.step.run.view(call)
        rows = Rows(inner.rows, joins)
        sites = self._sites(call, rows)
        options = dict(among_mates(inner.options, rows))

        def present(target: Target) -> int:
            return rows.present(view.fork(target))

        with ExitStack() as stack:
            watches = [watch(b, self.step, call) for b in self.step.active if b.watches]
            if sites or watches:
                changed = view.changed(call, options, list(sites.values()), present, watches)
                options = dict(stack.enter_context(changed))
            if joins:
                inner_wide = inner.mapped(rows.widened)
                stack.enter_context(growing(view.shared, view.blocks, rows, options, view.axes))
            else:
                inner_wide = inner
            out = inner_wide.replaced(transformer_options=options).run()
        for branch, site in sites.items():
            self.step.run.report.reached(branch, site)
        return self._put_aside(call, inner, rows, out) if joins else out

    def _sites(self, call: Call, rows: Rows) -> dict[Branch, Site]:
        run = self.step.run
        where: dict[Branch, list[slice]] = {}
        for branch in self.step.active:
            if branch.side == "free":
                whose = self.step.wanted(branch)
                own = [call.rows(i) for i, uuid in enumerate(call.uuids) if uuid in whose]
                where[branch] = own if rows.plain == len(call.x) else []
                self.step.freed.update(uuid for uuid in call.uuids if uuid in whose and own)
            else:
                where[branch] = [rows.of(join) for join in rows.joins if join.owner is branch]
        return {branch: run.site(branch, own) for branch, own in where.items() if own}

    def _put_aside(self, call: Call, inner: NetworkCall, rows: Rows, out: Any) -> Any:
        report = self.step.run.report
        for join in rows.joins:
            if not report.was_reached(join.owner):
                self.step.aside.reasons[self._key(call, join)] = "its blocks were not reached"
                continue
            own = rows.of(join)
            part = map_tensors(lambda t, own=own: t[own], out)
            self.step.aside.put(self._key(call, join), Prediction(part, inner, join.source))
        return map_tensors(lambda t: t[: rows.plain], out)
