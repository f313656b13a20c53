"""The node against explicit attention maps blurred token by token, in the real sampler."""

from __future__ import annotations

import math

import pytest
import torch
from choice import each, pairs
from host_models import sample, seg, shared_model
from host_oracle import dense_seg, deviation, deviation_of_node
from reuse_checks import require_reference

LARGEST = 1e-6

SIZES = {
    "square": (8, 8),
    "portrait 2:1": (16, 8),
    "landscape 1:2": (8, 16),
    "portrait 3:1": (18, 6),
    "landscape 1:3": (6, 18),
    "portrait 9:1": (36, 4),
    "landscape 1:9": (4, 36),
    "odd": (7, 11),
    "odd and even": (13, 6),
    "prime": (5, 17),
}
BLURS = [
    (math.inf, "reference"),
    (1.3, "reference"),
    (10.0, "reference"),
    (0.9, "full"),
]


@pytest.mark.parametrize(*each(size=SIZES, blur=BLURS))
def test_node_is_the_dense_reference_on_every_grid(size, blur):
    sigma, kernel = blur
    require_reference(
        shared_model("sd15"), sigma=sigma, kernel=kernel, size=SIZES[size], batch=2, steps=1
    )


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
