"""The base predictions of a step: calls of the model that rows of the perturbed ones join."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ....seg_core import Target
from ..batch.active import ActivePerturbation
from ..batch.call import Call
from ..batch.network_call import NetworkCall, intercepted
from ..batch.rows import Join, Rows
from ..batch.trees import joined, map_tensors
from ..batch.widening import widening
from ..settings.errors import GuidanceError
from ..settings.perturbation import BlockPerturbation
from .compat.foreign import foreign_code, may_mix_rows, patches_in
from .joining import RandomNumbers, cause_of, equal_within_rounding, is_final
from .plan import Batch, batches_of, free_on
from .precomputed import Key, Prediction
from .saliency import request
from .state import BranchState
from .step import Step

Foreign = frozenset[Hashable]
_WITNESS = object()
"""Whose rows join without a perturbation, to prove that they come out as their source."""


class BasePass:
    """The ordinary predictions of one step."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.run = step.run

    def __call__(self, call: Call) -> torch.Tensor:
        """Run one model call of the base pass."""
        step = self.step
        if not step.in_base_pass:
            return call.run()
        again = any(uuid in step.labels for uuid in call.uuids)
        foreign = foreign_code(call)
        step.note(call, mixes=may_mix_rows(foreign))
        self.run.memory.see(call.model.diffusion_model)
        if not call.uuids:
            return call.run()
        self._spare(call)
        batches = batches_of(step, call)
        acts = any(s.branch.side == "free" or s.branch.needs_saliency for s in step.active)
        if not batches and not acts:
            return call.run()
        run = partial(self._run, call, batches, again, foreign)
        with intercepted(call, run, compiled=self.run.is_compiled(call)):
            out = call.run()
        for batch in batches:
            keys = [self._key(batch.call, join) for join in batch.joins]
            step.precomputed.explain(keys, "another node answered for the model")
        return out

    def _spare(self, call: Call) -> None:
        """Give up the branches whose perturbation changes nothing in calls like this one."""
        for state in self.step.active:
            perturbation = state.branch.perturbation
            if isinstance(perturbation, BlockPerturbation) and not state.unreachable:
                why = self.run.network(call).pointless(perturbation, call)
                if why:
                    self.run.report.explain(state, why)

    def _key(self, call: Call, join: Join) -> Key:
        return join.owner, call.uuids[join.chunk], call.window

    def _run(
        self, call: Call, batches: list[Batch], again: bool, foreign: Foreign, inner: NetworkCall
    ) -> Any:
        """Run the network; rows join where that goes well, and nothing else changes by it."""
        alone = [Batch(call, [])]
        # Another node may part or repeat the rows inside of the call.
        if not batches or inner.rows != len(call.x):
            return self._run_batches(call, alone, again, inner)
        # Wrappers of the network may have put patches there since.
        foreign = self.run.joining.unproved(foreign | patches_in(inner.options))
        if foreign:
            return self._proved(call, batches, again, foreign, inner)
        out = self._attempted(call, batches, batches, again, inner)
        return self._run_batches(call, alone, again, inner) if out is None else out

    def _attempted(
        self, call: Call, batches: list[Batch], wide: list[Batch], again: bool, inner: NetworkCall
    ) -> Any:
        """Run the network with the rows that join it; if that fails, no more join in this run.

        Returns:
            None if it failed.
        """
        try:
            return self._run_batches(call, wide, again, inner)
        except GuidanceError:
            raise
        except Exception as error:
            if is_final(error):
                raise
            self._give_up(batches, f"the model call failed with them ({cause_of(error)})")
        return None

    def _proved(
        self, call: Call, batches: list[Batch], again: bool, foreign: Foreign, inner: NetworkCall
    ) -> Any:
        """Run a call as the host made it, and once more with the rows that join it.

        Returns:
            The output of the former. The rows that joined are kept if they, and rows without a
            perturbation, left everything as it was.
        """
        numbers = RandomNumbers(call.x.device)
        out = self._run_batches(call, [Batch(call, [])], again, inner.mapped(torch.clone))
        if self.run.memory.observe(call.model.diffusion_model):
            self.run.joining.stop("another node's code keeps what the network computes")
            self._discard(batches)
            return out
        later = RandomNumbers(call.x.device)
        numbers.restore()
        witnessed = [self._witnessed(batch) for batch in batches]
        wide = self._attempted(call, batches, witnessed, True, inner)
        if wide is not None and self._is_same(call, wide, out, inner):
            self.run.joining.accept(foreign)
        elif wide is not None:
            self._give_up(batches, "the rows of a batch depend on each other")
        later.restore()
        return out

    def _witnessed(self, batch: Batch) -> Batch:
        """Return a batch which rows join without a perturbation, too."""
        witnesses = {}
        for join in sorted(batch.joins, key=lambda one: one.fork):
            uuid = batch.call.uuids[join.chunk]
            if not free_on(self.step, uuid):
                private = self.run.private_uuid(_WITNESS, uuid)
                own = replace(join, owner=_WITNESS, uuid=private, passes=False)
                witnesses.setdefault(join.chunk, own)
        return Batch(batch.call, [*batch.joins, *witnesses.values()])

    def _is_same(self, call: Call, wide: Any, alone: Any, inner: NetworkCall) -> bool:
        """Tell whether base rows and witnesses came out as in the call that the host made."""
        dtype = inner.x.dtype
        same = equal_within_rounding(wide, alone, dtype)
        for chunk, uuid in enumerate(call.uuids):
            rows = call.rows(chunk)
            source = map_tensors(lambda t, rows=rows: t[rows], alone)
            for kept in self.step.precomputed.take((_WITNESS, uuid, call.window)):
                same = same and equal_within_rounding(kept.out, source, dtype)
        return same

    def _give_up(self, batches: list[Batch], why: str) -> None:
        """Let no more rows join in this run, and say why."""
        labels = [join.owner.perturbation.label for batch in batches for join in batch.joins]
        self.run.joining.reject(why)
        self._discard(batches)
        self.run.report.warn_once(
            f"{', '.join(dict.fromkeys(labels))}: perturbed rows cannot share a model call beside "
            f"other nodes here, because {why}. The rest of this run makes extra passes instead, "
            "which are slower."
        )

    def _discard(self, batches: list[Batch]) -> None:
        for batch in batches:
            keys = [self._key(batch.call, join) for join in batch.joins]
            for key in keys:
                self.step.precomputed.take(key)
            self.step.precomputed.explain(keys, self.run.joining.obstacle)

    def _run_batches(
        self, call: Call, batches: list[Batch], again: bool, inner: NetworkCall
    ) -> Any:
        """Run the network, in one batch or several."""
        if len(batches) == 1:
            return self._run_batch(call, batches[0].joins, again, inner)
        outs = []
        first = 0
        for batch in batches:
            rows = slice(first, first + len(batch.call.x))
            labels = {n: batch.call.options[n] for n in ("uuids", "cond_or_uncond")}
            own = inner.part(rows).replaced(transformer_options={**inner.options, **labels})
            outs.append(self._run_batch(batch.call, batch.joins, again, own))
            first = rows.stop
        return joined(outs)

    def _run_batch(self, call: Call, joins: list[Join], again: bool, inner: NetworkCall) -> Any:
        """Run the network with the rows that join it, and keep those."""
        network = self.run.network(call)
        rows = Rows(inner.rows, joins)
        active = self._active(call, rows)

        def present(target: Target) -> int:
            return rows.present(network.fork(target))

        with ExitStack() as stack:
            states = [state for state in self.step.active if state.branch.needs_saliency]
            measured = [request(state, self.step, call, again) for state in states]
            options = dict(inner.options)
            if active or measured:
                changes = list(active.values())
                seen = replace(call, options=options)
                stack.enter_context(network.changed(seen, changes, present, measured))
            wide = inner
            if joins:
                wide = inner.mapped(rows.widened)
                joining = widening(network.shared, network.blocks, rows, options, network.axes)
                stack.enter_context(joining)
            out = wide.replaced(transformer_options=options).run()
        for state, perturbed in active.items():
            state.count(perturbed)
        return self._keep(call, inner, rows, out) if joins else out

    def _active(self, call: Call, rows: Rows) -> dict[BranchState, ActivePerturbation]:
        """Return what is changed in one call: rows that joined it, and base rows of `free`."""
        where: dict[BranchState, list[slice]] = {}
        for state in self.step.active:
            if state.branch.side == "free" and not state.unreachable:
                wanted = self.step.wanted(state)
                own = [n for n, uuid in enumerate(call.uuids) if uuid in wanted]
                where[state] = [call.rows(n) for n in own if rows.plain == len(call.x)]
                self.step.perturbed.update(call.uuids[n] for n in own if where[state])
            else:
                joins = [join for join in rows.joins if join.owner is state.branch]
                where[state] = [rows.of(join) for join in joins]
        return {state: self.run.perturbed(state, own) for state, own in where.items() if own}

    def _keep(self, call: Call, inner: NetworkCall, rows: Rows, out: Any) -> Any:
        """Keep the rows that joined a call, and return the others."""
        for join in rows.joins:
            key = self._key(call, join)
            if join.owner is not _WITNESS and not self.run.state(join.owner).hits:
                self.step.precomputed.explain([key], "its blocks were not reached")
                continue
            own = rows.of(join)
            part = map_tensors(lambda t, own=own: t[own], out)
            self.step.precomputed.keep(key, Prediction(part, inner, join.source))
        return map_tensors(lambda t: t[: rows.plain], out)
