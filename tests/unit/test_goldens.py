"""Parity with tensors from the official code, SusungHong/SEG-SDXL at cf8256d."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from seg_core.attention import smoothed_attention
from seg_core.blur import blur_queries
from seg_core.guidance import apply_guidance, blend

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "official_seg.npz"
INFINITE = 1e7
BOUND = 1e-6  # the official kernel is built in float32


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def near(actual, expected, bound=BOUND):
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


@pytest.fixture(params=[f"{n:02d}" for n in range(8)])
def case(request, goldens):
    name = request.param
    size, heads, _, sigma = goldens[f"{name}_meta"].tolist()
    keys = ("query", "key", "value", "blurred_query", "output")
    tensors = [goldens[f"{name}_{key}"] for key in keys]
    grid = (int(size), int(size))
    return grid, int(heads), math.inf if sigma == INFINITE else sigma, tensors


def test_blurred_queries_are_the_official_ones(case):
    grid, _, sigma, (query, _, _, blurred, _) = case
    near(blur_queries(query, grid, sigma), blurred)


def test_attention_outputs_are_the_official_ones(case):
    grid, heads, sigma, (query, key, value, _, output) = case
    near(smoothed_attention(query, key, value, grid, sigma, heads=heads), output)


def test_the_pins_notice_the_other_kernel_and_another_sigma(case):
    grid, _, sigma, (query, _, _, blurred, _) = case
    with pytest.raises(AssertionError):
        near(blur_queries(query, grid, 1.01 if math.isinf(sigma) else sigma * 0.8), blurred)
    if math.isfinite(sigma):
        with pytest.raises(AssertionError):
            near(blur_queries(query, grid, sigma, kernel="full"), blurred)


def test_guided_results_are_the_official_ones(goldens):
    uncond, cond, perturbed = (goldens[f"cfg_{n}"] for n in ("uncond", "cond", "perturbed"))
    guidance_scale, seg_scale = goldens["cfg_meta"].tolist()
    denoised = uncond + guidance_scale * (cond - uncond)
    size = float(goldens["cfg_result"].abs().max())
    near(blend(denoised, cond, perturbed, seg_scale), goldens["cfg_result"], BOUND * size)
    near(apply_guidance(denoised, cond, perturbed, seg_scale), goldens["cfg_result"], BOUND * size)
    near(blend(cond, cond, perturbed, seg_scale), goldens["nocfg_result"], BOUND * size)
    with pytest.raises(AssertionError):
        near(blend(denoised, uncond, perturbed, seg_scale), goldens["cfg_result"], BOUND * size)
