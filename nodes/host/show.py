"""Sampling and decoding for nodes that make images by themselves, and words on a node.

Images are made as the host's KSampler and VAEDecode make them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS


def tell_node(words: str, node_id: str | None) -> None:
    """Show words on a node of the graph; where no server runs, nothing happens."""
    server = sys.modules.get("server")
    running = getattr(getattr(server, "PromptServer", None), "instance", None)
    if running is not None and node_id is not None:
        running.send_progress_text(words, node_id)


def sampled(
    models: Sequence[Any], node_id: str | None, *, latent: dict[str, Any], seed: int, **widgets: Any
) -> Iterator[torch.Tensor]:
    """Yield the latents that each of some models samples, and show on a node how far it is.

    Args:
        models: clones of one model.
        node_id: the node.
        latent: what to start from.
        seed: of the noise, the same for all.
        widgets: the others of the host's KSampler.

    Raises:
        InterruptProcessingException: if the person stops it.
    """
    ratios = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    given = [latent[name] for name in ratios if latent.get(name) is not None]
    image = comfy.sample.fix_empty_latent_channels(models[0], latent["samples"], *given)
    count = len(models)
    show = latent_preview.prepare_callback(models[0], count * widgets["steps"])
    for number, model in enumerate(models):
        comfy.model_management.throw_exception_if_processing_interrupted()
        tell_node(f"image {number + 1} of {count}", node_id)

        def step_done(step: int, denoised: Any, x: Any, steps: int, number: int = number) -> None:
            shown = denoised.tensors[0] if denoised.is_nested else denoised
            show(number * steps + step, shown, x, steps * count)

        yield comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(image, seed, latent.get("batch_index")),
            latent_image=image,
            noise_mask=latent.get("noise_mask"),
            callback=step_done,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
            **widgets,
        )
    tell_node(f"{count} images", node_id)


def decode(vae: Any, samples: torch.Tensor) -> torch.Tensor:
    """Return images of latents, frames of a video one after the other."""
    images = vae.decode(samples)
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images
