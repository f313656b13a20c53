"""Parity with the released code: whole runs, from noise to latents, in ComfyUI's own sampler."""

from __future__ import annotations

import math
from pathlib import Path

import comfy.model_base
import comfy.sample
import comfy.samplers
import comfy.utils
import numpy as np
import pytest
import torch
from choice import each
from host_models import bare_model, seg

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "official_run.npz")
RUNS = range(10)


def official_model(seed):
    """Rebuild the network of the goldens; its weights were drawn in diffusers' order of names."""
    model = bare_model("sdxl", num_res_blocks=[1, 1])
    network = model.model.diffusion_model
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    theirs = {k: v for k, v in names.items() if not k.startswith("class_embedding.")}
    ours = dict(network.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    filled = set()
    with torch.no_grad():
        for name in sorted(theirs):
            weight = ours.get(theirs[name])
            if weight is None:
                continue
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                drawn = drawn / math.sqrt(weight[0].numel())
            else:
                drawn = 0.1 * drawn + float("norm" in name and name.endswith("weight"))
            weight.copy_(drawn)
            filled.add(theirs[name])
    assert filled == set(ours), "every weight of the network is one of the goldens"
    return model


def run(index, change=lambda settings: settings, **advanced):
    pixels, cfg, scale, sigma, init_noise_sigma, seed = GOLDENS[f"{index:02d}_meta"]
    settings = change({"scale": scale, "sigma": math.inf if sigma >= 1e7 else sigma})
    model = official_model(int(seed))
    model = seg(model, **settings, **advanced)
    sigmas = torch.from_numpy(GOLDENS[f"{index:02d}_sigmas"])
    noise = torch.from_numpy(GOLDENS[f"{index:02d}_noise"]) * init_noise_sigma / sigmas[0]

    def prompt(sign):
        size = {"width": pixels, "height": pixels, "target_width": pixels, "target_height": pixels}
        pooled = torch.from_numpy(GOLDENS[f"pooled_{sign}"])
        return [[torch.from_numpy(GOLDENS[f"emb_{sign}"]), {"pooled_output": pooled, **size}]]

    with torch.inference_mode():
        result = comfy.sample.sample_custom(
            model, noise, float(cfg), comfy.samplers.sampler_object("euler"), sigmas,
            prompt("pos"), prompt("neg"), torch.zeros_like(noise), disable_pbar=True,
        )  # fmt: skip
    ours = model.model.latent_format.process_in(result)
    theirs = torch.from_numpy(GOLDENS[f"{index:02d}_latents"])
    return float((ours - theirs).abs().max() / theirs.std())


@pytest.mark.floor
@pytest.mark.parametrize(*each(index=RUNS, reuse=[True, False]))
def test_node_reaches_the_latents_of_the_released_pipeline(index, reuse):
    assert run(index, reuse=reuse) < 2e-5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: s | {"scale": 2.9},
        lambda s: s | {"sigma": s["sigma"] * 0.9},
        lambda s: s | {"sigma": math.inf},
        lambda s: s | {"scale": 0.0},
    ],
)
def test_the_comparison_notices_a_wrong_setting(wrong):
    finite = next(
        i for i in RUNS if GOLDENS[f"{i:02d}_meta"][2] and GOLDENS[f"{i:02d}_meta"][3] < 9
    )
    assert run(finite, wrong) > 2e-4
