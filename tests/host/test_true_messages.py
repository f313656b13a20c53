"""What the log and errors say is so: each message that was untrue once, in the case it was."""

from __future__ import annotations

import importlib
import re

import comfy.model_patcher
import comfy.supported_models as supported
import pytest
import torch
from choice import each
from dit_models import latent_shape, sample_dit, tiny_dit
from family_oracle import guide
from host_models import conditioning, noise_like, sample, seg, shared_model, tiny_model
from neighbours import cache_in_a_closure
from no_op import warnings_of
from reuse_checks import difference
from strange_guiders import BreaksOff, EvaluatesTwice, RunsFunctionsTwice, SkipsByItself, sampled_by

METHODS = {
    "SEG": lambda model: seg(model),
    "SLG": lambda model: guide("SLG", model, 2.0),
    "SAG": lambda model: guide("SAG", model, 0.5),
    "free": lambda model: seg(model, branch="free"),
    "SEG and SAG": lambda model: guide("SAG", seg(model), 0.5),
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


@pytest.mark.parametrize("method", ["SEG", "SLG", "SAG"])
def test_steps_without_an_active_prompt_accuse_no_other_node(method, caplog):
    model = METHODS[method](shared_model())
    sample(model, cfg=1.0, steps=4, positive=early(1))
    assert "nother node" not in caplog.text
    assert "by itself" not in caplog.text
    if method == "SEG":  # it goes on while one of two prompts is active
        caplog.clear()
        runs = {"cfg": 1.0, "steps": 4, "positive": early(1) + conditioning(3)}
        assert difference(sample(model, **runs), sample(shared_model(), **runs)) > 1e-3
        assert warnings_of(caplog) == []


@pytest.mark.parametrize("end", [0.3, 0.0])
def test_free_with_its_prompt_out_of_range_promises_no_beginning(end, caplog):
    model = seg(shared_model(), branch="free")
    sample(model, cfg=4.0, steps=4, negative=early(2, end))
    assert "begins there" not in caplog.text
    assert "nother node" not in caplog.text


# Who is accused of what.


@pytest.mark.parametrize("method", METHODS)
def test_a_guider_with_a_skipped_prediction_of_its_own_is_called_no_cache(method, caplog):
    caplog.set_level("INFO")
    model = tiny_dit("flux")
    guided = {"SEG": lambda m: seg(m, blocks="double.1")}.get(method, METHODS[method])
    sampled_by(SkipsByItself, guided(model), kind="flux")
    assert "cache" not in caplog.text
    assert "not reached" not in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_an_error_between_plain_calls_blames_nobody(method, caplog):
    with pytest.raises(RuntimeError, match="second prompt"):
        sampled_by(BreaksOff, METHODS[method](shared_model()))
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("cfg", [7.0, 1.0])
@pytest.mark.parametrize("start", [0.2, 0.0])
def test_a_cache_in_a_closure_is_not_said_to_take_all_effect(start, cfg, caplog):
    """As caches of features do, it answers every second call; guidance acts in the others."""

    def run(guided):
        state = {}
        model = cache_in_a_closure(guided(shared_model()), state)
        return sample(model, steps=6, cfg=cfg, size=(6, 8))

    found, plain = run(lambda m: seg(m, start=start)), run(lambda m: m)
    assert difference(found, plain) > 1e-3
    assert "has no effect" not in caplog.text
    assert "had no effect" not in caplog.text


# Counts.

GUIDED = re.compile(r"(\d+) of (\d+) model evaluations guided")


@pytest.mark.parametrize(
    *each(method=METHODS, guider=[RunsFunctionsTwice, EvaluatesTwice, SkipsByItself])
)
def test_no_more_evaluations_are_guided_than_there_are(method, guider, caplog):
    caplog.set_level("INFO")
    sampled_by(guider, METHODS[method](shared_model()), steps=4)
    counts = [tuple(map(int, found)) for found in GUIDED.findall(caplog.text)]
    assert counts
    assert all(0 < guided <= evaluations for guided, evaluations in counts)


# Networks that are not the family's.


class ForeignNetwork(torch.nn.Module):
    """As networks of nunchaku or TensorRT: the family's call, in one piece, without its blocks."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.engine = torch.nn.Linear(1, 1)
        self.dtype = dtype

    def forward(self, x, timesteps=None, context=None, **kwargs):
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


class Tone(torch.nn.Module):
    """A network for sound, of whatever shape it has."""

    dtype = torch.float32

    def forward(self, x, timestep, **kwargs):
        return 0.3 * x


def test_blur_everywhere_takes_pictures_and_videos_for_no_sound_whatever_their_network():
    for model, kind in (
        *((tiny_dit(kind), kind) for kind in ("flux", "wan", "aura")),
        (in_the_family_s_place("flux"), "flux"),
    ):
        guided = guide("SAG", model, 0.5, mask="everywhere", blur_sigma=1.0)
        found, plain = (sample_dit(each, kind, latent_shape(kind)) for each in (guided, model))
        assert difference(found, plain) > 1e-3


SOUNDS = {
    "ACEStep": (8, 16, 12),
    "ACEStep15": (64, 12),
    "StableAudio": (64, 12),
}


def sound_model(name, monkeypatch):
    """Return a model of the host's class for sound, around a network that needs no prompt."""
    model_base = importlib.import_module("comfy.model_base")
    config = getattr(supported, name)({"audio_model": "ace"})
    config.unet_config = {"disable_unet_model_creation": True, "dtype": torch.float32}
    config.manual_cast_dtype = None
    if name == "StableAudio":  # whose class wants weights of its own
        kind = model_base.ModelType.V_PREDICTION_CONTINUOUS
        model = model_base.BaseModel(config, kind)
    else:
        model = config.get_model({})
    monkeypatch.setattr(type(model), "extra_conds", model_base.BaseModel.extra_conds)
    model.diffusion_model = Tone()
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


@pytest.mark.parametrize("name", SOUNDS)
def test_blur_of_rows_and_columns_refuses_sound_by_name(name, monkeypatch):
    model = sound_model(name, monkeypatch)
    latent = noise_like((1, *SOUNDS[name]), 3)
    settings = {"latent": latent, "steps": 2, "cfg": 1.0}
    assert torch.isfinite(sample(model, **settings)).all()
    with pytest.raises(ValueError, match=r"^Self-Attention Guidance.*sound"):
        sample(guide("SAG", model, 0.5, mask="everywhere"), **settings)
