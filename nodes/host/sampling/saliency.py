"""Self-Attention Guidance in a sampling step: the mask from the main pass, the blurred latent.

Source: SAG, arXiv:2210.00939. The attention of each cond is measured in the main pass, over chunks
of queries, and weighed over the latent as the host weighs the cond's prediction.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch

from ....seg_core import Target, TokenGrid, column_mass, degrade, spread_mass
from ..calls.call import Call
from ..networks.view import Options, Present, View
from ..settings.branch import Branch
from ..settings.perturbation import InputBlur
from .run import Run


@dataclass(frozen=True)
class Mass:
    """How much attention each token of one cond drew in a block."""

    mass: torch.Tensor
    grid: TokenGrid


def watch(
    branch: Branch,
    run: Run,
    view: View,
    call: Call,
    options: Options,
    shape: torch.Size,
    present: Present,
) -> AbstractContextManager[Options]:
    """Measure the attention of the conds of one call of the main pass."""
    blur = branch.perturbation
    assert isinstance(blur, InputBlur)
    assert blur.watched is not None
    wanted = run.wanted.get(branch)
    chunks = [i for i, uuid in enumerate(call.uuids) if wanted is None or uuid in wanted]
    in_pieces = call.chunk_rows != shape[0] or (call.again and call.x.shape[2:] != shape[2:])
    if chunks and (call.place is not None or in_pieces):
        raise ValueError(
            f"{blur.label}: the mask from attention does not work where another node cuts the "
            "latent in tiles or context windows. Set mask to 'everywhere'."
        )

    def keep(target: Target, q: torch.Tensor, k: torch.Tensor, heads: int, grid: TokenGrid) -> None:
        frames = q.shape[0] // present(target)
        for chunk in chunks:
            rows = slice(call.rows(chunk).start * frames, call.rows(chunk).stop * frames)
            masses = run.masses.setdefault((blur, call.uuids[chunk]), {})
            masses[target] = Mass(column_mass(q[rows], k[rows], heads), grid)

    return view.watched(options, blur.label, blur.watched.targets if chunks else (), keep)


def blurred_start(
    blur: InputBlur, run: Run, args: dict[str, Any], conds: Any, prediction: Any
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the latent with the blurred image in it, under the same noise, and that image.

    Returns:
        The second is what a perfect model would predict of the first; None if there is no mask.
    """
    mask: torch.Tensor | float = 1.0
    if blur.watched is not None:
        mass = attention_over_latent(blur, run, args["input"], args["sigma"], conds)
        if mass is None:
            return None
        mask = (mass > blur.threshold).to(mass.dtype)
    blurred = degrade(prediction, mask, blur.sigma, kernel=blur.kernel)
    return args["input"] + (blurred - prediction), blurred


def attention_over_latent(
    blur: InputBlur, run: Run, x: torch.Tensor, sigma: torch.Tensor, conds: list[dict[str, Any]]
) -> torch.Tensor | None:
    """Return the attention over the latent, each cond weighed as in the prediction."""
    total = x.new_zeros(x.shape[0], 1, *x.shape[2:])
    weights = torch.full_like(total, 1e-37)
    for cond in conds:
        placed = comfy.samplers.get_area_and_mult(cond, x, sigma)
        if placed is None:  # outside the cond's own range of steps
            continue
        masses = run.masses.get((blur, cond["uuid"]))
        if not masses:
            run.report.warn_once(
                f"{blur.label}: no attention was seen for a prompt, because another node "
                "answered for the model. It pauses until there is some."
            )
            return None
        maps = [spread_mass(m.mass, m.grid, placed.mult.shape[2:]) for m in masses.values()]
        weight = placed.mult[:, :1]
        seen = torch.stack(maps).mean(dim=0).to(weight.dtype) * weight
        for whole, part in ((total, seen), (weights, weight)):
            _narrowed(whole, placed.area).add_(part)
    return total / weights


def _narrowed(whole: torch.Tensor, area: list[int] | None) -> torch.Tensor:
    """Return the part of a latent that a cond's area covers, as the host lays it out."""
    if area is None:
        return whole
    dims = len(area) // 2
    for dim in range(dims):
        whole = whole.narrow(dim + 2, area[dim + dims], area[dim])
    return whole
