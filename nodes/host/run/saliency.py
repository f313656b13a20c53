"""Self-Attention Guidance in a sampling step: the mask from the base pass, the blurred latent.

Source: SAG, arXiv:2210.00939. The attention of each cond is measured in the base pass, over chunks
of queries, and weighed over the latent as the host weighs the cond's prediction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

import comfy.samplers
import torch
from comfy.context_windows import ContextFuseMethods

from ....seg_core import Target, degrade, spread_mass
from ..batch.call import Call
from ..networks.attention import Mass, SaliencyRequest
from ..settings.errors import GuidanceError
from ..settings.perturbation import InputBlur
from .run import Run
from .state import BranchState
from .step import Step

_NO_PICTURE = (
    "{} blurs rows and columns of a picture, and this model's latent has none: it is sound, or "
    "sound and picture packed together."
)
Parts = dict[Hashable, tuple[Any, dict[Target, Mass]]]
"""Part of a long latent -> the window that the host cut, and what tokens drew in each layer."""


def require_picture(model: Any, blur: InputBlur) -> None:
    """Refuse a model of sound, whose latent may have two axes besides its channels.

    Raises:
        GuidanceError: if the host names the model's latent one of sound.
    """
    latent_format = getattr(model.model, "latent_format", None)
    if "audio" in type(latent_format).__name__.lower():
        raise GuidanceError(_NO_PICTURE.format(blur.label))


def request(state: BranchState, step: Step, call: Call) -> SaliencyRequest:
    """Ask for the attention that a branch needs of the conds of one call of the base pass."""
    blur = state.branch.perturbation
    assert isinstance(blur, InputBlur)
    assert blur.source is not None
    run, shape = step.run, step.evaluations[0].latent.shape
    chunks = [i for i, uuid in enumerate(call.uuids) if uuid in state.wanted]
    again = any(step.times[uuid, call.window] > 1 for uuid in call.uuids)
    in_tiles = again and call.x.shape[2:] != shape[2:]
    if chunks and call.window is None and (call.chunk_rows != shape[0] or in_tiles):
        raise GuidanceError(
            f"{blur.label}: the mask from attention does not work where another node cuts the "
            "latent in tiles, or the batch in parts. Set mask to 'everywhere'."
        )
    window = call.options.get("context_window")

    def keep(target: Target, scale: int, measure: Callable[[slice], Mass]) -> None:
        for chunk in chunks:
            rows = slice(call.rows(chunk).start * scale, call.rows(chunk).stop * scale)
            key = (blur, call.uuids[chunk])
            if key not in step.measured:  # what another step left stands until then
                step.measured.add(key)
                run.saliency[key] = {}
            run.saliency[key].setdefault(call.window, (window, {}))[1][target] = measure(rows)

    return SaliencyRequest(blur.label, blur.source.targets if chunks else (), keep)


def blurred_start(
    blur: InputBlur, run: Run, args: dict[str, Any], conds: Any, prediction: Any
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the latent with the blurred image in it, under the same noise, and that image.

    Returns:
        The second is what a perfect model would predict of the first; None if there is no mask.
    """
    if args["input"].ndim < 4:
        raise GuidanceError(_NO_PICTURE.format(blur.label))
    mask: torch.Tensor | float = 1.0
    if blur.source is not None:
        mass = _attention_over_latent(blur, run, args, conds)
        if mass is None:
            return None
        attended = mass > blur.threshold
        if not attended.any():
            run.report.warn_once(
                f"{blur.label} pauses: in a step no position draws more than {blur.threshold:g} "
                "times the average attention, so there is nothing to blur. Lower threshold."
            )
            return None
        mask = attended.to(mass.dtype)
    blurred = degrade(prediction, mask, blur.sigma, kernel=blur.kernel)
    return args["input"] + (blurred - prediction), blurred


def _attention_over_latent(
    blur: InputBlur, run: Run, args: dict[str, Any], conds: list[dict[str, Any]]
) -> torch.Tensor | None:
    """Return the attention over the latent, each cond weighed as in the prediction."""
    x, sigma = args["input"], args["sigma"]
    total = x.new_zeros(x.shape[0], 1, *x.shape[2:])
    weights = torch.full_like(total, 1e-37)
    for cond in conds:
        placed = comfy.samplers.get_area_and_mult(cond, x, sigma)
        if placed is None:  # outside the cond's own range of steps
            continue
        parts = run.saliency.get((blur, cond["uuid"]))
        if not parts:
            run.report.warn_once(
                f"{blur.label}: no attention was measured for a prompt. Another node answered for "
                "the model, cut its batch in parts or reordered it, or compares other prompts than "
                "ComfyUI does. It pauses until there is some."
            )
            return None
        weight = placed.mult[:, :1]
        seen = _gathered(parts, weight, args["model_options"], sigma)
        for whole, part in ((total, seen.to(weight) * weight), (weights, weight)):
            _narrowed(whole, placed.area).add_(part)
    return total / weights


def _gathered(
    parts: Parts, like: torch.Tensor, model_options: dict[str, Any], sigma: torch.Tensor
) -> torch.Tensor:
    """Return a cond's attention over its area, windows weighed as the host weighs predictions."""
    if None in parts:
        _, layers = parts[None]
        return _spread(layers, like.shape)
    # The host's own arithmetic; nodes that listen to it are told nothing.
    handler = copy.copy(model_options["context_handler"])
    handler.callbacks = {}
    total, count = [torch.zeros_like(like)], [torch.zeros_like(like)]
    bias = [[0.0] * like.shape[handler.dim]]
    divides = handler.fuse_method.name != ContextFuseMethods.RELATIVE
    for number, (window, layers) in enumerate(parts.values()):
        before = getattr(window, "causal_anchor_index", None)
        anchor = int(before is not None and before >= 0)
        size = list(like.shape)
        size[handler.dim] = len(window.index_list) + anchor
        seen = _spread(layers, torch.Size(size)).to(like)
        seen = seen.narrow(handler.dim, anchor, len(window.index_list))
        handler.combine_context_window_results(
            like, [seen], None, window, number, len(parts), sigma, total, count, bias
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
