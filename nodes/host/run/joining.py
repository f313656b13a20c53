"""Which rows of perturbed predictions join a base call, and what it takes to prove that they may.

Nothing is predicted of other nodes' code: where any acts on the network, the first joined call of a
run is proved. The call is made alone as the host made it; in the joined one its rows must come out
the same, and so must rows that join it without a perturbation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch

from ..batch.call import Call
from ..batch.rows import Join, PrivateUuid
from ..batch.trees import tensors_in
from ..settings.changes import SkipBlock
from ..settings.errors import GuidanceError
from .run import Run
from .state import BranchState
from .step import Step

FINAL = (GuidanceError, comfy.model_management.InterruptProcessingException)
"""Errors that are no reason to try again: for the person to read, or by which they stop a run."""
BLAMELESS = (*FINAL, comfy.model_management.OOM_EXCEPTION)
"""Errors that are not the fault of other nodes' code."""
_HEADROOM = 1.5
"""What the host multiplies its estimate of memory by."""
_TF32 = 2.0**-10
"""Precision of TF32, in which a device may multiply matrices of float32."""


@dataclass(frozen=True)
class Batch:
    """Conds of a call that run together, the rows that join them, and whether it is measured."""

    call: Call
    joins: Sequence[Join] = ()
    measures: bool = True


def batches_of(step: Step, call: Call) -> list[Batch]:
    """Return a call in as few batches as fit into memory with the rows that join; none without."""
    joins = _joins(step, call)
    obstacle = _obstacle(step, call) if joins else ""
    if not joins or obstacle:
        step.precomputed.explain(joins, obstacle)
        return []
    batches: list[Batch] = []
    left = range(len(call.uuids))
    while left:
        sizes = [1 + sum(join.chunk == chunk for join in joins) for chunk in left]
        counts = range(len(left), 1, -1)
        count = next((n for n in counts if _fits(call, sum(sizes[:n]))), 1)
        chunks, left = left[:count], left[count:]
        here = [join for join in joins if join.chunk in chunks]
        if here and count == 1 and not _fits(call, sizes[0]):
            step.precomputed.explain(here, "memory is short")
            here = []
        own = [replace(join, chunk=join.chunk - chunks[0]) for join in here]
        batches.append(Batch(call.part(chunks), own))
    return batches if any(batch.joins for batch in batches) else []


def _joins(step: Step, call: Call) -> list[Join]:
    """Return which rows should join a call, branch by branch.

    A cond of the whole latent that was evaluated before belongs to another prediction of the guider
    now; of a part of it, to the next part.
    """
    is_whole = call.x[: call.chunk_rows].shape == step.evaluations[0].latent.shape
    kept = step.precomputed.predictions if step.is_direct and is_whole else {}
    joins = []
    for state in (one for one in step.active if one.joins):
        network, perturbation = step.run.network(call), step.run.perturbation(state.branch)
        passes = isinstance(perturbation.change, SkipBlock)
        for chunk, uuid in enumerate(call.uuids):
            own = PrivateUuid(state.branch, uuid)
            if uuid not in state.wanted or (own, call.window) in kept:
                continue
            # Rows that another branch perturbs in place differ from the base rows from there on.
            acting = [state.branch, *(one.branch for one in free_on(step, uuid))]
            first = (step.run.perturbation(branch).targets[0] for branch in acting)
            fork = min(network.fork(target) for target in first)
            joins.append(Join(own, call.window, chunk, fork, passes))
    return joins


def _obstacle(step: Step, call: Call) -> str:
    """Return why no rows can join a call; empty if they can."""
    if step.run.obstacle:
        return step.run.obstacle
    if step.run.is_compiled(call):
        return "the model is compiled"
    return step.run.network(call).obstacle(call)


def free_on(step: Step, uuid: Hashable) -> list[BranchState]:
    """Return the branches that perturb the base prediction of a cond itself."""
    free = [state for state in step.active if state.branch.side == "free"]
    return [state for state in free if uuid in state.wanted]


def unknown_rows(state: BranchState, step: Step, call: Call) -> str:
    """Return why `free` cannot tell whose the rows of a call are; empty if it can, or need not."""
    if state.branch.side != "free" or step.is_direct or call.window is not None:
        return ""
    if len(call.x) == len(call.uuids) * len(step.evaluations[0].latent):
        return ""
    return (
        "another node cuts the batch in parts, so that branch 'free' cannot tell the prompts "
        "apart. Set branch to 'conditional'"
    )


def _fits(call: Call, conds: int) -> bool:
    """Tell whether so many conds of a call's size fit into memory at once, by the host's rule."""
    shape = [conds * call.chunk_rows, *call.x.shape[1:]]
    inputs = {"c_concat": call.c_concat, "c_crossattn": call.c_crossattn, **call.extra}
    chunks = len(call.uuids)
    sizes = {name: _size(value, chunks) for name, value in inputs.items()}
    shapes = {name: [size] * conds for name, size in sizes.items() if size}
    needed = call.model.memory_required(shape, cond_shapes=shapes)
    return needed * _HEADROOM < call.model.current_patcher.get_free_memory(call.x.device)


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


def equal_within_rounding(one: Any, other: Any, dtype: torch.dtype) -> bool:
    """Tell whether two outputs of a network are the same but for rounding, at the cost of a wait.

    Their root mean square distance is compared with the square root of the dtype's precision: half
    of its digits.
    """
    epsilon = torch.finfo(dtype).eps if dtype.is_floating_point else _TF32
    for a, b in zip(tensors_in(one), tensors_in(other), strict=True):
        if a.shape != b.shape:
            return False
        if a.is_cuda and torch.backends.cudnn.allow_tf32:
            epsilon = max(epsilon, _TF32)
        work = torch.promote_types(a.dtype, torch.float32)  # not every device has float64
        # What is no number there is none here: the network's fault, and not that of joining.
        a, b = a.to(work).nan_to_num(), b.to(work).nan_to_num()
        if not (a - b).norm() <= epsilon**0.5 * b.norm():
            return False
    return True


def random_numbers(device: torch.device) -> Callable[[], None]:
    """Return a function that lets everybody draw the numbers again that would come next."""
    drawn, by_python = torch.get_rng_state(), random.getstate()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        torch.set_rng_state(drawn)
        random.setstate(by_python)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    return restore


@contextmanager
def blaming_kept_rows(run: Run, foreign: frozenset[Hashable]) -> Iterator[None]:
    """Say what may be wrong where a plain call fails after rows have joined one in vain.

    Code of other nodes that keeps tensors from call to call may have kept theirs. An error by which
    the joined call failed, too, is the plain call's own.

    Raises:
        GuidanceError: in the place of another error, where there is such code.
    """
    try:
        yield
    except Exception as error:
        is_its_own = not (run.obstacle and foreign) or cause_of(error) in run.obstacle
        if is_its_own or isinstance(error, BLAMELESS):
            raise
        raise GuidanceError(
            f"The model call fails ({cause_of(error)}). Another node may keep tensors from call to "
            "call, and have kept those of perturbed rows that shared one. Switch reuse off in the "
            "guidance nodes."
        ) from error


def cause_of(error: Exception) -> str:
    """Return the first line of an error, and what kind it is."""
    if isinstance(error, comfy.model_management.OOM_EXCEPTION):
        return "memory ran out"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
