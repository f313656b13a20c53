"""Every image size: the official SDXL buckets, long strips, odd latents."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from choice import some
from host_models import PACK, noise_like, sample, seg, shared_model, tiny_model
from host_oracle import deviation, deviation_of_node
from unit.oracles import blur_matrix

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
    # The tiny network halves once and SDXL twice, so half of SDXL's latent has SDXL's middle grid.
    size = tuple(n // 16 for n in LATENTS[name])
    model = middle_only()
    plain, guided = (
        sample(m, size=size, steps=1, cfg=1.0) for m in (model, seg(model, sigma=10.0))
    )
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


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0, 10.0])
def test_rows_and_columns_of_each_true_middle_grid_are_blurred(sigma):
    blur_queries = importlib.import_module(PACK + ".seg_core").blur_queries
    blur = functools.cache(lambda size: blur_matrix(size, sigma, "reference"))
    for name, size in LATENTS.items():
        height, width = (n // 32 for n in size)
        image = noise_like((1, 3, height, width)).double()
        query = image.flatten(2).transpose(1, 2)
        ours = blur_queries(query, (height, width), sigma).transpose(1, 2).reshape(image.shape)
        expected = blur(height) @ image @ blur(width).T
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12, msg=name)
