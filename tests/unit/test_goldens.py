"""Parity with tensors from the official code, SusungHong/SEG-SDXL at cf8256d."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from seg_core.attention import smoothed_attention
from seg_core.blur import blur_queries
from seg_core.guidance import blend

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "official_seg.npz"
INFINITE = 1e7
BOUND = 1e-6  # the official kernel is built in float32


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def near(actual, expected, bound=BOUND):
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("case", [f"{n:02d}" for n in range(8)])
def test_blurred_queries_and_attention_outputs_are_the_official_ones(goldens, case):
    size, heads, _, sigma = goldens[f"{case}_meta"].tolist()
    query, key, value = (goldens[f"{case}_{name}"] for name in ("query", "key", "value"))
    grid = (int(size), int(size))
    sigma = math.inf if sigma == INFINITE else sigma
    near(blur_queries(query, grid, sigma), goldens[f"{case}_blurred_query"])
    output = smoothed_attention(query, key, value, grid, sigma, heads=int(heads))
    near(output, goldens[f"{case}_output"])


def test_guided_results_are_the_official_ones(goldens):
    uncond, cond, perturbed = (goldens[f"cfg_{n}"] for n in ("uncond", "cond", "perturbed"))
    guidance_scale, seg_scale = goldens["cfg_meta"].tolist()
    denoised = uncond + guidance_scale * (cond - uncond)
    size = float(goldens["cfg_result"].abs().max())
    near(blend(denoised, cond, perturbed, seg_scale), goldens["cfg_result"], BOUND * size)
    near(blend(cond, cond, perturbed, seg_scale), goldens["nocfg_result"], BOUND * size)
