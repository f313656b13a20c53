"""The node itself: its formula, window, cost and widgets, and what it says when it cannot."""

from __future__ import annotations

import logging
import math

import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from host_models import (
    PACK,
    conditioning,
    core_node,
    counted_calls,
    noise_like,
    sample,
    seg,
    shared_model,
)
from host_oracle import deviation, deviation_of_node

SIZE = (6, 10)


def recorded(model, record):
    """Return a clone that hands every set of post-CFG arguments to `record`."""
    watched = model.clone()

    def watch(args):
        record.append(args)
        return args["denoised"]

    watched.set_model_sampler_post_cfg_function(watch)
    return watched


# Formula


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_result_is_denoised_plus_scale_times_cond_minus_smoothed(cfg):
    model, before, unit, scaled = shared_model(), [], [], []
    sample(recorded(seg(recorded(model, before), scale=1.0), unit), steps=1, cfg=cfg)
    sample(recorded(seg(model, scale=2.5), scaled), steps=1, cfg=cfg)
    denoised, cond = before[0]["denoised"], before[0]["cond_denoised"]
    smoothed = cond - (unit[0]["denoised"] - denoised)
    expected = denoised + 2.5 * (cond - smoothed)
    torch.testing.assert_close(scaled[0]["denoised"], expected, rtol=1e-5, atol=1e-5)
    if cfg == 1.0:
        assert torch.equal(denoised, cond)


def test_released_formula_is_what_plain_cfg_gives():
    model, before, guided = shared_model(), [], []
    sample(recorded(seg(recorded(model, before), scale=3.0), guided), steps=1, cfg=5.0)
    text, uncond = before[0]["cond_denoised"], before[0]["uncond_denoised"]
    torch.testing.assert_close(
        guided[0]["denoised"] - (text + 4.0 * (text - uncond)),
        guided[0]["denoised"] - before[0]["denoised"],
        rtol=1e-4,
        atol=1e-4,
    )


def test_guidance_is_linear_in_its_scale():
    model = shared_model()
    plain, one, five = (sample(m, steps=1) for m in (model, seg(model, 1.0), seg(model, 5.0)))
    assert deviation(plain + 5.0 * (one - plain), five) < 1e-5


def test_result_of_an_earlier_post_cfg_function_is_kept():
    halve = lambda m: post_cfg(m, lambda args: args["denoised"] * 0.5 + 0.1)  # noqa: E731
    assert deviation_of_node(shared_model(), sigma=1.3, before=halve) <= 1e-6


def test_later_post_cfg_function_sees_the_guided_result():
    halve = lambda m: post_cfg(m, lambda args: args["denoised"] * 0.5 + 0.1)  # noqa: E731
    assert deviation_of_node(shared_model(), sigma=1.3, after=halve) <= 1e-6


def post_cfg(model, function):
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(function)
    return patched


def test_rescaled_cfg_of_another_node_is_kept():
    def rescale(m):
        return core_node("comfy_extras.nodes_model_advanced", "RescaleCFG", m, 0.7)

    assert deviation_of_node(shared_model(), sigma=1.3, before=rescale) <= 1e-6
    assert deviation_of_node(shared_model(), sigma=1.3, after=rescale) <= 1e-6


def test_guidance_is_not_changed_by_what_a_pre_cfg_function_makes_of_the_predictions():
    def swap(m):
        m = m.clone()
        m.set_model_sampler_pre_cfg_function(lambda args: [p * 0.9 for p in args["conds_out"]])
        return m

    assert deviation_of_node(shared_model(), sigma=1.3, before=swap) <= 1e-6


# Cost


@pytest.mark.parametrize("reuse", [True, False])
def test_one_more_pass_of_one_cond_is_made_for_each_evaluation(reuse):
    model = seg(shared_model(), reuse=reuse)
    for cfg, expected in ((1.0, [1, 1] * 3), (7.0, [2, 1] * 3)):
        with counted_calls(model) as calls:
            sample(model, cfg=cfg, steps=3)
        assert calls == expected


@pytest.mark.parametrize("reuse", [True, False])
def test_batch_is_carried_by_the_extra_pass(reuse):
    model = seg(shared_model(), reuse=reuse)
    with counted_calls(model) as calls:
        sample(model, cfg=7.0, steps=2, batch=3)
    assert calls == [6, 3] * 2


OFF = {
    "scale 0": {"scale": 0.0},
    "sigma 0": {"sigma": 0.0},
    "sigma too narrow for one neighbour": {"sigma": 0.1},
    "window that covers no step": {"start": 0.501, "end": 0.502},
    "window after the run": {"start": 1.0, "end": 1.0},
}


@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("settings", OFF.values(), ids=OFF)
def test_guidance_that_is_off_costs_nothing_and_changes_no_bit_and_is_reported(
    settings, cfg, caplog
):
    model = shared_model()
    plain = sample(model, cfg=cfg, steps=3)
    with caplog.at_level(logging.WARNING):
        guided = seg(model, **settings)
        with counted_calls(model) as calls:
            result = sample(guided, cfg=cfg, steps=3)
    assert torch.equal(result, plain)
    assert calls == [1 if cfg == 1.0 else 2] * 3
    (record,) = [r for r in caplog.records if "Smoothed Energy Guidance" in r.getMessage()]
    assert "no effect" in record.getMessage()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"scale": 0.0}, "scale is 0"),
        ({"sigma": 0.0}, "blur_sigma is 0"),
        ({"sigma": 0.1}, "too narrow"),
        ({"sigma": 0.05, "kernel": "full"}, "too narrow"),
    ],
)
def test_warning_names_the_setting_that_is_without_effect(settings, reason, caplog):
    seg(shared_model(), **settings)
    assert reason in caplog.text


def test_effective_node_says_nothing_above_information(caplog):
    sample(seg(shared_model()), steps=2)
    ours = [r for r in caplog.records if r.name.startswith(PACK)]
    assert [r for r in ours if r.levelno >= logging.WARNING] == []


# Window


def test_steps_outside_the_window_are_plain_and_the_others_are_guided():
    model = shared_model()
    seen = []
    guided = recorded(seg(recorded(model, seen), start=0.3, end=0.6), seen)
    with counted_calls(model) as calls:
        sample(guided, cfg=1.0, steps=10)
    at = model.model.model_sampling.percent_to_sigma
    steps = list(zip(seen[::2], seen[1::2], strict=True))
    inside = [at(0.6) <= float(before["sigma"][0]) <= at(0.3) for before, _ in steps]
    assert 0 < sum(inside) < 10
    assert len(calls) == 10 + sum(inside)
    for (before, after), active in zip(steps, inside, strict=True):
        assert (after["denoised"] is before["denoised"]) != active


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.4), (0.4, 1.0), (0.2, 0.7)])
def test_window_holds_the_same_steps_as_a_conditioning_s_timestep_range(start, end):
    model = shared_model()
    ranged = core_node("nodes", "ConditioningSetTimestepRange", conditioning(1), start, end)
    active = []

    def watch(args):
        conds = args["cond"]
        active.append(comfy.samplers.get_area_and_mult(conds[0], args["input"], args["sigma"]))
        return args["denoised"]

    sample(post_cfg(model, watch), positive=ranged, steps=8, cfg=1.0)
    with counted_calls(model) as calls:
        sample(seg(model, start=start, end=end), steps=8, cfg=1.0)
    assert len(calls) - 8 == sum(p is not None for p in active)


# Branch


def test_free_branch_makes_no_extra_pass_and_differs_from_off():
    model = shared_model()
    with counted_calls(model) as calls:
        found = sample(seg(model, branch="free"), cfg=4.0, steps=3)
    assert calls == [2] * 3
    assert torch.isfinite(found).all()
    assert deviation(sample(model, cfg=4.0, steps=3), found) > 1e-3


@pytest.mark.parametrize("sigma", [math.inf, 1.3])
def test_free_branch_smooths_the_unconditional_prediction_alone(sigma):
    model, free, other = shared_model(), [], []
    sample(recorded(seg(model, sigma=sigma, branch="free"), free), steps=1, size=SIZE)
    unconditional = seg(recorded(model, other), scale=1.0, sigma=sigma, branch="unconditional")
    sample(recorded(unconditional, other), steps=1, size=SIZE)
    plain, guided = other
    smoothed = plain["uncond_denoised"] - (guided["denoised"] - plain["denoised"])
    torch.testing.assert_close(
        free[0]["cond_denoised"], plain["cond_denoised"], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(free[0]["uncond_denoised"], smoothed, rtol=1e-5, atol=1e-4)
    expected = smoothed + 7.0 * (plain["cond_denoised"] - smoothed)
    expected = expected + 3.0 * (plain["cond_denoised"] - smoothed)
    torch.testing.assert_close(free[0]["denoised"], expected, rtol=1e-5, atol=1e-3)


def test_free_branch_at_cfg_1_is_an_error_that_says_why():
    with pytest.raises(ValueError, match=r"free.*at cfg 1 there is none.*Raise cfg"):
        sample(seg(shared_model(), branch="free"), cfg=1.0)


def test_unconditional_branch_at_cfg_1_guides_the_only_prediction_and_says_so_once(caplog):
    model = shared_model()
    found = sample(seg(model, branch="unconditional"), cfg=1.0, steps=3)
    said = [r for r in caplog.records if "at cfg 1" in r.getMessage()]
    assert len(said) == 1
    assert torch.equal(found, sample(seg(model), cfg=1.0, steps=3))


def test_unconditional_branch_is_another_method_than_the_conditional_one():
    model = shared_model()
    ours, theirs = (sample(seg(model, branch=b)) for b in ("conditional", "unconditional"))
    assert deviation(ours, theirs) > 1e-3


# Rescale


MODES = ["full", "partial", "snf"]


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("mode", MODES)
def test_batch_mate_never_changes_an_image(mode, cfg):
    model = seg(shared_model(), rescale=0.7, rescale_mode=mode)
    first, mate, other = (noise_like((1, 4, *SIZE), seed) for seed in (1, 2, 3))
    latent = torch.zeros(2, 4, *SIZE)
    one, two = (
        sample(model, noise=torch.cat([first, n]), latent=latent, size=SIZE, cfg=cfg)
        for n in (mate, 4.0 * other)
    )
    assert deviation(one[:1], two[:1]) <= 1e-6
    assert deviation(one[1:], two[1:]) > 1e-2
    alone = sample(model, noise=first, latent=latent[:1], size=SIZE, cfg=cfg)
    assert deviation(alone, one[:1]) <= 1e-6


@pytest.mark.parametrize(("mode", "start"), [("full", "denoised"), ("partial", "cond_denoised")])
def test_rescale_pulls_the_spread_of_each_image_to_that_of_its_prediction(mode, start):
    model, seen = shared_model(), []
    sample(seg(recorded(model, seen)), steps=1, batch=2, size=SIZE)
    amount = 0.4
    guided = recorded(seg(model, rescale=amount, rescale_mode=mode), seen)
    sample(guided, steps=1, batch=2, size=SIZE)
    sample(recorded(seg(model), seen), steps=1, batch=2, size=SIZE)
    plain, rescaled, full = seen
    for i in range(2):
        push = full["denoised"][i] - plain["denoised"][i]
        wanted = plain["cond_denoised"][i].std(correction=0)
        found = (plain[start][i] + push).std(correction=0)
        expected = plain["denoised"][i] + push * (1 - amount + amount * wanted / found)
        torch.testing.assert_close(rescaled["denoised"][i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["full", "partial"])
def test_rescale_0_changes_no_bit(mode):
    model = shared_model()
    plain = sample(seg(model), size=SIZE)
    assert torch.equal(sample(seg(model, rescale=0.0, rescale_mode=mode), size=SIZE), plain)


# Blocks and models


@pytest.mark.parametrize("selector", ["auto", "AUTO", "auto, u0"])
def test_model_without_attention_in_its_middle_refuses_auto_and_lists_what_it_has(selector):
    with pytest.raises(ValueError, match=r"middle block of this model has no.*d0.*u0"):
        seg(shared_model("ssd1b"), blocks=selector)


def test_model_without_attention_in_its_middle_refuses_middle():
    with pytest.raises(ValueError, match="u0"):
        seg(shared_model("ssd1b"), blocks="m0")


@pytest.mark.parametrize(
    ("selector", "blocks"), [("u0", [("output", 0)]), ("d0.1", [("input", 3, 1)])]
)
def test_model_without_attention_in_its_middle_is_guided_in_named_blocks(selector, blocks):
    found = deviation_of_node(
        shared_model("ssd1b"), sigma=1.3, size=SIZE, node={"blocks": selector},
        dense={"blocks": blocks},
    )  # fmt: skip
    assert found <= 1e-6


@pytest.mark.parametrize("selector", ["d7", "m1", "u0.9", "double.3", "x", "d0-9", ",", "m0.0.0"])
def test_block_that_does_not_exist_is_an_error_that_lists_what_does(selector):
    with pytest.raises(ValueError, match=r"d0|u1|m0"):
        seg(shared_model(), blocks=selector)


def test_network_that_is_no_unet_is_refused_by_name():
    class Sequence(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

    class Exotic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diffusion_model = Sequence()

    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"Sequence.*Exotic|Exotic.*Sequence"):
        seg(comfy.model_patcher.ModelPatcher(Exotic(), load_device=cpu, offload_device=cpu))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"sigma": -1.0}, "sigma"),
        ({"sigma": math.nan}, "sigma"),
        ({"start": 0.6, "end": 0.4}, "start_percent must not be above end_percent"),
        ({"start": -0.1}, "start_percent"),
        ({"end": 1.1}, "end_percent"),
        ({"end": math.nan}, "end_percent"),
        ({"rescale": 1.5}, "rescale"),
        ({"rescale": math.nan}, "rescale"),
        ({"branch": "both"}, "branch"),
        ({"kernel": "box"}, "kernel"),
        ({"rescale_mode": "most"}, "rescale_mode"),
    ],
)
def test_bad_setting_is_an_error_that_names_it(settings, message):
    with pytest.raises(ValueError, match=message):
        seg(shared_model(), **settings)


def test_output_is_a_clone_even_without_effect():
    model = shared_model()
    for settings in ({}, {"scale": 0.0}):
        assert seg(model, **settings) is not model


def test_chained_nodes_add_up():
    model = shared_model()
    plain, one, two = (sample(m, steps=1) for m in (
        model, seg(model, 2.0), seg(model, 1.5, sigma=1.3, blocks="u0")))  # fmt: skip
    both = sample(seg(seg(model, 2.0), 1.5, sigma=1.3, blocks="u0"), steps=1)
    assert deviation(plain + (one - plain) + (two - plain), both) < 1e-6
