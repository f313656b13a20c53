"""The node against explicit attention maps blurred token by token, in the real sampler."""

from __future__ import annotations

import functools
import itertools
import math

import comfy.model_base
import pytest
import torch
from choice import each, pairs, some
from host_models import sample, seg, shared_model, tiny_model
from host_oracle import dense_seg, deviation, deviation_of_node
from reuse_checks import require_reference

LARGEST = 1e-6


# Sizes

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
def middle_only():
    """A network with attention in its middle block alone, halving the latent once."""
    return tiny_model(
        "sdxl", transformer_depth=[0, 0], transformer_depth_output=[0] * 4,
        transformer_depth_middle=1, dtype=torch.float64,
    )  # fmt: skip


# The tiny network halves once and SDXL twice, so half of SDXL's latent has SDXL's middle grid.
LATENTS = {
    **{name_of(size): tuple(n // 16 for n in size) for size in (*BUCKETS, *STRIPS)},
    **{name_of(size): size for size in ODD},
}
BLURS = [(math.inf, "reference"), (1.3, "reference"), (10.0, "reference"), (0.9, "full")]
BLUR_OF = dict(zip(LATENTS, itertools.cycle(BLURS)))
SOME = ("2048x512", "576x1728", "640x1536", "256x2304", "2304x256")  # with each blur


@pytest.mark.parametrize("name", some(LATENTS, *SOME, *map(name_of, ODD)))
def test_node_is_the_dense_reference_at_every_size(name):
    sigma, kernel = BLUR_OF[name]
    require_reference(
        middle_only(), sigma=sigma, kernel=kernel, size=LATENTS[name], steps=1, cfg=1.0,
        scale=30.0, visible=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("latent", [(1, 2), (2, 1)])
def test_one_token_has_nothing_to_blur(latent):
    model = shared_model("sd15")
    # Of two images: PyTorch refuses to normalise one value.
    found = sample(seg(model, sigma=1.3), size=latent, steps=1, batch=2)
    assert torch.allclose(found, sample(model, size=latent, steps=1, batch=2), rtol=1e-6)


# Steps, blocks, branches, precision


@pytest.mark.parametrize(
    *pairs(blur=[BLURS[0], (1.3, "full")], cfg=[1.0, 7.0], reuse=[True, False])
)
def test_node_is_the_dense_reference_over_several_steps(blur, cfg, reuse):
    sigma, kernel = blur
    require_reference(
        sigma=sigma, kernel=kernel, size=(10, 6), batch=2, steps=3, cfg=cfg, reuse=reuse
    )


BLOCKS = {
    # model and selector: blocks as ComfyUI counts them, how often the latent was halved there
    "sdxl: middle": ([("middle", 0)], 1),
    "sdxl: m0": ([("middle", 0)], 1),
    "sdxl: m0.1": ([("middle", 0, 1)], 1),
    "sdxl: input": ([("input", 3)], 1),
    "sdxl: d0.0": ([("input", 3, 0)], 1),
    "sdxl: u0": ([("output", 0)], 1),
    "sdxl: u0.1, u1": ([("output", 0, 1), ("output", 1)], 1),
    "sdxl: output": ([("output", 0), ("output", 1)], 1),
    "sdxl: middle,u1.0": ([("middle", 0), ("output", 1, 0)], 1),
    "ssd1b: u0": ([("output", 0)], 1),
    "ssd1b: d0.1": ([("input", 3, 1)], 1),
    "sd15: d0": ([("input", 1)], 0),
    "sd15: d1": ([("input", 3)], 1),
    "sd15: middle": ([("middle", 0)], 1),
    "sd15: u0": ([("output", 0)], 1),
    "sd15: u1": ([("output", 1)], 1),
    "sd15: u3": ([("output", 3)], 0),
    "sd15: d0,u3": ([("input", 1), ("output", 3)], 0),
    "sd15: d1,m0": ([("input", 3), ("middle", 0)], 1),
}


@pytest.mark.parametrize(*each(name=BLOCKS, sigma=[math.inf, 1.3], cfg=[7.0, 1.0]))
def test_selected_blocks_are_those_that_the_dense_reference_smooths(name, sigma, cfg):
    kind, selector = name.split(": ")
    blocks, level = BLOCKS[name]
    require_reference(
        shared_model(kind), sigma=sigma, cfg=cfg, size=(5, 7), steps=1,
        node={"blocks": selector}, dense={"blocks": blocks, "level": level},
    )  # fmt: skip


@pytest.mark.parametrize("sigma", [math.inf, 1.3])
@pytest.mark.parametrize(("branch", "side"), [("unconditional", "uncond"), ("free", "free")])
def test_other_branches_are_those_of_the_dense_reference(branch, side, sigma):
    found = deviation_of_node(
        shared_model(), sigma=sigma, size=(6, 10), node={"branch": branch}, dense={"side": side}
    )
    assert found <= LARGEST


@pytest.mark.parametrize("sigma", [math.inf, 1.3])
def test_single_precision_stays_close_to_the_dense_reference(sigma):
    found = deviation_of_node(
        shared_model("sdxl", torch.float32), sigma=sigma, size=(10, 6), batch=2
    )
    assert found <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_is_near_the_dense_reference_of_double_precision(dtype):
    options = {"size": (10, 6), "steps": 1, "cfg": 2.0}
    half = sample(seg(shared_model("sd15", dtype), sigma=1.3), **options)
    double = sample(dense_seg(shared_model("sd15"), sigma=1.3, size=(10, 6)), **options)
    assert deviation(half, double) < (0.3 if dtype is torch.bfloat16 else 0.05)


# Samplers and kinds of prediction

EXACT = ["euler", "heun", "dpmpp_2m", "euler_cfg_pp"]
WITH_NOISE_OR_MEMORY = [
    "dpmpp_sde", "lcm", "uni_pc", "euler_ancestral", "dpmpp_2m_sde", "res_multistep",
]  # fmt: skip
KINDS = {
    "eps": comfy.model_base.ModelType.EPS,
    "v-prediction": comfy.model_base.ModelType.V_PREDICTION,
    "flow": comfy.model_base.ModelType.FLOW,
    "edm": comfy.model_base.ModelType.EDM,
}


@pytest.mark.floor
@pytest.mark.parametrize(*each(kind=KINDS, sampler=EXACT, cfg=[2.0, 1.0], blocks=["middle", "d0"]))
def test_every_kind_of_prediction_gives_what_the_dense_reference_gives(kind, sampler, cfg, blocks):
    dense = {"blocks": [("input", 1)], "level": 0} if blocks == "d0" else {}
    model = shared_model("sd15", model_type=KINDS[kind])
    require_reference(
        model, size=(8, 6), sampler=sampler, scheduler="simple", cfg=cfg,
        node={"blocks": blocks}, dense=dense,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Should have t[ab]")  # torchsde compares rounded floats
@pytest.mark.parametrize("sampler", WITH_NOISE_OR_MEMORY)
def test_sampler_with_noise_or_memory_follows_the_dense_reference_and_repeats_itself(sampler):
    model, run = shared_model("sd15"), {"sampler": sampler, "steps": 3, "size": (6, 8), "cfg": 1.5}
    found = sample(seg(model, sigma=1.3), **run)
    assert torch.equal(found, sample(seg(model, sigma=1.3), **run))
    reference = sample(dense_seg(model, sigma=1.3, size=(6, 8)), **run)
    assert deviation(found, reference) <= 1e-4 < deviation(sample(model, **run), reference)


# What the comparison notices

ERRORS = {
    "height and width exchanged": {"size": (12, 8)},
    "scale a thousandth off": {"scale": 3.003},
    "width a thousandth off": {"sigma": 1.2987},
    "other kernel": {"kernel": "full"},
    "other level": {"level": 0, "blocks": [("input", 1)]},
    "other branch": {"side": "uncond"},
    "one block too many": {"blocks": [("middle", 0), ("output", 0)]},
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_the_comparison_notices_a_planted_error(error):
    model, size = shared_model("sd15"), (8, 12)
    right = {"scale": 3.0, "sigma": 1.3, "kernel": "reference", "size": size}
    ours = sample(seg(model, sigma=1.3), size=size, steps=1)
    assert deviation(ours, sample(dense_seg(model, **right), size=size, steps=1)) <= LARGEST
    wrong = sample(dense_seg(model, **(right | error)), size=size, steps=1)
    assert deviation(ours, wrong) > 20 * LARGEST
