"""Guiders and evaluations of other packs: guided exactly, and nothing of ours stays with them."""

from __future__ import annotations

import functools

import pytest
import torch
from choice import each
from dit_models import tiny_dit
from family_oracle import guide
from host_models import sample, seg, shared_model, tiny_model
from no_op import (
    NOTHING,
    STEPS,
    identities,
    network_runs,
    nothing,
    refused_by_name,
    warnings_of,
)
from reuse_checks import difference
from strange_guiders import (
    ByHand,
    EvaluatesTwice,
    HandsInTheModelsOptions,
    RunsFunctionsTwice,
    ShowsItsResult,
    SkipsByItself,
    in_place,
    older_evaluation,
    sampled_by,
)

RESCALED = ("full", "partial", "snf")
GUIDERS = (
    ByHand,
    ShowsItsResult,
    SkipsByItself,
    RunsFunctionsTwice,
    EvaluatesTwice,
    HandsInTheModelsOptions,
)


def plain(**settings):
    """Sample as the KSampler node does."""
    ours = {"size": (6, 8), "steps": STEPS, "scheduler": "simple"}
    return functools.partial(sample, **ours, **settings)


@pytest.mark.parametrize(
    *each(lambda cfg, reuse, **_: cfg > 1 or reuse,
          lambda guider, cfg, reuse: cfg > 1 and reuse,
          cfg=(4.0, 1.0), reuse=(True, False), guider=GUIDERS)
)  # fmt: skip
def test_a_guider_of_another_pack_is_pushed_nowhere_by_nothing(guider, cfg, reuse):
    alone = sampled_by(guider, shared_model(), cfg=cfg)
    found = sampled_by(guider, nothing(shared_model(), reuse=reuse), cfg=cfg)
    assert difference(found, alone) <= NOTHING
    acts = sampled_by(guider, seg(shared_model(), reuse=reuse), cfg=cfg)
    assert difference(acts, alone) > 1e-3
    whole = sampled_by(guider, seg(shared_model(), reuse=False), cfg=cfg)
    assert difference(acts, whole) <= NOTHING


@pytest.mark.parametrize(("cfg", "reuse"), [(7.0, True), (7.0, False), (1.0, True)])
def test_a_cfg_function_that_writes_into_the_latent_is_pushed_nowhere_by_nothing(cfg, reuse):
    run = plain(cfg=cfg)
    alone = run(in_place(shared_model()))
    for side in ("conditional", "unconditional")[: 1 + (cfg > 1)]:
        found = run(in_place(nothing(shared_model(), reuse=reuse, branch=side)))
        assert difference(found, alone) <= NOTHING
    one = run(in_place(seg(shared_model(), reuse=reuse)))
    assert difference(one, run(in_place(seg(shared_model(), reuse=not reuse)))) <= NOTHING


@pytest.mark.parametrize("guider", [ShowsItsResult, ByHand])
def test_the_blurred_latent_of_sag_is_made_of_the_latent_of_the_step(guider):
    def run(shown, sigma):
        return sampled_by(shown, guide("SAG", shared_model(), 0.5, blur_sigma=sigma))

    assert difference(run(guider, 1e-3), sampled_by(guider, shared_model())) <= NOTHING
    assert difference(run(guider, 2.0), run(ByHand, 2.0)) <= NOTHING


# Cfg 1, where a guider hands on the number 0 for what it has not evaluated.


@pytest.mark.parametrize(*each(mode=RESCALED, guider=[ByHand, SkipsByItself]))
def test_an_uncond_that_is_the_number_0_is_no_uncond(guider, mode):
    model = seg(shared_model(), rescale=0.7, rescale_mode=mode)
    found = sampled_by(guider, model, cfg=1.0)
    assert torch.isfinite(found).all()
    assert difference(found, sampled_by(guider, shared_model(), cfg=1.0)) > 1e-3
    if guider is ByHand:
        assert difference(found, plain(cfg=1.0)(model)) <= NOTHING


@pytest.mark.parametrize("side", ["unconditional", "free"])
def test_a_branch_that_needs_an_uncond_says_that_there_is_none(side, caplog):
    found = sampled_by(ByHand, seg(shared_model(), branch=side), cfg=1.0)
    assert torch.equal(found, sampled_by(ByHand, shared_model(), cfg=1.0))
    assert len(warnings_of(caplog)) >= 1


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
    with network_runs(settings.get("kind", "unet")) as rows:
        sampled_by(SkipsByItself, make(), **settings)
    assert rows == [joined, 1] * STEPS
    assert warnings_of(caplog) == []


# Evaluations that tell the network no uuids.


@pytest.mark.parametrize(
    ("method", "cfg"), [("SEG", 7.0), ("SEG", 1.0), ("PAG", 7.0), ("PAG", 1.0), ("SLG", 7.0)]
)
def test_an_older_evaluation_is_guided_by_whole_passes(method, cfg):
    run = plain(cfg=cfg)
    alone = run(older_evaluation(shared_model()))
    still = run(older_evaluation(nothing(shared_model(), True)))
    assert difference(still, alone) <= NOTHING
    expected = run(guide(method, shared_model(), 3.0, reuse=False))
    for model in (
        guide(method, older_evaluation(shared_model()), 3.0),
        older_evaluation(guide(method, shared_model(), 3.0, reuse=False)),
    ):
        found = run(model)
        assert difference(found, expected) <= NOTHING
        assert difference(found, alone) > 1e-3


@pytest.mark.parametrize("guided", [
    lambda model: guide("SAG", model, 0.5),
    lambda model: guide("SAG", model, 0.5, mask="everywhere"),
    lambda model: seg(model, branch="free"),
], ids=["SAG", "SAG everywhere", "free"])  # fmt: skip
def test_what_needs_the_plain_calls_of_an_older_evaluation_acts_or_says_why_not(guided, caplog):
    run = plain(cfg=7.0)
    alone = run(older_evaluation(shared_model()))
    caplog.clear()
    try:
        found = run(older_evaluation(guided(shared_model())))
    except ValueError as error:
        assert refused_by_name(error)  # noqa: PT017  (or it samples)
        return
    if warnings_of(caplog):
        assert torch.equal(found, alone)
    else:
        assert difference(found, run(guided(shared_model()))) <= NOTHING


# What stays behind.


@pytest.mark.parametrize("guider", GUIDERS)
def test_nothing_is_left_on_a_patcher_by_any_guider(guider):
    model = guide("PAG", seg(tiny_model()), 2.0)
    network = model.model.diffusion_model
    sample(model, steps=1, size=(6, 8))  # ComfyUI marks the layers that it has loaded

    def state():
        modules = {
            name: (identities(vars(m)["_forward_hooks"]), sorted(vars(m)))
            for name, m in network.named_modules()
        }
        return identities(model.model_options), modules

    before = state()
    sampled_by(guider, model)
    assert state() == before


def test_each_run_by_a_model_s_own_options_says_its_warnings(caplog):
    """Nothing of one run is known to the next, also where its options are the model's own."""
    model = seg(tiny_model(), branch="unconditional")
    for runs in (1, 2):
        sampled_by(HandsInTheModelsOptions, model, cfg=1.0)
        said = [m for m in warnings_of(caplog) if "at cfg 1 there is no unconditional" in m]
        assert len(said) == runs
