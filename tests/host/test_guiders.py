"""Every guider and sampling node of ComfyUI, driven as a workflow drives it."""

from __future__ import annotations

import math

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import nodes
import pytest
import torch
from choice import each
from host_models import (
    conditioning,
    core_node,
    counted_calls,
    noise_like,
    sample,
    seg,
    shared_model,
)
from host_oracle import dense_seg, deviation, deviation_of_node
from reuse_checks import reported

SIZE = (6, 10)
POSITIVE, MIDDLE, NEGATIVE = (conditioning(seed) for seed in (1, 3, 2))
LARGEST = 1e-6


def custom_sampling(model, guider, steps=2):
    """Run `SamplerCustomAdvanced` with a guider and return the latents."""
    latent = {"samples": torch.zeros(2, 4, *SIZE)}
    with torch.inference_mode():
        sigmas = core_node("comfy_extras.nodes_custom_sampler", "BasicScheduler", model, "normal",
                           steps, 1.0)  # fmt: skip
        sampler = core_node("comfy_extras.nodes_custom_sampler", "KSamplerSelect", "euler")
        noise = custom.RandomNoise.execute(11)[0]
        out = custom.SamplerCustomAdvanced.execute(noise, guider(model), sampler, sigmas, latent)
    return out[0]["samples"]


def basic(model):
    return custom.BasicGuider.execute(model, POSITIVE)[0]


def cfg(value):
    return lambda model: custom.CFGGuider.execute(model, POSITIVE, NEGATIVE, value)[0]


def dual_cfg(first, second, style):
    return lambda model: custom.DualCFGGuider.execute(
        model, POSITIVE, MIDDLE, NEGATIVE, first, second, style
    )[0]


def perp_neg(value, negative_scale):
    return lambda model: core_node(
        "comfy_extras.nodes_perpneg", "PerpNegGuider", model, POSITIVE, NEGATIVE, MIDDLE, value,
        negative_scale,
    )  # fmt: skip


GUIDERS = {
    "BasicGuider": basic,
    "CFGGuider": cfg(5.0),
    "CFGGuider at cfg 1": cfg(1.0),
    "DualCFGGuider regular": dual_cfg(4.0, 2.0, "regular"),
    "DualCFGGuider regular without negative": dual_cfg(4.0, 1.0, "regular"),
    "DualCFGGuider nested": dual_cfg(4.0, 2.0, "nested"),
    "PerpNegGuider": perp_neg(5.0, 0.7),
    "PerpNegGuider without negative": perp_neg(5.0, 0.0),
    "PerpNegGuider at cfg 1": perp_neg(1.0, 0.0),
}


@pytest.mark.parametrize(*each(guider=GUIDERS, reuse=[True, False]))
def test_every_guider_gives_what_the_dense_reference_gives(guider, reuse):
    found = deviation_of_node(
        shared_model(), sigma=1.3, size=SIZE, node={"reuse": reuse},
        run=lambda model, size: custom_sampling(model, GUIDERS[guider]),
    )  # fmt: skip
    assert found <= LARGEST


@pytest.mark.parametrize("nested", [False, True])
def test_a_guider_of_three_prompts_shares_from_the_first_step(nested, comfy_host):
    guider = GUIDERS["DualCFGGuider nested" if nested else "DualCFGGuider regular"]
    with reported() as counts:
        custom_sampling(seg(shared_model()), guider, steps=3)
    if comfy_host.version >= (0, 17):
        assert (counts.shared, counts.reasons) == (3, set())


@pytest.mark.parametrize("name", ["DualCFGGuider regular", "DualCFGGuider nested", "PerpNegGuider"])
def test_unconditional_branch_works_under_guiders_with_three_prompts(name):
    found = deviation_of_node(
        shared_model(), sigma=1.3, size=SIZE,
        node={"branch": "unconditional"}, dense={"side": "uncond"},
        run=lambda model, size: custom_sampling(model, GUIDERS[name]),
    )  # fmt: skip
    assert found <= LARGEST


@pytest.mark.parametrize("reuse", [True, False])
def test_free_under_a_nested_guider_perturbs_what_is_compared_from_the_first_step(reuse):
    def free(guider, **options):
        model = shared_model()
        guided = seg(model, sigma=1.3, branch="free", reuse=reuse)
        return custom_sampling(guided, guider, **options)

    def two(model):
        return custom.CFGGuider.execute(model, POSITIVE, MIDDLE, 4.0)[0]

    assert deviation(free(dual_cfg(4.0, 1.0, "nested")), free(two)) <= LARGEST

    def negative(model):
        return custom.BasicGuider.execute(model, NEGATIVE)[0]

    plain = custom_sampling(shared_model(), negative, steps=1)
    expected = plain + 2.0 * (free(two, steps=1) - plain)
    found = free(dual_cfg(4.0, 2.0, "nested"), steps=1)
    assert deviation(found, expected) <= LARGEST


def test_free_waits_a_step_under_a_guider_with_sides_that_nobody_knows(caplog):
    class Stranger(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            del seed
            sides = [self.conds[name] for name in ("third", "negative", "positive")]
            third, _, positive = comfy.samplers.calc_cond_batch(
                self.inner_model, sides, x, timestep, model_options
            )
            return comfy.samplers.cfg_function(
                self.inner_model, positive, third, 4.0, x, timestep,
                model_options=model_options, cond=sides[2], uncond=sides[0],
            )  # fmt: skip

    def guider(model):
        stranger = Stranger(model)
        stranger.inner_set_conds({"positive": POSITIVE, "negative": NEGATIVE, "third": MIDDLE})
        return stranger

    def run(model, steps):
        return custom_sampling(model, guider, steps=steps)

    free = seg(shared_model(), sigma=1.3, branch="free")
    assert torch.equal(run(free, 1), run(shared_model(), 1))
    assert "is known after its first evaluation" in caplog.text
    assert "window" not in caplog.text
    assert deviation(run(free, 2), run(shared_model(), 2)) > 1e-5


@pytest.mark.current_only
def test_two_models_under_one_guider_give_what_the_dense_reference_gives():
    other = shared_model("sd15")
    found = deviation_of_node(
        shared_model(), sigma=1.3, size=SIZE,
        run=lambda model, size: custom_sampling(
            model,
            lambda m: custom.DualModelGuider.execute(m, POSITIVE, 5.0, other, NEGATIVE)[0],
        ),
    )  # fmt: skip
    assert found <= LARGEST


@pytest.mark.parametrize("cfg_value", [1.0, 6.0])
def test_ksampler_node_gives_what_the_dense_reference_gives(cfg_value):
    def run(model, size):
        latent = {"samples": torch.zeros(2, 4, *size)}
        with torch.inference_mode():
            return nodes.KSampler().sample(
                model, 5, 2, cfg_value, "euler", "normal", POSITIVE, NEGATIVE, latent
            )[0]["samples"]

    assert deviation_of_node(shared_model(), sigma=1.3, size=SIZE, run=run) <= LARGEST


def advanced(model, start, end, latent, *, add_noise="enable", leftover="disable"):
    with torch.inference_mode():
        return nodes.KSamplerAdvanced().sample(
            model, add_noise, 5, 4, 6.0, "euler", "normal", POSITIVE, NEGATIVE,
            {"samples": latent}, start, end, leftover,
        )[0]["samples"]  # fmt: skip


def test_advanced_ksampler_gives_what_the_dense_reference_gives():
    found = deviation_of_node(
        shared_model(), sigma=1.3, size=SIZE,
        run=lambda model, size: advanced(model, 1, 3, noise_like((1, 4, *size), 3)),
    )  # fmt: skip
    assert found <= LARGEST


def test_sampling_in_two_halves_equals_sampling_at_once():
    model = seg(shared_model(), sigma=1.3)
    latent = torch.zeros(1, 4, *SIZE)
    whole = advanced(model, 0, 4, latent)
    half = advanced(model, 0, 2, latent, leftover="enable")
    assert deviation(advanced(model, 2, 4, half, add_noise="disable"), whole) < 1e-5


def test_the_window_counts_the_whole_schedule_when_sampling_in_two_halves():
    model, latent = seg(shared_model(), sigma=1.3, end=0.5), torch.zeros(1, 4, *SIZE)
    half = advanced(model, 0, 2, latent, leftover="enable")
    with counted_calls(model) as calls:
        advanced(model, 3, 4, half, add_noise="disable")
    assert calls == [2]


def test_sampler_custom_node_gives_what_the_dense_reference_gives():
    def run(model, size):
        with torch.inference_mode():
            sigmas = custom.KarrasScheduler.execute(2, 14.0, 0.03, 7.0)[0]
            sampler = core_node("comfy_extras.nodes_custom_sampler", "KSamplerSelect", "euler")
            return core_node(
                "comfy_extras.nodes_custom_sampler", "SamplerCustom", model, True, 4, 6.0, POSITIVE,
                NEGATIVE, sampler, sigmas, {"samples": torch.zeros(1, 4, *size)},
            )["samples"]  # fmt: skip

    assert deviation_of_node(shared_model(), sigma=1.3, size=SIZE, run=run) <= LARGEST


def test_guider_that_asks_for_no_conditional_prediction_is_left_alone_with_a_warning(caplog):
    guider = dual_cfg(1.0, 1.0, "regular")
    found = custom_sampling(seg(shared_model()), guider)
    assert torch.equal(found, custom_sampling(shared_model(), guider))
    assert "this guider makes no cond prediction" in caplog.text


@pytest.mark.parametrize("cfg_value", [0.0, 1.0, 2.5, 9.0])
def test_the_user_s_cfg_is_honoured(cfg_value):
    found = deviation_of_node(shared_model(), size=SIZE, cfg=cfg_value, steps=1)
    assert found <= LARGEST


def test_node_does_not_turn_off_the_optimisation_at_cfg_1():
    assert not seg(shared_model()).model_options.get("disable_cfg1_optimization", False)


def test_guider_that_runs_no_wrappers_of_the_host_is_guided_too():
    class Bare(custom.comfy.samplers.CFGGuider):
        def outer_predict_noise(self, x, timestep, model_options=None, seed=None):
            return self.predict_noise(x, timestep, model_options or {}, seed)

    def guider(model):
        bare = Bare(model)
        bare.set_conds(POSITIVE, NEGATIVE)
        bare.set_cfg(4.0)
        return bare

    reference = custom_sampling(dense_seg(shared_model(), sigma=1.3, size=SIZE), cfg(4.0))
    found = custom_sampling(seg(shared_model(), sigma=1.3), guider)
    assert deviation(found, reference) <= LARGEST


def test_sigma_infinity_and_a_large_sigma_of_the_full_kernel_agree():
    infinite = sample(seg(shared_model(), sigma=math.inf), size=SIZE)
    wide = sample(seg(shared_model(), sigma=500.0, kernel="full"), size=SIZE)
    assert deviation(wide, infinite) < 1e-5
