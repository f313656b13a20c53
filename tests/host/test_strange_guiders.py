"""Guiders and evaluations of other packs: guided exactly, and nothing of ours stays with them."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from choice import each
from comfy.samplers import KSAMPLER, CFGGuider
from dit_models import tiny_dit
from family_oracle import guide
from host_models import sample, seg, shared_model, tiny_model
from host_oracle import deviation
from neighbours import calls_twice
from no_op import (
    ACTS,
    NOTHING,
    STEPS,
    fingerprint,
    network_runs,
    network_state,
    nothing,
    refused_or_latents,
)
from reuse_checks import reported, warned
from strange_guiders import (
    AltersByItself,
    BlendsTwoModels,
    ByHand,
    CopiesTheOptions,
    EvaluatesElsewhere,
    HandsInTheModelsOptions,
    HandsOnFunctionsAlone,
    HandsOnZeros,
    RunsFunctionsTwice,
    RunsNoWrappers,
    ShowsItsResult,
    SkipsByItself,
    in_place,
    older_evaluation,
    sampled_by,
)

GUIDERS = {
    guider.__name__: (guider, lambda model: model)
    for guider in (
        ByHand, ShowsItsResult, AltersByItself, EvaluatesElsewhere, BlendsTwoModels, SkipsByItself,
        RunsFunctionsTwice, HandsInTheModelsOptions, HandsOnFunctionsAlone, CopiesTheOptions,
    )
} | {
    "calls_twice": (CFGGuider, calls_twice),
    "in_place": (CFGGuider, in_place),
    "older_evaluation": (CFGGuider, older_evaluation),
}  # fmt: skip


@functools.cache
def alone(name, cfg=4.0):
    """Return the latents of a guider, or beside an evaluation, without guidance."""
    guider, around = GUIDERS[name]
    return sampled_by(guider, around(shared_model()), cfg=cfg)


@pytest.mark.parametrize(
    *each(lambda cfg, reuse, **_: cfg > 1 or reuse,
          lambda name, cfg, reuse: cfg > 1 and reuse,
          cfg=(4.0, 1.0), reuse=(True, False), name=GUIDERS)
)  # fmt: skip
def test_a_guider_of_another_pack_is_pushed_nowhere_by_nothing(name, cfg, reuse):
    guider, around = GUIDERS[name]
    run = functools.partial(sampled_by, guider, cfg=cfg)
    still = nothing(shared_model(), reuse)
    if cfg > 1:
        still = nothing(still, reuse, branch="unconditional")
    assert deviation(run(around(still)), alone(name, cfg)) <= NOTHING
    found = run(around(seg(shared_model(), reuse=reuse)))
    assert deviation(found, alone(name, cfg)) > ACTS
    whole = run(around(seg(shared_model(), reuse=not reuse)))
    assert deviation(found, whole) <= NOTHING


@pytest.mark.parametrize(
    ("method", "widgets"), [("SEG", {}), ("TPG", {}), ("SLG", {"blocks": "random"})]
)
def test_a_guider_that_runs_no_wrappers_of_the_host_is_guided_too(method, widgets):
    """What is drawn anew in each step is drawn as under other guiders."""
    guided = guide(method, shared_model(), **widgets)
    found, expected = (sampled_by(one, guided, steps=4) for one in (RunsNoWrappers, CFGGuider))
    assert deviation(found, expected) <= NOTHING


@pytest.mark.parametrize(
    "guider", [ShowsItsResult, ByHand, AltersByItself, EvaluatesElsewhere, BlendsTwoModels]
)
def test_the_blur_of_sag_starts_from_what_was_evaluated(guider):
    """The narrowest blur that the node takes for one pushes nothing."""
    still = guide("SAG", shared_model(), 0.1, blur_sigma=0.164, mask="everywhere")
    assert deviation(sampled_by(guider, still), alone(guider.__name__)) <= NOTHING


def test_the_blurred_latent_of_sag_is_made_of_the_latent_of_the_step():
    blurred = guide("SAG", shared_model(), 0.5, blur_sigma=2.0)
    found, expected = (sampled_by(guider, blurred) for guider in (ShowsItsResult, ByHand))
    assert deviation(found, expected) <= NOTHING
    assert deviation(found, alone("ByHand")) > ACTS


# Cfg 1, where a guider hands on a number or zeros for what it has not evaluated.


@pytest.mark.parametrize(
    *each(mode=("full", "partial", "snf"), guider=[ByHand, SkipsByItself, HandsOnZeros])
)
def test_an_uncond_that_was_not_evaluated_is_no_uncond(guider, mode):
    model = seg(shared_model(), rescale=0.7, rescale_mode=mode)
    found = sampled_by(guider, model, cfg=1.0)
    assert torch.isfinite(found).all()
    assert deviation(found, alone("ByHand", 1.0)) > ACTS
    if guider is ByHand:
        assert deviation(found, sampled_by(CFGGuider, model, cfg=1.0)) <= NOTHING


@pytest.mark.parametrize(*each(guider=[ByHand, HandsOnZeros], side=["unconditional", "free"]))
def test_a_branch_that_needs_an_uncond_says_that_there_is_none(guider, side, caplog):
    found = sampled_by(guider, seg(shared_model(), branch=side), cfg=1.0)
    assert torch.equal(found, alone("ByHand", 1.0))
    (message,) = warned(caplog)
    assert "uncond" in message


# A skipped prediction of the guider's own.


JOINED = {
    "one branch": (lambda: seg(shared_model()), {"cfg": 4.0}, 3),
    "cfg 1": (lambda: seg(shared_model()), {"cfg": 1.0}, 2),
    "two branches": (lambda: guide("PAG", seg(shared_model()), 2.0), {}, 4),
    "a changed block that it skips": (
        lambda: seg(tiny_dit("flux", guidance_embed=False), blocks="double.1"),
        {"kind": "flux"},
        3,
    ),
}


@pytest.mark.parametrize(("make", "settings", "joined"), JOINED.values(), ids=JOINED)
def test_no_rows_join_a_guider_s_own_skipped_prediction(make, settings, joined, caplog):
    caplog.set_level("INFO")
    with network_runs(settings.get("kind", "sdxl")) as rows:
        sampled_by(SkipsByItself, make(), **settings)
    assert rows == [joined, 1] * STEPS
    assert warned(caplog) == []
    assert "cache" not in caplog.text


# Evaluations that tell the network no uuids.


@pytest.mark.parametrize(
    ("method", "cfg"), [("SEG", 7.0), ("SEG", 1.0), ("PAG", 7.0), ("PAG", 1.0), ("SLG", 7.0)]
)
def test_an_older_evaluation_is_guided_by_whole_passes(method, cfg):
    run = functools.partial(sampled_by, CFGGuider, cfg=cfg)
    whole = guide(method, shared_model(), 3.0, reuse=False)
    before = guide(method, older_evaluation(shared_model()), 3.0)
    expected = run(whole)
    assert deviation(run(before), expected) <= NOTHING
    assert deviation(run(older_evaluation(whole)), expected) <= NOTHING
    assert deviation(expected, alone("older_evaluation", cfg)) > ACTS


@pytest.mark.parametrize("guided", [
    lambda model: guide("SAG", model, 0.5),
    lambda model: guide("SAG", model, 0.5, mask="everywhere"),
    lambda model: seg(model, branch="free"),
], ids=["SAG", "SAG everywhere", "free"])  # fmt: skip
def test_what_needs_the_plain_calls_of_an_older_evaluation_acts_or_says_why_not(guided, caplog):
    run = functools.partial(sampled_by, CFGGuider, cfg=7.0)
    found = refused_or_latents(run, older_evaluation(guided(shared_model())))
    if warned(caplog):
        assert torch.equal(found, alone("older_evaluation", 7.0))
    elif found is not None:
        assert deviation(found, run(guided(shared_model()))) <= NOTHING


def euler(buffered):
    """Return Euler's method; with `buffered`, each noise level is written into one tensor."""

    def step(model, x, sigmas, extra_args=None, **_):
        levels = x.new_ones([len(x)])
        for sigma, following in itertools.pairwise(sigmas):
            levels = levels.fill_(float(sigma)) if buffered else x.new_full([len(x)], float(sigma))
            x = x + (x - model(x, levels, **extra_args)) * (following / sigma - 1)
        return x

    return KSAMPLER(step)


@pytest.mark.parametrize("window", [{"end": 0.4}, {"start": 0.4}], ids=str)
def test_a_sampler_may_write_each_noise_level_into_one_tensor(window):
    latents = []
    for buffered in (True, False):
        with reported() as counts:
            model = seg(shared_model(), **window)
            latents.append(sampled_by(CFGGuider, model, steps=4, sampler=euler(buffered)))
        assert counts.shared == 2
    assert torch.equal(*latents)


# What stays behind.


@pytest.mark.parametrize("name", GUIDERS)
def test_nothing_is_left_on_a_patcher_by_any_guider(name):
    guider, around = GUIDERS[name]
    model = around(guide("PAG", seg(tiny_model()), 2.0))
    sample(model, steps=1, size=(6, 8))  # ComfyUI marks the layers that it has loaded

    def left():
        return fingerprint(model.model_options), network_state(model)

    before = left()
    sampled_by(guider, model)
    assert left() == before


def test_each_run_by_a_model_s_own_options_says_its_warnings(caplog):
    """Nothing of one run is known to the next, also where its options are the model's own."""
    model = seg(tiny_model(), branch="unconditional")
    for runs in (1, 2):
        sampled_by(HandsInTheModelsOptions, model, cfg=1.0)
        said = [m for m in warned(caplog) if "at cfg 1 there is no unconditional" in m]
        assert len(said) == runs
