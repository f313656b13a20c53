"""From conditioning to pixels, as the host's KSampler and VAEDecode do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS


def sampled(
    model: Any, callback: Callable[..., None], *, latent: dict[str, Any], seed: int, **widgets: Any
) -> torch.Tensor:
    """Return the latents that a model samples, given the widgets of the host's KSampler.

    Raises:
        InterruptProcessingException: if the person stops it.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
    ratios = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    given = [latent[name] for name in ratios if latent.get(name) is not None]
    image = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *given)
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(image, seed, latent.get("batch_index")),
        latent_image=image,
        noise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
        **widgets,
    )


def decode(vae: Any, samples: torch.Tensor) -> torch.Tensor:
    """Return images of latents, frames of a video one after the other."""
    images = vae.decode(samples)
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images
