"""What guidance costs in floating-point operations, counted exactly on the true networks.

On the meta device, through ComfyUI's own guider. Counted are matrix products, convolutions and
attention (torch's formula of its fused kernel: 4 * queries * keys * channels); nothing else is.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from host_models import PACK, conditioning, seg, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models, plot, variants
from benchmarks.counting import PeakBytes, count, count_flops
from benchmarks.step import GuidedStep, flash_attention, on_meta
from benchmarks.variants import CFG, FINITE, PAG, SEG_OFF, SEG_ON, Variant

pytestmark = pytest.mark.current_only


@functools.cache
def bench(name):
    node = importlib.import_module(PACK + ".nodes.seg").SEGuidance
    return variants.Bench(models.KINDS[name], torch.device("meta"), torch.float16, node)


@functools.cache
def cost(name, *variant, **changes):
    with on_meta():
        return count_flops(bench(name).step(Variant(*variant, **changes), models.KINDS[name].size))


def perturbed_pass(name, *settings):
    """Return the perturbed pass in units of one cond forward."""
    plain = cost(name, CFG, 1.0)
    return (cost(name, SEG_ON, 1.0, False, *settings) - plain) / plain


def test_sdxl_infinite_blur():
    assert 0.6 < perturbed_pass("sdxl") <= 0.68


def test_sdxl_finite_blur():
    assert perturbed_pass("sdxl") < perturbed_pass("sdxl", FINITE) <= 0.685


@pytest.mark.parametrize("sigma", [math.inf, FINITE])
def test_sd15(sigma):
    assert 0.6 < perturbed_pass("sd15", sigma) <= 0.69


def test_step_at_cfg_7():
    plain = cost("sdxl", CFG, 7.0)
    assert cost("sdxl", SEG_ON, 7.0) / plain <= 1.345


def test_step_at_cfg_1():
    plain = cost("sdxl", CFG, 1.0)
    assert cost("sdxl", SEG_ON, 1.0) / plain <= 1.69


def test_a_later_block_costs_less():
    costs = [cost("sd15", SEG_ON, 1.0, blocks=b) for b in ("early", "middle", "late")]
    assert costs == sorted(costs, reverse=True)


def test_a_whole_pass_is_what_the_others_cost():
    plain = cost("sd15", CFG, 1.0)
    assert cost("sd15", PAG, 1.0) / plain == pytest.approx(2.0, abs=0.01)
    assert cost("sd15", SEG_OFF, 1.0) / plain == pytest.approx(2.0, abs=0.01)


def test_the_perturbed_pass_costs_nothing_for_a_controlnet():
    name = "sd15"
    without = cost(name, SEG_ON, 1.0) - cost(name, CFG, 1.0)
    plain = cost(name, CFG, 1.0, control=True)
    assert plain > 1.3 * cost(name, CFG, 1.0)
    assert cost(name, SEG_ON, 1.0, control=True) - plain == without


@pytest.mark.parametrize(
    ("method", "cfg", "bar"),
    [
        (variants.SEG_AND_PAG, 7.0, 1.69),
        (variants.SEG_AND_PAG, 1.0, 2.37),
        (variants.OUR_PAG, 7.0, 1.35),
        (variants.OUR_PAG, 1.0, 1.69),
        (variants.OUR_SAG, 1.0, 2.01),
        (variants.OUR_SAG, 7.0, 1.51),
    ],
)
def test_the_relatives_and_pairs(method, cfg, bar):
    assert 1.3 < cost("sdxl", method, cfg) / cost("sdxl", CFG, cfg) <= bar


def test_cores_sag_makes_three_passes_at_cfg_1():
    assert cost("sdxl", variants.CORE_SAG, 1.0) > 2.9 * cost("sdxl", CFG, 1.0)


def test_memory_for_reuse_at_sdxl_size():
    size = models.KINDS["sdxl"].size
    with on_meta():
        steps = [bench("sdxl").step(Variant(method, 1.0), size) for method in (SEG_ON, CFG)]
        extra = count(steps[0]).peak_bytes - count(steps[1]).peak_bytes
    assert 40e6 < extra < 60e6


@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_outside_the_window_a_step_is_the_plain_step(cfg):
    def costs(model):
        step = GuidedStep(model, conditioning(1), conditioning(2), cfg, (2, 4, 8, 8))
        with torch.inference_mode(), PeakBytes() as memory, FlopCounterMode(display=False) as flops:
            step.run(step.evaluate)
        return flops.get_total_flops(), memory.peak

    base = tiny_model()
    costs(base)  # ComfyUI's first steps
    plain = costs(base)
    assert costs(seg(base, start=0.0, end=0.1)) == plain
    assert costs(seg(base, start=0.9, end=1.0)) == plain
    inside, _ = costs(seg(base))
    assert inside > plain[0]


# What is counted, and that it is counted right.


def test_attention_is_counted_by_its_formula():
    query, keys = (torch.empty(2, n, 4 * 16, device="meta") for n in (5, 77))
    with FlopCounterMode(display=False) as flops:
        assert flash_attention(query, keys, keys, 4).shape == query.shape
    assert flops.get_total_flops() == 4 * 2 * 4 * 16 * 5 * 77


def test_the_counter_agrees_with_a_count_by_hand():
    linear = torch.nn.Linear(30, 20, device="meta")
    conv = torch.nn.Conv2d(4, 6, 3, padding=1, device="meta")
    with FlopCounterMode(display=False) as flops:
        linear(torch.empty(7, 30, device="meta"))
        conv(torch.empty(2, 4, 8, 8, device="meta"))
    assert flops.get_total_flops() == 2 * 7 * 30 * 20 + 2 * 2 * 64 * 6 * 4 * 9


def test_peak_memory_counts_what_lives_at_once():
    with PeakBytes() as memory:
        first = torch.zeros(100, device="meta") + 1
        second = first[:50] * 2
        del first, second
        torch.zeros(10, device="meta")
    assert memory.peak == 4 * (100 + 100)


def test_the_plot_has_room_for_rows_that_were_only_counted(tmp_path):
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu.json"
    result = json.loads(results.read_text(encoding="utf-8"))
    counted = {row["method"] for row in result["counted"]["sdxl"]}
    assert {row["method"] for row in result["measured"]} < counted
    plot.draw(result, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000
