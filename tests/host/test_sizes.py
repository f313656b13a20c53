"""Every image size: the official SDXL buckets, long strips, odd latents."""

from __future__ import annotations

import functools
import importlib
import math

import pytest
import torch
from choice import some
from host_models import PACK, sample, seg, shared_model, tiny_model
from host_oracle import deviation, deviation_of_node

# Appendix I of the SDXL report, arXiv:2307.01952: height, width in pixels.
BUCKETS = [
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664),
    (640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280),
    (832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
    (1024, 960), (1088, 960), (1088, 896), (1152, 896), (1152, 832), (1216, 832), (1280, 768),
    (1344, 768), (1408, 704), (1472, 704), (1536, 640), (1600, 640), (1664, 576), (1728, 576),
    (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
]  # fmt: skip
STRIPS = [(1024, 512), (512, 1024), (1536, 512), (512, 1536), (2304, 256), (256, 2304)]
# Latents: cells, not pixels.
ODD = [(65, 65), (33, 17), (13, 31), (35, 3), (3, 35), (1, 9), (9, 1), (2, 3), (3, 3), (27, 20)]


def name_of(size):
    return f"{size[1]}x{size[0]}"


@functools.cache
def middle_only(dtype=torch.float32):
    """A network with attention in its middle block alone, halving the latent once."""
    return tiny_model(
        "sdxl", transformer_depth=[0, 0], transformer_depth_output=[0] * 4,
        transformer_depth_middle=1, dtype=dtype,
    )  # fmt: skip


LATENTS = {name_of(size): size for size in (*BUCKETS, *STRIPS)}
SOME = ("2048x512", "640x1600", "1152x896", "1024x1024", "512x1536", "256x2304", "2304x256")


@pytest.mark.parametrize("name", some(LATENTS, *SOME))
def test_node_guides_a_latent_whose_middle_grid_is_that_of_sdxl(name):
    size = LATENTS[name]
    # The tiny network halves once and SDXL twice, so half of SDXL's latent has SDXL's middle grid.
    latent = tuple(n // 16 for n in size)
    grids, seen = set(), []

    def watch_tokens(query, context, value, extra_options):
        grids.add(query.shape[1])
        return query, context, value

    def watch_results(args):
        seen.append(args["denoised"])
        return args["denoised"]

    model = middle_only().clone()
    model.set_model_sampler_post_cfg_function(watch_results)
    model = seg(model, sigma=10.0)
    model.set_model_attn1_patch(watch_tokens)
    model.set_model_sampler_post_cfg_function(watch_results)
    sample(model, size=latent, steps=1, cfg=1.0)
    plain, guided = seen
    assert grids == {(size[0] // 32) * (size[1] // 32)}
    assert torch.isfinite(guided).all()
    assert deviation(guided, plain) > 1e-6


@pytest.mark.parametrize("latent", ODD, ids=name_of)
def test_node_guides_latents_of_odd_size_as_the_dense_reference_does(latent):
    model = middle_only(torch.float64)
    found = deviation_of_node(
        model, sigma=1.3, size=latent, steps=1, cfg=1.0, scale=30.0, visible=1e-4
    )
    assert found <= 1e-6


@pytest.mark.parametrize("latent", [(1, 2), (2, 1)])
def test_one_token_has_nothing_to_blur(latent):
    model = shared_model("sd15")
    # Of two images: PyTorch refuses to normalise one value.
    found = sample(seg(model, sigma=1.3), size=latent, steps=1, batch=2)
    assert torch.allclose(found, sample(model, size=latent, steps=1, batch=2), rtol=1e-6)


def blurred_by_convolution(image, sigma):
    """Blur as the released code does, with the kernel cut to each axis, by a 2-D convolution."""
    kernels = []
    for size in image.shape[-2:]:
        taps = math.ceil(6 * sigma)
        taps = min(taps + 1 - taps % 2, size + 1 - size % 2)
        line = torch.arange(taps, dtype=torch.float64) - taps // 2
        weights = torch.exp(-0.5 * (line / sigma) ** 2)
        kernels.append(weights / weights.sum())
    kernel = torch.outer(*kernels).expand(image.shape[1], 1, -1, -1)
    tall, wide = (len(k) // 2 for k in kernels)
    padded = torch.nn.functional.pad(image, (wide, wide, tall, tall), mode="reflect")
    return torch.nn.functional.conv2d(padded, kernel, groups=image.shape[1])


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0, 10.0])
def test_blur_on_each_true_middle_grid_is_a_convolution_with_mirrored_border(sigma):
    blur_queries = importlib.import_module(PACK + ".seg_core").blur_queries
    for name, size in LATENTS.items():
        height, width = (n // 32 for n in size)
        generator = torch.Generator().manual_seed(height * 100 + width)
        image = torch.randn(1, 3, height, width, generator=generator, dtype=torch.float64)
        query = image.flatten(2).transpose(1, 2)
        ours = blur_queries(query, (height, width), sigma).transpose(1, 2).reshape(image.shape)
        expected = blurred_by_convolution(image, sigma)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12, msg=name)
