"""Which perturbations are at work in one model call: whose rows, how, and what was reached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from ....seg_core import BlurMatrices, Target
from ..probe.recorder import AttentionProbe
from ..settings.perturbation import BlockPerturbation


@dataclass(eq=False)
class ActivePerturbation:
    """One perturbation at work in one model call.

    Attributes:
        perturbation: the change, and where.
        rows: the rows of the batch that it changes; none of them overlap.
        matrices: blur matrices of the run.
        probe: what measures the attention it smooths; None without a probe.
        seed: of the sampler.
        step: number of the model evaluation in the run.
        reached: the layers that were in fact changed.
    """

    perturbation: BlockPerturbation
    rows: tuple[slice, ...]
    matrices: BlurMatrices
    probe: AttentionProbe | None = None
    seed: int = 0
    step: int = 0
    reached: set[Target] = field(default_factory=set)


@dataclass(frozen=True)
class RowGroup:
    """Neighbouring rows of a tensor to which the same perturbations apply."""

    rows: slice
    active: tuple[ActivePerturbation, ...]


def row_groups(active: Iterable[ActivePerturbation], present: int, size: int) -> list[RowGroup]:
    """Return all rows of a tensor in order, grouped by which perturbations change them.

    Args:
        active: those that act on the tensor.
        present: rows of the batch that are computed here.
        size: rows of the tensor, `present` or a multiple of it: frames of a video, places of an
            image or windows of tokens may lie in the batch, one row's after the other's.
    """
    spans = [(rows, one) for one in active for rows in one.rows if rows.start < present]
    edges = sorted({0, present, *(e for rows, _ in spans for e in (rows.start, rows.stop))})
    groups = []
    for start, stop in pairwise(edges):
        here = tuple(one for rows, one in spans if rows.start <= start and stop <= rows.stop)
        groups.append(RowGroup(slice(start * size // present, stop * size // present), here))
    return groups
