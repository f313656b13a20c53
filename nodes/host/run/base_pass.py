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
from ..batch.rows import Join, PrivateUuid, Rows
from ..batch.trees import joined, map_tensors
from ..batch.widening import widening
from ..settings.perturbation import BlockPerturbation
from .compat import foreign_code, has_rows_of_others, may_mix_rows, patches_in
from .joining import (
    FINAL,
    Batch,
    batches_of,
    blaming_kept_rows,
    cause_of,
    equal_within_rounding,
    free_on,
    random_numbers,
    unknown_rows,
)
from .precomputed import REORDERED, Prediction, inputs_of
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
        foreign = foreign_code(call)
        step.note(call, mixes=may_mix_rows(foreign))
        self.run.memory.see(call.model.diffusion_model)
        if not call.uuids:
            return call.run()
        self._spare(call)
        batches = batches_of(step, call)
        with blaming_kept_rows(self.run, foreign):
            if not batches and not any(state.branch.acts_in_base for state in step.active):
                return call.run()
            run = partial(self._run, call, batches, foreign)
            with intercepted(call, run, compiled=self.run.is_compiled(call)):
                out = call.run()
        self._explain(batches, "another node answered for the model")
        return out

    def _spare(self, call: Call) -> None:
        """Give up the branches whose perturbation changes nothing in calls like this one."""
        for state in self.step.active:
            perturbation = state.branch.perturbation
            if isinstance(perturbation, BlockPerturbation) and not state.unreachable:
                why = self.run.network(call).pointless(perturbation, call)
                why = why or unknown_rows(state, self.step, call)
                if why:
                    self.run.report.explain(state, why)

    def _run(self, call: Call, batches: list[Batch], foreign: Foreign, inner: NetworkCall) -> Any:
        """Run the network; rows join where that goes well, and nothing else changes by it."""
        alone = Batch(call)
        # Another node may part or repeat the rows inside of the call.
        moved = "another node changes the number of rows" if inner.rows != len(call.x) else ""
        moved = moved or self._reordered(call, inner)
        if moved:
            self.step.is_cut = True
            self._explain(batches, moved)
            return self._run_batch(replace(alone, measures=False), inner)
        if not batches:
            return self._run_batch(alone, inner)
        # Wrappers of the network may have put patches there since.
        foreign = (foreign | patches_in(inner.options)) - self.run.proved
        if foreign:
            return self._proved(call, batches, foreign, inner)
        out = self._attempted(batches, inner)
        return self._run_batch(alone, inner) if out is None else out

    def _reordered(self, call: Call, inner: NetworkCall) -> str:
        """Return why rows are not where a call says, as the first one of several prompts shows."""
        run, step = self.run, self.step
        is_whole = call.chunk_rows == len(step.evaluations[0].latent)
        if run.is_reordered is None and len(call.uuids) > 1 and is_whole:
            inside = "diffusion_model" in call.options.get("wrappers", {})
            may_be = inside or not step.is_direct
            run.is_reordered = may_be and has_rows_of_others(call, inner, step.guider)
        return REORDERED if run.is_reordered else ""

    def _attempted(self, batches: list[Batch], inner: NetworkCall) -> Any:
        """Run the network with the rows that join it; if it fails, return None and join no more."""
        try:
            return self._run_batches(batches, inner)
        except Exception as error:
            if isinstance(error, FINAL):
                raise
            self._give_up(batches, f"the model call failed with them ({cause_of(error)})")
        return None

    def _proved(
        self, call: Call, batches: list[Batch], foreign: Foreign, inner: NetworkCall
    ) -> Any:
        """Run a call as the host made it, for its output, and once more with the rows that join it.

        Those are kept if they, and rows without a perturbation, left everything as it was.
        """
        run = self.run
        draw_again = random_numbers(call.x.device)
        out = self._run_batch(Batch(call), inner.mapped(torch.clone))
        if run.memory.observe(call.model.diffusion_model):
            run.obstacle = "another node's code keeps what the network computes"
            self._explain(batches, run.obstacle)
            return out
        draw_on = random_numbers(call.x.device)
        draw_again()
        wide = self._attempted([self._witnessed(one) for one in batches], inner)
        if wide is not None and self._is_same(call, wide, out, inner):
            run.proved |= foreign
        elif wide is not None:
            self._give_up(batches, "the rows of a batch depend on each other")
        draw_on()
        return out

    def _witnessed(self, batch: Batch) -> Batch:
        """Return a batch which rows join without a perturbation, too."""
        witnesses = {}
        for join in sorted(batch.joins, key=lambda one: one.fork):
            uuid = join.uuid.original
            if not free_on(self.step, uuid):
                own = replace(join, uuid=PrivateUuid(_WITNESS, uuid), passes=False)
                witnesses.setdefault(join.chunk, own)
        return Batch(batch.call, [*batch.joins, *witnesses.values()], measures=False)

    def _is_same(self, call: Call, wide: Any, alone: Any, inner: NetworkCall) -> bool:
        """Tell whether base rows and witnesses came out as in the call that the host made."""
        dtype = inner.x.dtype
        same = equal_within_rounding(wide, alone, dtype)
        for chunk, uuid in enumerate(call.uuids):
            rows = call.rows(chunk)
            source = map_tensors(lambda t, rows=rows: t[rows], alone)
            for kept in self.step.precomputed.take((PrivateUuid(_WITNESS, uuid), call.window)):
                same = same and equal_within_rounding(kept.out, source, dtype)
        return same

    def _give_up(self, batches: list[Batch], why: str) -> None:
        """Let no more rows join in this run, keep none of these, and say why."""
        joins = [join for batch in batches for join in batch.joins if not _is_witness(join)]
        self.run.obstacle = why
        for join in joins:
            self.step.precomputed.take(join.key)
        self._explain(batches, why)
        self.run.report.explain_extra_passes((join.uuid.owner for join in joins), why)

    def _explain(self, batches: list[Batch], why: str) -> None:
        """Note why rows that were to join a call are not kept, where they are not."""
        self.step.precomputed.explain((join for one in batches for join in one.joins), why)

    def _run_batches(self, batches: list[Batch], inner: NetworkCall) -> Any:
        """Run the network, in one batch or several."""
        if len(batches) == 1:
            return self._run_batch(batches[0], inner)
        outs = []
        first = 0
        for batch in batches:
            rows = slice(first, first + len(batch.call.x))
            labels = {n: batch.call.options[n] for n in ("uuids", "cond_or_uncond")}
            own = inner.part(rows).replaced(transformer_options={**inner.options, **labels})
            outs.append(self._run_batch(batch, own))
            first = rows.stop
        return joined(outs)

    def _run_batch(self, batch: Batch, inner: NetworkCall) -> Any:
        """Run the network with the rows that join it, and keep those."""
        call, network = batch.call, self.run.network(batch.call)
        rows = Rows(inner.rows, len(call.uuids), batch.joins)
        active = self._active(call, rows)

        def present(target: Target) -> int:
            return rows.present(network.fork(target))

        with ExitStack() as stack:
            states = [state for state in self.step.active if state.branch.needs_saliency]
            measured = [request(state, self.step, call) for state in states if batch.measures]
            options = dict(inner.options)
            if active or measured:
                changes = list(active.values())
                seen = replace(call, options=options)
                stack.enter_context(network.changed(seen, changes, present, measured))
            wide = inner
            if batch.joins:
                wide = inner.mapped(rows.widened)
                joining = widening(network.shared, network.blocks, rows, options, network.axes)
                stack.enter_context(joining)
            out = wide.replaced(transformer_options=options).run()
        for state, perturbed in active.items():
            state.count(perturbed)
        return self._kept(call, inner, rows, out) if batch.joins else out

    def _active(self, call: Call, rows: Rows) -> dict[BranchState, ActivePerturbation]:
        """Return what is changed in one call: rows that joined it, and base rows of `free`."""
        where: dict[BranchState, list[slice]] = {}
        for state in self.step.active:
            if state.branch.side == "free" and not state.unreachable:
                own = [n for n, uuid in enumerate(call.uuids) if uuid in state.wanted]
                where[state] = [call.rows(n) for n in own if not self.step.is_cut]
                self.step.perturbed.update(call.uuids[n] for n in own if where[state])
            else:
                joins = [join for join in rows.joins if join.uuid.owner is state.branch]
                where[state] = [rows.of(join) for join in joins]
        return {state: self.run.perturbed(state, own) for state, own in where.items() if own}

    def _kept(self, call: Call, inner: NetworkCall, rows: Rows, out: Any) -> Any:
        """Keep the rows that joined a call, and return the others."""
        for join in rows.joins:
            if not _is_witness(join) and not self.run.state(join.uuid.owner).hits:
                self.step.precomputed.explain([join], "its blocks were not reached")
                continue
            own = rows.of(join)
            part = map_tensors(lambda t, own=own: t[own], out)
            kept = Prediction(part, inputs_of(inner, call.rows(join.chunk)))
            self.step.precomputed.keep(join.key, kept)
        return map_tensors(lambda t: t[: rows.plain], out)


def _is_witness(join: Join) -> bool:
    return join.uuid.owner is _WITNESS
