"""What the log and errors say is so: each message that was untrue once, in the case it was."""

from __future__ import annotations

import functools
import re

import comfy.model_base as model_base
import comfy.supported_models as supported
import pytest
import torch
from choice import each
from comfy.samplers import CFGGuider
from dit_models import sampled, tiny_dit
from family_oracle import guide
from host_models import (
    conditioning,
    counted_calls,
    noise_like,
    patcher_of,
    sample,
    seg,
    shared_model,
    tiny_model,
)
from host_oracle import deviation
from neighbours import calls_twice
from no_op import ACTS
from reuse_checks import warned
from stand_ins import patched
from strange_guiders import (
    BreaksOff,
    NamesPromptsAnew,
    RunsFunctionsTwice,
    SkipsByItself,
    sampled_by,
)

METHODS = {
    "SEG": seg,
    "SLG": functools.partial(guide, "SLG", scale=2.0),
    "SAG": functools.partial(guide, "SAG", scale=0.5),
    "free": functools.partial(seg, branch="free"),
    "SEG and SAG": lambda model, **each: guide("SAG", seg(model, **each), 0.5, **each),
}
LABELS = {
    "SEG": "Smoothed Energy Guidance", "PAG": "Perturbed-Attention Guidance",
    "TPG": "Token Perturbation Guidance", "SLG": "Skip Layer Guidance",
    "SAG": "Self-Attention Guidance",
}  # fmt: skip
"""How each node calls itself in what it says."""


def early(seed, end=0.3):
    """Return a prompt that is left out in the later steps."""
    return conditioning(seed, start_percent=0.0, end_percent=end)


# Prompts out of their range.


@pytest.mark.parametrize(*each(method=["SEG", "SLG", "SAG", "free"], end=[0.3, 0.0]))
def test_steps_without_an_active_prompt_cost_nothing_and_accuse_no_other_node(method, end, caplog):
    side, cfg = ("negative", 4.0) if method == "free" else ("positive", 1.0)
    model = METHODS[method](shared_model())
    with counted_calls(model) as calls:
        found = sample(model, cfg=cfg, steps=4, **{side: early(1, end)})
    assert torch.isfinite(found).all()
    assert end or method == "free" or len(calls) <= 2
    for untrue in ("nother node", "by itself", "begins there"):
        assert untrue not in caplog.text


def test_guidance_goes_on_while_one_of_two_prompts_is_active(caplog):
    runs = {"cfg": 1.0, "steps": 4, "positive": early(1) + conditioning(3)}
    assert deviation(sample(seg(shared_model()), **runs), sample(shared_model(), **runs)) > ACTS
    assert warned(caplog) == []


# Who is accused of what.


@pytest.mark.parametrize("method", METHODS)
def test_an_error_between_plain_calls_blames_nobody(method, caplog):
    with pytest.raises(RuntimeError, match="second prompt"):
        sampled_by(BreaksOff, METHODS[method](shared_model()))
    assert warned(caplog) == []


# Counts.

GUIDED = re.compile(r"(\d+) of (\d+) model evaluations guided")


GUIDERS = {
    "runs functions twice": (RunsFunctionsTwice, lambda model: model),
    "skips a block by itself": (SkipsByItself, lambda model: model),
    "evaluates twice": (CFGGuider, calls_twice),
}


@pytest.mark.parametrize(
    *each(None, lambda method, name: "skips" in name, method=METHODS, name=GUIDERS)
)
def test_no_more_is_guided_than_there_is_and_a_guider_is_called_no_cache(method, name, caplog):
    caplog.set_level("INFO")
    guider, around = GUIDERS[name]
    sampled_by(guider, around(METHODS[method](shared_model())), steps=4)
    counts = [tuple(map(int, found)) for found in GUIDED.findall(caplog.text)]
    assert counts
    assert all(0 < guided <= evaluations for guided, evaluations in counts)
    assert "cache" not in caplog.text
    assert "not reached" not in caplog.text


@pytest.mark.parametrize("method", ["SEG", "free"])
def test_evaluations_outside_of_the_window_are_counted_once(method, caplog):
    caplog.set_level("INFO")
    guided = {"SEG": seg, "free": functools.partial(seg, branch="free")}[method]
    sample(guided(shared_model(), end=0.4), steps=4, size=(4, 4))
    ((_, evaluations),) = GUIDED.findall(caplog.text)
    assert evaluations == "4"


@pytest.mark.parametrize("branch", ["conditional", "unconditional"])
def test_guidance_at_cfg_1_acts_from_the_first_step_and_accuses_nobody(branch, caplog):
    caplog.set_level("INFO")
    for method in ("SEG", "SAG"):
        sample(guide(method, shared_model(), 0.5, branch=branch), cfg=1.0, steps=3, size=(4, 4))
    assert GUIDED.findall(caplog.text) == [("3", "3")] * 2
    assert "another node" not in caplog.text
    assert "its prompt was not evaluated" not in caplog.text


@pytest.mark.parametrize("method", ["SEG", "SAG", "free"])
def test_a_guider_that_gives_prompts_new_identities_is_said_to(method, caplog):
    caplog.set_level("INFO")
    found = sampled_by(NamesPromptsAnew, METHODS[method](shared_model()))
    plain = sampled_by(NamesPromptsAnew, shared_model())
    assert (deviation(found, plain) > ACTS) == (method == "SEG")
    (message,) = [m for m in warned(caplog) if "new identities" in m]
    assert ("takes an extra pass" in message) == (method == "SEG")
    assert "not evaluated" not in caplog.text


def test_predictions_that_are_no_numbers_are_no_fault_of_joining(caplog):
    @patched("output_block_patch")
    def broken(h, hsp, options):
        return h * torch.nan, hsp

    sample(broken(seg(shared_model())), size=(4, 4))
    assert warned(caplog) == []


# Networks that are not the family's.


class ForeignNetwork(torch.nn.Module):
    """As networks of nunchaku or TensorRT: the family's call, in one piece, without its blocks."""

    dtype = torch.float32

    def forward(self, x, *args, **kwargs):
        return 0.3 * x


def in_the_family_s_place(kind):
    """Return a model of the host's class for a family, around the network of another library."""
    model = tiny_model(kind) if kind == "sdxl" else tiny_dit(kind)
    model.model.diffusion_model = ForeignNetwork()
    return model


@pytest.mark.parametrize("kind", ["flux", "sd3", "qwen", "wan", "zimage", "ltxv", "sdxl"])
def test_a_network_in_the_family_s_place_is_refused_by_name_with_advice(kind):
    model = in_the_family_s_place(kind)
    for method, label in LABELS.items():
        for widgets in ({}, {"blocks": "m0" if kind == "sdxl" else "1"}):
            with pytest.raises(ValueError, match=f"^{label}.*ForeignNetwork") as error:
                guide(method, model, 1.0, **widgets)
            assert str(error.value).count(". ") >= 1, "what is wrong, and then what to do"


# Sound.


def test_blur_everywhere_takes_pictures_and_videos_for_no_sound_whatever_their_network():
    for model, kind in (
        *((tiny_dit(kind), kind) for kind in ("flux", "wan", "aura")),
        (in_the_family_s_place("flux"), "flux"),
    ):
        guided = guide("SAG", model, 0.5, mask="everywhere", blur_sigma=1.0)
        found, plain = (sampled(each, kind) for each in (guided, model))
        assert deviation(found, plain) > ACTS


SOUNDS = {"ACEStep": (8, 16, 12), "ACEStep15": (64, 12), "StableAudio": (64, 12)}


def sound_model(name, monkeypatch):
    """Return a model of the host's class for sound, around a network that needs no prompt."""
    config = getattr(supported, name)({"audio_model": "ace"})
    config.unet_config = {"disable_unet_model_creation": True, "dtype": torch.float32}
    config.manual_cast_dtype = None
    if name == "StableAudio":  # whose class wants weights of its own
        kind = model_base.ModelType.V_PREDICTION_CONTINUOUS
        model = model_base.BaseModel(config, kind)
    else:
        model = config.get_model({})
    monkeypatch.setattr(type(model), "extra_conds", model_base.BaseModel.extra_conds)
    model.diffusion_model = ForeignNetwork()
    return patcher_of(model)


@pytest.mark.parametrize("name", SOUNDS)
def test_blur_of_rows_and_columns_refuses_sound_by_name(name, monkeypatch):
    model = sound_model(name, monkeypatch)
    latent = noise_like((1, *SOUNDS[name]), 3)
    settings = {"latent": latent, "steps": 2, "cfg": 1.0}
    assert torch.isfinite(sample(model, **settings)).all()
    with pytest.raises(ValueError, match=r"^Self-Attention Guidance.*sound"):
        sample(guide("SAG", model, 0.5, mask="everywhere"), **settings)


def test_where_guidance_changes_nothing_there_is_no_share_of_it(caplog):
    caplog.set_level("INFO")
    model = tiny_model()
    with torch.no_grad():
        model.model.diffusion_model.middle_block[1].proj_out.weight.zero_()
    found = sample(guide("SEG", model, every=2), steps=3)
    assert torch.equal(found, sample(model, steps=3))
    assert ", 1 held, effective cfg 7, " in caplog.text
    assert "nan" not in caplog.text
