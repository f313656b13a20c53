"""Which rows of perturbed predictions join a base call, and in how many batches it runs then."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ..batch.call import Call
from ..batch.rows import Join
from ..settings.changes import SkipBlock
from ..settings.perturbation import BlockPerturbation
from .precomputed import Key
from .state import BranchState
from .step import Step

Requests = list[tuple[BranchState, int]]
"""Branches, and the chunk of a call whose rows each perturbs."""
_HEADROOM = 1.5
"""What the host multiplies its estimate of memory by."""


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
    wanted = _requests(step, call)
    obstacle = _obstacle(step, call) if wanted else ""
    if not wanted or obstacle:
        step.precomputed.explain(keys_of(call, wanted), obstacle)
        return []
    batches: list[Batch] = []
    left = range(len(call.uuids))
    while left:
        sizes = [1 + sum(chunk == at for _, at in wanted) for chunk in left]
        counts = range(len(left), 1, -1)
        count = next((n for n in counts if _fits(call, sum(sizes[:n]))), 1)
        chunks, left = left[:count], left[count:]
        here = [(state, chunk - chunks[0]) for state, chunk in wanted if chunk in chunks]
        part = call.part(chunks)
        if here and count == 1 and not _fits(call, sizes[0]):
            step.precomputed.explain(keys_of(part, here), "memory is short")
            here = []
        batches.append(Batch(part, [_join(step, part, *one) for one in here]))
    return batches if any(batch.joins for batch in batches) else []


def keys_of(call: Call, wanted: Iterable[tuple[BranchState, int]]) -> list[Key]:
    """Return under which keys the predictions that are wanted are looked for."""
    return [(state.branch, call.uuids[chunk], call.window) for state, chunk in wanted]


def _requests(step: Step, call: Call) -> Requests:
    """Return whose rows should join a call, branch by branch.

    A cond that was evaluated before, by itself, belongs to another prediction of the guider now.
    """
    kept = step.precomputed.predictions if step.is_direct else {}
    return [
        (state, chunk)
        for state in step.active
        if state.joins
        for chunk, uuid in enumerate(call.uuids)
        if uuid in step.wanted(state) and (state.branch, uuid, call.window) not in kept
    ]


def _obstacle(step: Step, call: Call) -> str:
    """Return why no rows can join a call; empty if they can."""
    if step.run.joining.obstacle:
        return step.run.joining.obstacle
    if step.run.is_compiled(call):
        return "the model is compiled"
    return step.run.network(call).obstacle(call)


def _join(step: Step, call: Call, state: BranchState, chunk: int) -> Join:
    perturbation = state.branch.perturbation
    assert isinstance(perturbation, BlockPerturbation)
    network, uuid = step.run.network(call), call.uuids[chunk]
    targets = [perturbation.targets[0]]
    # Rows that another branch perturbs in place differ from the base rows from there on.
    free = [other.branch for other in free_on(step, uuid)]
    targets += [branch.perturbation.targets[0] for branch in free]
    fork = min(network.fork(target) for target in targets)
    private = step.run.private_uuid(state.branch, uuid)
    passes = isinstance(perturbation.change, SkipBlock)
    return Join(state.branch, chunk, call.rows(chunk), fork, private, passes)


def free_on(step: Step, uuid: Hashable) -> list[BranchState]:
    """Return the branches that perturb the base prediction of a cond itself."""
    free = [state for state in step.active if state.branch.side == "free"]
    return [state for state in free if uuid in step.wanted(state)]


def _fits(call: Call, conds: int) -> bool:
    """Tell whether so many conds of a call's size fit into memory at once, by the host's rule."""
    patcher = getattr(call.model, "current_patcher", None)
    free_memory = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)
    shape = [conds * call.chunk_rows, *call.x.shape[1:]]
    inputs = {"c_concat": call.c_concat, "c_crossattn": call.c_crossattn, **call.extra}
    chunks = len(call.uuids)
    sizes = {name: _size(value, chunks) for name, value in inputs.items()}
    shapes = {name: [size] * conds for name, size in sizes.items() if size}
    needed = call.model.memory_required(shape, cond_shapes=shapes)
    return needed * _HEADROOM < free_memory(call.x.device)


def _size(value: Any, chunks: int) -> list[int]:
    """Return the shape of one cond's part of an input, as the host counts it; empty if it has none.

    Several tensors count as one of as many elements, with the last one's channels.
    """
    if torch.is_tensor(value) and value.ndim:
        return [max(value.shape[0] // chunks, 1), *value.shape[1:]]
    if not isinstance(value, list | tuple):
        return []
    sizes = [size for size in (_size(one, chunks) for one in value) if size]
    if not sizes:
        return []
    channels = sizes[-1][1] if len(sizes[-1]) > 1 else 1
    return [1, channels, sum(map(math.prod, sizes)) // channels]
