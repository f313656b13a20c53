"""Which rows of perturbed predictions join a plain call, and in how many batches it runs then."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import comfy.model_management

from ..calls.call import Call
from ..calls.mates import see_mates
from ..calls.rows import Join
from ..settings.branch import Branch
from ..settings.changes import PassBy
from ..settings.perturbation import BlockPerturbation
from .aside import REGROUPED
from .step import Step

Those = list[tuple[Branch, int]]
"""Branches, and the chunk of a call whose rows each perturbs."""


@dataclass(frozen=True)
class Batch:
    """Conds of a call that run together, and the rows that join them."""

    call: Call
    joins: list[Join]


def batches_of(step: Step, call: Call) -> list[Batch]:
    """Return a call in as few batches as fit into memory with the rows that join them.

    Returns:
        Nothing, if no rows join it.
    """
    are_mates = len(call.uuids) > 1 and see_mates(call.options)
    those = _wanted(step, call, are_mates=are_mates)
    if not those:
        return []
    obstacle = _obstacle(step, call)
    if obstacle:
        say_why(step, call, those, obstacle)
        return []
    regrouped = [one for one in those if one[0] in step.run.regrouped]
    say_why(step, call, regrouped, REGROUPED)
    those = [one for one in those if one not in regrouped]
    batches: list[Batch] = []
    room = _room(call)
    left = range(len(call.uuids))
    least = len(left) if are_mates else 1
    while left:
        sizes = [1 + sum(chunk == at for _, at in those) for chunk in left]
        counts = range(len(left), least, -1)
        count = next((n for n in counts if sum(sizes[:n]) <= room), least)
        chunks, left = left[:count], left[count:]
        here = [(branch, chunk - chunks[0]) for branch, chunk in those if chunk in chunks]
        part = call.part(chunks)
        if sum(sizes[:least]) > room:
            say_why(step, part, here, "memory is short")
            here = []
        batches.append(Batch(part, [_join(step, part, *one, are_mates=are_mates) for one in here]))
    return batches if any(batch.joins for batch in batches) else []


def say_why(step: Step, call: Call, those: Iterable[tuple[Branch, int]], why: str) -> None:
    """Note why rows did not join a call, where they will be looked for."""
    for branch, chunk in those:
        key = (branch, call.uuids[chunk], call.place)
        if key not in step.aside.predictions:
            step.aside.reasons.setdefault(key, why)


def _wanted(step: Step, call: Call, *, are_mates: bool) -> Those:
    """Return whose rows should join a call, branch by branch; mates join together."""
    joining = [
        branch
        for branch in step.active
        if branch.joins and branch not in step.run.idle and branch not in step.run.dead
    ]
    return [
        (branch, chunk)
        for branch in joining
        for chunk, uuid in enumerate(call.uuids)
        if not step.wanted(branch).isdisjoint(call.uuids if are_mates else [uuid])
    ]


def _obstacle(step: Step, call: Call) -> str:
    """Return why no rows can join a call; empty if they can."""
    if step.run.is_compiled(call):
        return "the model is compiled"
    if step.run.memories.forbids_joining:
        return "another node's code runs the network and keeps what it computes"
    if call.options.get("patches", {}).get("middle_patch", []) != step.middle_patches:
        return "GLIGEN places objects for its prompt's own rows alone"
    return step.run.view(call).obstacle(call)


def _join(step: Step, call: Call, branch: Branch, chunk: int, *, are_mates: bool) -> Join:
    assert isinstance(branch.perturbation, BlockPerturbation)
    view = step.run.view(call)
    targets = [branch.perturbation.targets[0]]
    # Rows that another branch perturbs in place differ from the plain ones from there on.
    together = call.uuids if are_mates else [call.uuids[chunk]]
    targets += [free.perturbation.targets[0] for free in _free_on(step, together)]
    fork = min(view.fork(target) for target in targets)
    uuid = step.run.private_uuid(branch, call.uuids[chunk])
    passes = isinstance(branch.perturbation.change, PassBy)
    return Join(branch, chunk, call.rows(chunk), fork, uuid, passes)


def _free_on(step: Step, uuids: list[Hashable]) -> list[Branch]:
    free = [branch for branch in step.active if branch.side == "free"]
    return [branch for branch in free if not step.wanted(branch).isdisjoint(uuids)]


def _room(call: Call) -> int:
    """Return how many conds of a call's size fit into memory at once, as the host estimates it."""
    patcher = getattr(call.model, "current_patcher", None)
    free_memory = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)
    free = free_memory(call.x.device)
    each = call.model.memory_required([call.chunk_rows, *call.x.shape[1:]])
    return int(free // each) if each > 0 else len(call.x)
