"""The node against explicit attention maps blurred token by token, in the real sampler."""

from __future__ import annotations

import math

import pytest
import torch
from host_models import sample, seg, shared_model
from host_oracle import blur_map, dense_seg, deviation, deviation_of_node

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


@pytest.mark.parametrize(("sigma", "kernel"), BLURS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_node_is_the_dense_reference_on_every_grid(size, sigma, kernel):
    assert (
        deviation_of_node(
            shared_model("sd15"), sigma=sigma, kernel=kernel, size=size, batch=2, steps=1
        )
        <= LARGEST
    )


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize(("sigma", "kernel"), [(math.inf, "reference"), (1.3, "full")])
def test_node_is_the_dense_reference_over_several_steps(sigma, kernel, cfg, reuse):
    found = deviation_of_node(
        shared_model("sdxl"), sigma=sigma, kernel=kernel, size=(10, 6), batch=2, steps=3, cfg=cfg,
        node={"reuse": reuse},
    )  # fmt: skip
    assert found <= LARGEST


BLOCKS = {
    # selector: (blocks as ComfyUI counts them, level of each in the tiny SDXL)
    "middle": ([("middle", 0)], 1),
    "m0": ([("middle", 0)], 1),
    "m0.1": ([("middle", 0, 1)], 1),
    "input": ([("input", 3)], 1),
    "d0.0": ([("input", 3, 0)], 1),
    "u0": ([("output", 0)], 1),
    "u0.1, u1": ([("output", 0, 1), ("output", 1)], 1),
    "output": ([("output", 0), ("output", 1)], 1),
    "middle,u1.0": ([("middle", 0), ("output", 1, 0)], 1),
}


@pytest.mark.parametrize("sigma", [math.inf, 1.3])
@pytest.mark.parametrize("selector", BLOCKS)
def test_selected_blocks_are_those_that_the_dense_reference_smooths(selector, sigma):
    blocks, level = BLOCKS[selector]
    found = deviation_of_node(
        shared_model("sdxl"), sigma=sigma, size=(6, 10), steps=1,
        node={"blocks": selector}, dense={"blocks": blocks, "level": level},
    )  # fmt: skip
    assert found <= LARGEST


def test_blocks_of_the_finest_level_are_smoothed_on_the_latent_s_own_grid():
    found = deviation_of_node(
        shared_model("sd15"), sigma=1.3, size=(5, 7), steps=1,
        node={"blocks": "d0"}, dense={"blocks": [("input", 1)], "level": 0},
    )  # fmt: skip
    assert found <= LARGEST


def test_unconditional_branch_is_the_dense_reference_on_the_negative_prompt():
    found = deviation_of_node(
        shared_model("sdxl"), sigma=1.3, size=(6, 10),
        node={"branch": "unconditional"}, dense={"side": "uncond"},
    )  # fmt: skip
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
    "height and width exchanged": {"plant": "transposed"},
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


@pytest.mark.parametrize("kernel", ["reference", "full"])
@pytest.mark.parametrize("grid", [(4, 4), (1, 5), (2, 7), (3, 2)])
def test_rows_of_the_oracle_s_map_sum_to_one(grid, kernel):
    blur = blur_map(*grid, 1.3, kernel)
    torch.testing.assert_close(blur.sum(1), torch.ones(len(blur), dtype=torch.float64))
