"""What is to be changed in one model call: whose rows, how, and what was reached of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from ....seg_core import BlurMatrices, Target
from ..probe.look import Look
from ..settings.perturbation import BlockPerturbation


@dataclass(eq=False)
class Site:
    """One perturbation at work in one model call.

    Attributes:
        perturbation: the change, and where.
        rows: the rows of the batch that it changes; none of them overlap.
        matrices: blur matrices of the run.
        look: what a probe wants to see; None without a probe.
        seed: of the sampler.
        step: number of the model evaluation in the run.
        reached: the layers that were in fact changed.
    """

    perturbation: BlockPerturbation
    rows: tuple[slice, ...]
    matrices: BlurMatrices
    look: Look | None = None
    seed: int = 0
    step: int = 0
    reached: set[Target] = field(default_factory=set)


@dataclass(frozen=True)
class Part:
    """Neighbouring rows to which the same sites apply."""

    rows: slice
    sites: tuple[Site, ...]


def parts_of(sites: Iterable[Site], present: int, size: int) -> list[Part]:
    """Return all rows of a tensor in order, parted by which sites change them.

    Args:
        sites: those that act on the tensor.
        present: rows of the batch that are computed here.
        size: rows of the tensor: frames of a video may lie in the batch, or its places.
    """
    spans = [(rows, site) for site in sites for rows in site.rows if rows.start < present]
    edges = sorted({0, present, *(e for rows, _ in spans for e in (rows.start, rows.stop))})
    parts = []
    for start, stop in pairwise(edges):
        here = tuple(site for rows, site in spans if rows.start <= start and stop <= rows.stop)
        parts.append(Part(slice(start * size // present, stop * size // present), here))
    return parts
