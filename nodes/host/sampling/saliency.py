"""Self-Attention Guidance in a sampling step: the mask from the main pass, the blurred latent.

Source: SAG, arXiv:2210.00939. The attention of each cond is measured in the main pass, over chunks
of queries, and weighed over the latent as the host weighs the cond's prediction.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable
from typing import Any

import comfy.samplers
import torch
from comfy.context_windows import ContextFuseMethods

from ....seg_core import Target, degrade, spread_mass
from ..calls.call import Call
from ..networks.view import Mass, Measure, Watch
from ..settings.branch import Branch
from ..settings.perturbation import InputBlur
from .run import Run
from .step import Step


class Masses:
    """What one cond's attention gathered in one step, in each part of the latent that a call saw.

    Attributes:
        step: the step.
        parts: part of the latent -> the window that the host cut, and the mass of each layer.
    """

    def __init__(self, step: Any) -> None:
        self.step = weakref.ref(step)
        self.parts: dict[Hashable, tuple[Any, dict[Target, Mass]]] = {}


def watch(branch: Branch, step: Step, call: Call) -> Watch:
    """Measure the attention of the conds of one call of the main pass."""
    blur = branch.perturbation
    assert isinstance(blur, InputBlur)
    assert blur.watched is not None
    run, shape = step.run, step.shape
    wanted = run.wanted.get(branch)
    chunks = [i for i, uuid in enumerate(call.uuids) if wanted is None or uuid in wanted]
    in_tiles = call.again and call.x.shape[2:] != shape[2:]
    if chunks and call.place is None and (call.chunk_rows != shape[0] or in_tiles):
        raise ValueError(
            f"{blur.label}: the mask from attention does not work where another node cuts the "
            "latent in tiles. Set mask to 'everywhere'."
        )
    window = call.options.get("context_window")

    def keep(target: Target, scale: int, measure: Measure) -> None:
        for chunk in chunks:
            rows = slice(call.rows(chunk).start * scale, call.rows(chunk).stop * scale)
            key = (blur, call.uuids[chunk])
            if key not in run.masses or run.masses[key].step() is not step:
                run.masses[key] = Masses(step)
            parts = run.masses[key].parts
            parts.setdefault(call.place, (window, {}))[1][target] = measure(rows)

    return Watch(blur.label, blur.watched.targets if chunks else (), keep)


def blurred_start(
    blur: InputBlur, run: Run, args: dict[str, Any], conds: Any, prediction: Any
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the latent with the blurred image in it, under the same noise, and that image.

    Returns:
        The second is what a perfect model would predict of the first; None if there is no mask.
    """
    if args["input"].ndim < 4:
        raise ValueError(
            f"{blur.label} blurs rows and columns of a picture, and this model's latent has none: "
            "it is sound, or sound and picture packed together."
        )
    mask: torch.Tensor | float = 1.0
    if blur.watched is not None:
        mass = attention_over_latent(
            blur, run, args["input"], args["sigma"], conds, args["model_options"]
        )
        if mass is None:
            return None
        mask = (mass > blur.threshold).to(mass.dtype)
    blurred = degrade(prediction, mask, blur.sigma, kernel=blur.kernel)
    return args["input"] + (blurred - prediction), blurred


def attention_over_latent(
    blur: InputBlur,
    run: Run,
    x: torch.Tensor,
    sigma: torch.Tensor,
    conds: list[dict[str, Any]],
    model_options: dict[str, Any],
) -> torch.Tensor | None:
    """Return the attention over the latent, each cond weighed as in the prediction."""
    total = x.new_zeros(x.shape[0], 1, *x.shape[2:])
    weights = torch.full_like(total, 1e-37)
    for cond in conds:
        placed = comfy.samplers.get_area_and_mult(cond, x, sigma)
        if placed is None:  # outside the cond's own range of steps
            continue
        masses = run.masses.get((blur, cond["uuid"]))
        if masses is None or not masses.parts:
            run.report.warn_once(
                f"{blur.label}: no attention was seen for a prompt, because another node "
                "answered for the model. It pauses until there is some."
            )
            return None
        seen = _gathered(masses, placed.mult[:, :1], model_options, sigma)
        weight = placed.mult[:, :1]
        for whole, part in ((total, seen.to(weight.dtype) * weight), (weights, weight)):
            _narrowed(whole, placed.area).add_(part)
    return total / weights


def _gathered(
    masses: Masses, like: torch.Tensor, model_options: dict[str, Any], sigma: torch.Tensor
) -> torch.Tensor:
    """Return a cond's attention over its area, windows weighed as the host weighs predictions."""
    if None in masses.parts:
        _, layers = masses.parts[None]
        return _spread(layers, like.shape)
    # The host's own arithmetic; nodes that listen to it are told nothing.
    handler = copy.copy(model_options["context_handler"])
    handler.callbacks = {}
    total, count = [torch.zeros_like(like)], [torch.zeros_like(like)]
    bias = [[0.0] * like.shape[handler.dim]]
    divides = handler.fuse_method.name != ContextFuseMethods.RELATIVE
    for number, (window, layers) in enumerate(masses.parts.values()):
        before = getattr(window, "causal_anchor_index", None)
        anchor = int(before is not None and before >= 0)
        size = list(like.shape)
        size[handler.dim] = len(window.index_list) + anchor
        seen = _spread(layers, torch.Size(size)).to(like.dtype)
        seen = seen.narrow(handler.dim, anchor, len(window.index_list))
        handler.combine_context_window_results(
            like, [seen], None, window, number, len(masses.parts), sigma, total, count, bias
        )
    return total[0] / count[0] if divides else total[0]


def _spread(layers: dict[Target, Mass], shape: torch.Size) -> torch.Tensor:
    """Return the mean mass of some layers, at the size of a latent."""
    maps = []
    for seen in layers.values():
        size = shape[2:]
        if seen.patch is not None:  # the last patches may reach beyond the border
            cells = (seen.grid.frames, seen.grid.height, seen.grid.width)
            whole = [n * p for n, p in zip(cells, seen.patch, strict=True)][-len(size) :]
            one = spread_mass(seen.mass, seen.grid, whole)
            if len(size) == 3 and whole[0] < size[0]:  # given frames at the end draw nothing
                one = torch.nn.functional.pad(one, (0, 0, 0, 0, 0, size[0] - whole[0]))
            maps.append(one[(..., *(slice(n) for n in size))])
        else:
            maps.append(spread_mass(seen.mass, seen.grid, size))
    return torch.stack(maps).mean(dim=0)


def _narrowed(whole: torch.Tensor, area: list[int] | None) -> torch.Tensor:
    """Return the part of a latent that a cond's area covers, as the host lays it out."""
    if area is None:
        return whole
    dims = len(area) // 2
    for dim in range(dims):
        whole = whole.narrow(dim + 2, area[dim + dims], area[dim])
    return whole
