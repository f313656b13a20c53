"""From predictions to the guided result: blending, rescaling and the active window.

Deliberately blind to how the perturbed prediction was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ._shapes import Float
from .blur import working_dtype
from .rescale import rescale_factor, salient_fusion

RescaleMode: TypeAlias = Literal["full", "partial", "snf"]
RESCALE_MODES: tuple[RescaleMode, ...] = ("full", "partial", "snf")


def blend(
    denoised: Float[Tensor, " *latent"],
    prediction: Float[Tensor, " *latent"],
    perturbed: Float[Tensor, " *latent"],
    scale: float,
) -> Float[Tensor, " *latent"]:
    r"""Return the result pushed away from the perturbed prediction.

    $$d + s\,(p - \tilde p)$$

    Source: the released SEG code, SusungHong/SEG-SDXL at cf8256d, whose scale this is. The
    paper's Eq. 9 writes ``gamma p - (gamma - 1) p~``: its ``gamma = 3`` is ``scale = 2`` here.

    Convention: arithmetic in at least float32.

    Args:
        denoised: what the graph made of the ordinary predictions, plain CFG or other.
        prediction: the ordinary prediction of the perturbed branch.
        perturbed: the same prediction with smoothed attention.
        scale: guidance weight; ``0`` returns ``denoised`` itself.

    Returns:
        The guided result in the dtype of ``denoised``.
    """
    if scale == 0:
        return denoised
    return _add(denoised, _push(prediction, perturbed, scale, denoised))


def apply_guidance(
    denoised: Float[Tensor, " batch *latent"],
    prediction: Float[Tensor, " batch *latent"],
    perturbed: Float[Tensor, " batch *latent"],
    scale: float,
    *,
    rescale: float = 0.0,
    rescale_mode: str = "full",
    cond: Float[Tensor, " batch *latent"] | None = None,
    uncond: Float[Tensor, " batch *latent"] | None = None,
) -> Float[Tensor, " batch *latent"]:
    r"""Return the guided result, rescaled: the whole formula of the post-CFG hook.

    $$g = s\,(p - \tilde p), \qquad
      d + g \left(1 - r + r\, \frac{\operatorname{std} c}{\operatorname{std}(b + g)}\right)$$

    with ``b = d`` for ``full`` and ``b = c`` for ``partial``. ``snf`` picks, cell by cell, either
    the CFG difference ``d - u`` or ``g``, whichever is the more salient, and adds it to the
    unconditional prediction ``u``; see `salient_fusion`.

    Source: the modes ``full``, ``partial`` and ``snf`` of pamparamm/sd-perturbed-attention,
    guidance_utils.py at 59be2a7; the first two go back to arXiv:2305.08891. Differs from it in:
    video latents work, and a standard deviation of 0 leaves the guidance as it is.

    Convention: statistics belong to one sample, so a batch mate never changes an image.

    Args:
        denoised: what the graph made of the ordinary predictions.
        prediction: the ordinary prediction of the perturbed branch.
        perturbed: the same prediction with smoothed attention.
        scale: guidance weight; ``0`` returns ``denoised`` itself.
        rescale: share ``r`` of the correction, 0 to 1; ``0`` is `blend`. ``snf`` has no amount and
            ignores it.
        rescale_mode: ``"full"``, ``"partial"`` or ``"snf"``.
        cond: the conditional prediction ``c``; ``None`` means it is ``prediction``.
        uncond: the unconditional prediction, used by ``snf`` alone; without it ``snf`` is
            `blend`.

    Returns:
        The guided result in the dtype of ``denoised``.

    Raises:
        ValueError: if ``rescale`` is outside 0 to 1 or the mode is unknown.
    """
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"rescale must be between 0 and 1, got {rescale}")
    if rescale_mode not in RESCALE_MODES:
        raise ValueError(
            f"the rescale mode must be one of {', '.join(RESCALE_MODES)}, got {rescale_mode!r}"
        )
    if scale == 0:
        return denoised
    push = _push(prediction, perturbed, scale, denoised)
    if rescale_mode == "snf":
        if uncond is None:
            return _add(denoised, push)
        base = uncond.to(push.dtype)
        return (base + salient_fusion(denoised.to(push.dtype) - base, push)).to(denoised.dtype)
    if rescale == 0:
        return _add(denoised, push)
    target = (prediction if cond is None else cond).to(push.dtype)
    start = denoised.to(push.dtype) if rescale_mode == "full" else target
    return _add(denoised, push * rescale_factor(target, start + push, rescale))


def held_difference(
    difference: Float[Tensor, " batch *latent"],
    sigma_then: Float[Tensor, " #batch"],
    sigma_now: Float[Tensor, " #batch"],
) -> Float[Tensor, " batch *latent"]:
    r"""Return a difference of denoised predictions at a later noise level, if its noise stays.

    $$\Delta_{now} = \Delta_{then}\,\frac{\sigma_{now}}{\sigma_{then}}$$

    A model predicts noise, $\epsilon = (x - d) / \sigma$, or what it follows from, as velocity: the
    difference of two predictions of one latent is $\Delta = -\sigma\,\Delta\epsilon$ for all.
    Where there was no noise, none is held.

    Source: the difference of CFG is held in noise by Tortoise and Hare Guidance, arXiv:2511.04117.

    Args:
        difference: of the ordinary and the perturbed denoised prediction.
        sigma_then: the noise level at which it was computed.
        sigma_now: the noise level of the present prediction.

    Returns:
        The difference to expect, in the same dtype.
    """
    work = working_dtype(difference)
    ratio = (sigma_now / sigma_then).where(sigma_then > 0, 0).to(difference.device, work)
    ratio = ratio.reshape(-1, *(1,) * (difference.ndim - 1))
    return (difference.to(work) * ratio).to(difference.dtype)


def effective_cfg(
    before: Float[Tensor, " batch *latent"],
    guided: Float[Tensor, " batch *latent"],
    cond: Float[Tensor, " batch *latent"],
    uncond: Float[Tensor, " batch *latent"],
) -> Float[Tensor, " 2"]:
    r"""Return the cfg that a guided prediction is nearest to, and how much no cfg could give.

    $$w = \frac{\langle g - u, c - u\rangle}{\lVert c - u\rVert^2}, \qquad
      \frac{\lVert p - \operatorname{proj}_{c - u} p\rVert}{\lVert p\rVert}, \quad p = g - b$$

    Source: the effective guidance strength of arXiv:2602.22570.

    Args:
        before: the denoised prediction ``b`` before guidance.
        guided: the guided prediction ``g``.
        cond: the conditional prediction ``c``.
        uncond: the unconditional prediction ``u``.

    Returns:
        The effective cfg ``w``, and the share of the push ``p`` beside the direction of cfg, 0 to
        1, in at least float32. NaN where there is no direction, or no push.
    """
    given, dtype = (before, guided, cond, uncond), working_dtype(guided)
    before, guided, cond, uncond = (t.to(dtype).flatten() for t in given)
    direction, push = cond - uncond, guided - before
    square = direction.dot(direction)
    beside = push - push.dot(direction) / square * direction
    share = (beside.dot(beside) / push.dot(push)).sqrt()
    return torch.stack([(guided - uncond).dot(direction) / square, share])


@dataclass(frozen=True)
class Window:
    """The part of sampling in which guidance acts.

    Attributes:
        start_percent: first active point, 0 to 1 of the way from noise to image.
        end_percent: last active point, likewise.

    Raises:
        ValueError: if a percentage is outside 0 to 1 or the window ends before it starts.
    """

    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self) -> None:
        for name in ("start_percent", "end_percent"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.start_percent > self.end_percent:
            raise ValueError(
                f"start_percent must not be above end_percent, got {self.start_percent} and "
                f"{self.end_percent}: guidance would never act; lower the start or raise the end"
            )

    @property
    def covers_everything(self) -> bool:
        """True if no step lies outside."""
        return self.start_percent <= 0.0 and self.end_percent >= 1.0

    def contains(self, noise_sigma: float, sigma_at_start: float, sigma_at_end: float) -> bool:
        """Tell whether guidance acts at a noise level.

        Convention: noise levels fall while sampling, and both ends belong to the window, as in
        ComfyUI's timestep ranges of conditionings.

        Args:
            noise_sigma: noise level of the step.
            sigma_at_start: noise level of ``start_percent`` in the host's schedule.
            sigma_at_end: noise level of ``end_percent``.

        Returns:
            True inside the window, and always if it covers everything.
        """
        return self.covers_everything or sigma_at_end <= noise_sigma <= sigma_at_start


def _push(prediction: Tensor, perturbed: Tensor, scale: float, denoised: Tensor) -> Tensor:
    dtype = torch.promote_types(working_dtype(denoised), prediction.dtype)
    return scale * (prediction.to(dtype) - perturbed.to(dtype))


def _add(denoised: Tensor, push: Tensor) -> Tensor:
    return (denoised.to(push.dtype) + push).to(denoised.dtype)
