"""The node itself: its formula, window, cost and widgets, and what it says when it cannot."""

from __future__ import annotations

import logging
import math

import comfy.samplers
import pytest
import torch
from host_models import conditioning, counted_calls, noise_like, sample, seg, shared_model
from host_oracle import deviation, deviation_of_node
from neighbours import altered_before_cfg
from reuse_checks import warned
from stand_ins import noted, patched, shipped

SIZE = (6, 10)


# Formula


OTHERS = {
    "post-CFG": patched("sampler_post_cfg_function")(lambda args: args["denoised"] * 0.5 + 0.1),
    "pre-CFG": altered_before_cfg,
    "RescaleCFG": shipped("model_advanced", "RescaleCFG", 0.7),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("other", OTHERS)
def test_guidance_is_added_to_what_other_nodes_made_of_the_step(other, order):
    found = deviation_of_node(shared_model(), scale=2.5, sigma=1.3, **{order: OTHERS[other]})
    assert found <= 1e-6


# Cost


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(
    ("branch", "cfg", "batch", "calls"),
    [("conditional", 1.0, 1, [1, 1]), ("conditional", 7.0, 3, [6, 3]), ("free", 4.0, 1, [2])],
)
def test_an_evaluation_has_one_more_pass_of_one_cond_and_free_none(
    branch, cfg, batch, calls, reuse
):
    model = seg(shared_model(), branch=branch, reuse=reuse)
    with counted_calls(model) as made:
        sample(model, cfg=cfg, steps=3, batch=batch)
    assert made == calls * 3


OFF = {
    # what is off: widgets, what the message says
    "scale 0": ({"scale": 0.0}, "scale is 0"),
    "sigma 0": ({"sigma": 0.0}, "blur_sigma is 0"),
    "too narrow for one neighbour": ({"sigma": 0.1}, "too narrow"),
    "too narrow, full kernel": ({"sigma": 0.05, "kernel": "full"}, "too narrow"),
    "window that covers no step": ({"start": 0.501, "end": 0.502}, "window"),
    "window after the run": ({"start": 1.0, "end": 1.0}, "window"),
}


@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("off", OFF)
def test_guidance_that_is_off_costs_nothing_and_changes_no_bit_and_is_reported(off, cfg, caplog):
    model = shared_model()
    settings, reason = OFF[off]
    plain = sample(model, cfg=cfg, steps=3)
    with caplog.at_level(logging.WARNING):
        guided = seg(model, **settings)
        with counted_calls(model) as calls:
            result = sample(guided, cfg=cfg, steps=3)
    assert torch.equal(result, plain)
    assert calls == [1 if cfg == 1.0 else 2] * 3
    (said,) = [m for m in caplog.messages if "Smoothed Energy Guidance" in m]
    assert "no effect" in said
    assert reason in said


def test_effective_node_says_nothing_above_information(caplog):
    sample(seg(shared_model()), steps=2)
    assert warned(caplog) == []


# Window


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.4), (0.4, 1.0), (0.2, 0.7)])
def test_steps_in_the_window_are_those_of_a_conditioning_s_timestep_range(start, end):
    model, active, guided = shared_model(), [], []
    ranged = conditioning(1, start_percent=start, end_percent=end)

    @patched("sampler_post_cfg_function")
    def watch(args):
        cond = args["cond"][0]
        used = comfy.samplers.get_area_and_mult(cond, args["input"], args["sigma"])
        active.append(used is not None)
        return args["denoised"]

    sample(watch(model), positive=ranged, steps=10, cfg=1.0)
    watched = noted(seg(noted(model, guided), start=start, end=end), guided)
    with counted_calls(model) as calls:
        sample(watched, steps=10, cfg=1.0)
    steps = zip(guided[::2], guided[1::2], strict=True)
    assert [after["denoised"] is not before["denoised"] for before, after in steps] == active
    assert len(calls) == 10 + sum(active)
    assert 0 < sum(active) < 10


# Branch


def test_free_branch_at_cfg_1_is_an_error_that_says_why():
    with pytest.raises(ValueError, match=r"free.*at cfg 1 there is none.*Raise cfg"):
        sample(seg(shared_model(), branch="free"), cfg=1.0)


def test_unconditional_branch_at_cfg_1_guides_the_only_prediction_and_says_so_once(caplog):
    model = shared_model()
    found = sample(seg(model, branch="unconditional"), cfg=1.0, steps=3)
    said = [r for r in caplog.records if "at cfg 1" in r.getMessage()]
    assert len(said) == 1
    assert torch.equal(found, sample(seg(model), cfg=1.0, steps=3))


# Rescale


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("mode", ["full", "partial", "snf"])
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
    sample(seg(noted(model, seen)), steps=1, batch=2, size=SIZE)
    amount = 0.4
    guided = noted(seg(model, rescale=amount, rescale_mode=mode), seen)
    sample(guided, steps=1, batch=2, size=SIZE)
    sample(noted(seg(model), seen), steps=1, batch=2, size=SIZE)
    plain, rescaled, full = seen
    for i in range(2):
        push = full["denoised"][i] - plain["denoised"][i]
        wanted = plain["cond_denoised"][i].std(correction=0)
        found = (plain[start][i] + push).std(correction=0)
        expected = plain["denoised"][i] + push * (1 - amount + amount * wanted / found)
        torch.testing.assert_close(rescaled["denoised"][i], expected, rtol=1e-4, atol=1e-4)


# Blocks and models


@pytest.mark.parametrize("selector", ["auto", "AUTO", "auto, u0", "m0"])
def test_model_without_attention_in_its_middle_refuses_it_and_lists_what_it_has(selector):
    with pytest.raises(ValueError, match=r"d0.*u0"):
        seg(shared_model("ssd1b"), blocks=selector)


@pytest.mark.parametrize("selector", ["d7", "m1", "u0.9", "double.3", "x", "d0-9", ",", "m0.0.0"])
def test_block_that_does_not_exist_is_an_error_that_lists_what_does(selector):
    with pytest.raises(ValueError, match=r"d0|u1|m0"):
        seg(shared_model(), blocks=selector)


BAD = {
    "scale": [-1.0, math.nan, math.inf],
    "sigma": [-1.0, math.nan],
    "start": [-0.1, 1.1],
    "end": [1.1, math.nan],
    "rescale": [1.5, math.nan],
    "branch": ["both"],
    "kernel": ["box"],
    "rescale_mode": ["most"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_setting_is_an_error_that_names_it(name, value):
    with pytest.raises(ValueError, match=name):
        seg(shared_model(), **{name: value})


def test_a_window_that_ends_before_it_starts_is_an_error():
    with pytest.raises(ValueError, match="start_percent must not be above end_percent"):
        seg(shared_model(), start=0.6, end=0.4)
