"""What guidance costs in floating-point operations, counted exactly on the true networks.

On the meta device, through ComfyUI's own guider. Counted are matrix products, convolutions and
attention (torch's formula of its fused kernel: 4 * queries * keys * channels); nothing else is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
from pathlib import Path

import dit_models
import pytest
import torch
from family_oracle import guide
from host_models import PACK, conditioning, seg, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models, plot, variants
from benchmarks.counting import ParametersRead, PeakBytes, count
from benchmarks.step import GuidedStep, flash_attention, on_meta
from benchmarks.variants import CFG, FINITE, PAG, SEG_OFF, SEG_ON, Variant

pytestmark = pytest.mark.current_only


@functools.cache
def bench(name):
    node = importlib.import_module(PACK + ".nodes.seg").SEGuidance
    return variants.Bench(models.KINDS[name], torch.device("meta"), torch.float16, node)


@functools.cache
def counted(name, *variant, **changes):
    with on_meta():
        return count(bench(name).step(Variant(*variant, **changes), models.KINDS[name].size))


def cost(name, *variant, **changes):
    return counted(name, *variant, **changes).flops


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
        (variants.OUR_SLG, 1.0, 1.69),
        (variants.OUR_TPG, 1.0, 1.95),
        (variants.OUR_SAG, 1.0, 2.01),
        (variants.OUR_SAG, 7.0, 1.51),
    ],
)
def test_the_relatives_and_pairs(method, cfg, bar):
    assert 1.3 < cost("sdxl", method, cfg) / cost("sdxl", CFG, cfg) <= bar


def test_cores_sag_makes_three_passes_at_cfg_1():
    assert cost("sdxl", variants.CORE_SAG, 1.0) > 2.9 * cost("sdxl", CFG, 1.0)


ONE_CALL = (
    SEG_ON,
    variants.OUR_PAG,
    variants.OUR_TPG,
    variants.OUR_SLG,
    variants.SEG_AND_PAG,
    variants.SEG_AND_SLG,
)
# What a step may read of a network, in units of what the same step without guidance reads.
ONCE = 1.02


def reads(name, method, cfg, **changes):
    plain = counted(name, CFG, cfg, **changes).parameters_read
    return counted(name, method, cfg, **changes).parameters_read / plain


@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("method", ONE_CALL)
@pytest.mark.parametrize("name", models.KINDS)
def test_a_guided_step_reads_each_weight_once(name, method, cfg):
    assert 1.0 <= reads(name, method, cfg) <= ONCE


@pytest.mark.parametrize("blocks", ["early", "late"])
def test_wherever_the_first_perturbed_block_is(blocks):
    assert 1.0 <= reads("sd15", SEG_ON, 7.0, blocks=blocks) <= ONCE


@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_beside_a_controlnet(cfg):
    assert 1.0 <= reads("sd15", SEG_ON, cfg, control=True) <= ONCE


@pytest.mark.parametrize("method", [PAG, SEG_OFF])
def test_a_whole_pass_reads_each_weight_again(method):
    assert reads("sd15", method, 7.0) == pytest.approx(2.0, abs=0.01)


def read_by_a_run(model, kind, cfg):
    shape = dit_models.latent_shape(kind)
    dit_models.sample_dit(model, kind, shape, steps=1, cfg=cfg)  # ComfyUI's first steps
    with ParametersRead([model.model]) as counter:
        dit_models.sample_dit(model, kind, shape, steps=1, cfg=cfg)
    return counter.read


@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("kind", dit_models.TINY)
def test_a_guided_step_of_a_transformer_reads_each_weight_once(kind, cfg):
    pag = importlib.import_module(PACK + ".nodes.pag").SEGuidancePAG
    base = dit_models.tiny_dit(kind)
    plain = read_by_a_run(base, kind, cfg)
    assert read_by_a_run(seg(base, reuse=False), kind, cfg) > 1.6 * plain
    guided = seg(base)
    both = pag.execute(guided, 3.0, 0.0, 1.0)[0]
    assert plain <= read_by_a_run(guided, kind, cfg) <= ONCE * plain
    assert plain <= read_by_a_run(both, kind, cfg) <= ONCE * plain


@pytest.mark.parametrize("method", ["TPG", "SLG", "all"])
@pytest.mark.parametrize("kind", dit_models.TINY)
def test_so_does_the_rest_of_the_family(kind, method):
    base = dit_models.tiny_dit(kind)
    plain = read_by_a_run(base, kind, 7.0)
    model = base
    for one in ("SEG", "PAG", "TPG", "SLG") if method == "all" else (method,):
        model = guide(one, model, 3.0)
    assert plain <= read_by_a_run(model, kind, 7.0) <= ONCE * plain


def test_a_block_that_is_passed_over_is_not_computed_for_those_rows():
    plain = cost("sdxl", CFG, 1.0)
    skipped, smoothed = cost("sdxl", variants.OUR_SLG, 1.0), cost("sdxl", SEG_ON, 1.0)
    assert 0.02 * plain < smoothed - skipped < 0.1 * plain


@pytest.mark.parametrize(("cfg", "rows"), [(1.0, 1), (7.0, 2)])
def test_memory_at_sdxl_size_is_that_of_a_batch_with_the_joined_rows(cfg, rows):
    plain = counted("sdxl", CFG, cfg).peak_bytes
    extra = counted("sdxl", SEG_ON, cfg).peak_bytes - plain
    assert 100e6 < extra <= 1.15 * plain / rows


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


def test_the_parameters_read_agree_with_a_count_by_hand():
    linear = torch.nn.Linear(30, 20, device="meta")
    conv = torch.nn.Conv2d(4, 6, 3, device="meta")
    norm = torch.nn.GroupNorm(2, 4, device="meta")
    other = torch.nn.Linear(30, 5, device="meta")
    tokens, image = torch.empty(7, 30, device="meta"), torch.empty(2, 4, 8, 8, device="meta")
    one_linear, one_conv, one_norm = 30 * 20 + 20, 6 * 4 * 9 + 6, 4 + 4
    for flops_too in (False, True):
        inner = FlopCounterMode(display=False) if flops_too else contextlib.nullcontext()
        with torch.inference_mode(), ParametersRead([linear, conv, norm]) as counter, inner:
            linear(tokens)
            conv(norm(image))
            assert counter.read == one_linear + one_conv + one_norm
            linear(tokens[:3])
            assert counter.read == 2 * one_linear + one_conv + one_norm, "read once more"
            other(tokens)
            linear.weight.t()[:4].view(4, 20).detach().to("meta")
            assert counter.read == 2 * one_linear + one_conv + one_norm, "views, others' weights"
            tokens @ linear.weight[:5].t()
            assert counter.read == 2 * one_linear + one_conv + one_norm + 5 * 30, "a part"
            cast = linear.weight.half()
            cast * cast
            tokens * linear.bias[:1].expand(7, 30)
        assert counter.read == 3 * one_linear + one_conv + one_norm + 5 * 30


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
