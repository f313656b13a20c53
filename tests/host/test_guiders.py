"""Every guider and sampling node of ComfyUI, driven as a workflow drives it."""

from __future__ import annotations

import functools

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import nodes
import pytest
import torch
from choice import each
from host_models import conditioning, core_node, counted_calls, noise_like, seg, shared_model
from host_oracle import deviation
from neighbours import reads_the_label
from no_op import NOTHING, nothing
from reuse_checks import require_reference

SIZE = (6, 10)
POSITIVE, MIDDLE, NEGATIVE = (conditioning(seed) for seed in (1, 3, 2))
LATENT = {"samples": torch.zeros(2, 4, *SIZE)}
SIDES = ("conditional", "unconditional")
shipped = functools.partial(core_node, "comfy_extras.nodes_custom_sampler")


def custom_sampling(guider, model, steps=2):
    """Run `SamplerCustomAdvanced` with a guider and return the latents."""
    with torch.inference_mode():
        sigmas = shipped("BasicScheduler", model, "normal", steps, 1.0)
        sampler = shipped("KSamplerSelect", "euler")
        noise = custom.RandomNoise.execute(11)[0]
        out = custom.SamplerCustomAdvanced.execute(noise, guider(model), sampler, sigmas, LATENT)
    return out[0]["samples"]


def basic(model):
    return custom.BasicGuider.execute(model, POSITIVE)[0]


def cfg(value, negative=NEGATIVE):
    return lambda model: custom.CFGGuider.execute(model, POSITIVE, negative, value)[0]


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
    "CFGGuider at cfg 0": cfg(0.0),
    "CFGGuider at cfg 1": cfg(1.0),
    "DualCFGGuider regular": dual_cfg(4.0, 2.0, "regular"),
    "DualCFGGuider regular without negative": dual_cfg(4.0, 1.0, "regular"),
    "DualCFGGuider nested": dual_cfg(4.0, 2.0, "nested"),
    "PerpNegGuider": perp_neg(5.0, 0.7),
    "PerpNegGuider without negative": perp_neg(5.0, 0.0),
    "PerpNegGuider at cfg 1": perp_neg(1.0, 0.0),
}
WITH_THREE_PROMPTS = ("DualCFGGuider regular", "DualCFGGuider nested", "PerpNegGuider")


def ksampler(value):
    def run(model):
        with torch.inference_mode():
            return nodes.KSampler().sample(
                model, 5, 2, value, "euler", "normal", POSITIVE, NEGATIVE, LATENT
            )[0]["samples"]

    return run


def advanced(model, start, end, latent, *, add_noise="enable", leftover="disable"):
    with torch.inference_mode():
        return nodes.KSamplerAdvanced().sample(
            model, add_noise, 5, 4, 6.0, "euler", "normal", POSITIVE, NEGATIVE,
            {"samples": latent}, start, end, leftover,
        )[0]["samples"]  # fmt: skip


def sampler_custom(model):
    with torch.inference_mode():
        sigmas = custom.KarrasScheduler.execute(2, 14.0, 0.03, 7.0)[0]
        sampler = shipped("KSamplerSelect", "euler")
        return shipped(
            "SamplerCustom", model, True, 4, 6.0, POSITIVE, NEGATIVE, sampler, sigmas, LATENT
        )["samples"]


NODES = {
    **{name: functools.partial(custom_sampling, guider) for name, guider in GUIDERS.items()},
    "KSampler": ksampler(6.0),
    "KSampler at cfg 1": ksampler(1.0),
    "KSamplerAdvanced": lambda model: advanced(model, 1, 3, noise_like((1, 4, *SIZE), 3)),
    "SamplerCustom": sampler_custom,
}


@pytest.mark.parametrize(
    *each(
        lambda name, branch, **_: branch == "conditional" or name in WITH_THREE_PROMPTS,
        name=NODES, reuse=[True, False], branch=SIDES,
    )
)  # fmt: skip
def test_every_guider_and_sampling_node_gives_what_the_dense_reference_gives(name, reuse, branch):
    require_reference(
        reuse=reuse, size=SIZE, run=lambda model, size: NODES[name](model),
        node={"branch": branch}, dense={"side": branch.removesuffix("itional")},
    )  # fmt: skip


@pytest.mark.current_only
def test_two_models_under_one_guider_give_what_the_dense_reference_gives():
    def guider(model):
        other = shared_model("sd15")
        return custom.DualModelGuider.execute(model, POSITIVE, 5.0, other, NEGATIVE)[0]

    require_reference(size=SIZE, run=lambda model, size: custom_sampling(guider, model))


@pytest.mark.parametrize(*each(reuse=[True, False], branch=SIDES))
def test_effects_by_side_under_a_guider_of_three_prompts_are_pushed_nowhere(reuse, branch):
    nested = functools.partial(custom_sampling, GUIDERS["DualCFGGuider nested"])
    reads = reads_the_label(shared_model())
    assert deviation(nested(nothing(reads, reuse, branch=branch)), nested(reads)) <= NOTHING


@pytest.mark.parametrize("reuse", [True, False])
def test_free_under_a_nested_guider_perturbs_what_is_compared_from_the_first_step(reuse):
    free = seg(shared_model(), sigma=1.3, branch="free", reuse=reuse)
    two = cfg(4.0, negative=MIDDLE)
    found = custom_sampling(dual_cfg(4.0, 1.0, "nested"), free)
    assert deviation(found, custom_sampling(two, free)) <= NOTHING

    def negative(model):
        return custom.BasicGuider.execute(model, NEGATIVE)[0]

    plain = custom_sampling(negative, shared_model(), steps=1)
    expected = plain + 2.0 * (custom_sampling(two, free, steps=1) - plain)
    found = custom_sampling(dual_cfg(4.0, 2.0, "nested"), free, steps=1)
    assert deviation(found, expected) <= NOTHING


def test_free_waits_a_step_under_a_guider_with_sides_that_nobody_knows(caplog):
    class Stranger(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
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

    run = functools.partial(custom_sampling, guider)
    free = seg(shared_model(), sigma=1.3, branch="free")
    assert torch.equal(run(free, 1), run(shared_model(), 1))
    assert "is known after its first evaluation" in caplog.text
    assert "window" not in caplog.text
    assert deviation(run(free), run(shared_model())) > 1e-5


def test_guider_that_asks_for_no_conditional_prediction_is_left_alone_with_a_warning(caplog):
    run = functools.partial(custom_sampling, dual_cfg(1.0, 1.0, "regular"))
    assert torch.equal(run(seg(shared_model())), run(shared_model()))
    assert "this guider makes no cond prediction" in caplog.text


# Runs in parts.


def test_sampling_in_two_halves_equals_sampling_at_once():
    model, latent = seg(shared_model(), sigma=1.3), LATENT["samples"]
    whole = advanced(model, 0, 4, latent)
    half = advanced(model, 0, 2, latent, leftover="enable")
    assert deviation(advanced(model, 2, 4, half, add_noise="disable"), whole) < 1e-5


def test_the_window_counts_the_whole_schedule_when_sampling_in_two_halves():
    model = seg(shared_model(), sigma=1.3, end=0.5)
    half = advanced(model, 0, 2, LATENT["samples"], leftover="enable")
    with counted_calls(model) as calls:
        advanced(model, 3, 4, half, add_noise="disable")
    assert calls == [4], "one call of both sides for both images"
