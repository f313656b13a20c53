"""The input `every`: differences that are held, against a guidance that holds them by hand."""

from __future__ import annotations

import math
import re

import comfy.samplers
import pytest
import torch
from choice import each
from dit_models import sampled, shape_of, tiny_dit
from family_oracle import guide, skipped, transformer_blocks
from host_models import conditioning, sample, shared_model, tiny_model
from host_oracle import deviation
from reuse_checks import outcome, reported
from stand_ins import context_windows, patched
from strange_guiders import sampled_by
from test_dense_reference import KINDS
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counting import ParametersRead
from benchmarks.step import GuidedStep

EXACT = 1e-6  # of latents; the sampler is in float32
REUSE = (True, False)
SAMPLERS = ["euler", "heun", "dpm_2", "res_multistep", "euler_ancestral", "dpmpp_sde", "lcm"]


def held_by_hand(model, every, scale=1.0, place=lambda args: None):
    """Return a model guided by SLG whose difference is computed in every n-th evaluation.

    It is computed, too, where the noise level is above that of the held one.

    Args:
        model: the model to guide.
        every: one in so many evaluations of a place.
        scale: guidance weight.
        place: which part of the latent an evaluation is of.
    """
    modules = transformer_blocks(model, ("m", 0, 0), ("m", 0, 1))
    held, levels, uses = {}, {}, {}

    @patched("sampler_post_cfg_function")
    def guided(args):
        at, sigma = place(args), args["sigma"].double()[:, None, None, None]
        uses[at] = uses.get(at, 0) + 1
        if at not in held or uses[at] == every or sigma.max() > 1.001 * levels[at]:
            with skipped(modules):
                (bad,) = comfy.samplers.calc_cond_batch(
                    args["model"], [args["cond"]], args["input"], args["sigma"],
                    args["model_options"],
                )  # fmt: skip
            noise = (bad - args["cond_denoised"]).double() / sigma
            held[at], levels[at], uses[at] = noise, sigma.max(), 0
        return args["denoised"] - scale * (held[at] * sigma).to(args["denoised"])

    return guided(model)


@pytest.mark.filterwarnings("ignore:Should have t[ab]")
@pytest.mark.parametrize(
    *each(sampler=SAMPLERS, kind=KINDS, every=[2, 3], reuse=REUSE, cfg=[1.0, 4.0])
)
def test_between_computed_differences_the_last_one_is_held_in_noise(
    sampler, kind, every, reuse, cfg
):
    model = shared_model("sdxl", model_type=KINDS[kind])
    options = {"sampler": sampler, "scheduler": "simple", "steps": 5, "size": (8, 6), "cfg": cfg}
    theirs = sample(held_by_hand(model, every), **options)
    ours = guide("SLG", model, every=every, reuse=reuse)
    assert deviation(sample(ours, **options), theirs) < 1e-5  # SDE samplers amplify rounding
    each_time = sample(guide("SLG", model, reuse=reuse), **options)
    assert deviation(each_time, theirs) > 1e-4, "holding is visible"


@pytest.mark.parametrize("method", ["SEG", "PAG", "TPG", "SLG", "SSG"])
def test_every_1_is_the_same_bits_and_a_held_step_is_a_plain_one(method):
    """Each block sees as many rows in held steps as without guidance."""
    model = shared_model()
    plain, always = (outcome(m, steps=4) for m in (model, guide(method, model)))
    one, two = (outcome(guide(method, model, every=n), steps=4) for n in (1, 2))
    assert torch.equal(one.latents, always.latents)
    assert two.shared == 2
    assert always.evaluated != plain.evaluated
    for block, rows in two.evaluated.items():
        assert 2 * rows == plain.evaluated[block] + always.evaluated[block]


def test_all_evaluations_between_two_checks_are_held(caplog):
    caplog.set_level("INFO")
    sample(guide("SEG", shared_model(), every=3), steps=7)
    (line,) = (m for m in caplog.messages if "evaluations guided" in m)
    assert "7 of 7 model evaluations guided, 3 in the same model call" in line
    assert re.search(r", 4 held \(off by \d+%, cosine -?\d\.\d\d, where it was checked\)", line)
    caplog.clear()
    sample(guide("SEG", shared_model(), every=8), steps=3)
    (line,) = (m for m in caplog.messages if "evaluations guided" in m)
    assert ", 2 held, " in line, "nothing was checked"


def test_two_branches_hold_each_its_own():
    model = shared_model()
    both = guide("PAG", guide("SLG", model, every=2), every=3)
    by_hand = guide("PAG", held_by_hand(model, 2), every=3)
    assert deviation(sample(both, steps=7), sample(by_hand, steps=7)) < EXACT


def test_a_window_begins_with_a_computed_difference_and_a_second_run_anew():
    model = shared_model()
    ours = guide("SLG", model, start=0.3, every=4)
    with reported() as counts:
        sample(ours, steps=8, last_step=4, force_full_denoise=False)
        first = counts.shared
        sample(ours, steps=8, start_step=4)
    assert first == 1
    assert counts.shared == 2


class InTiles(comfy.samplers.KSAMPLER):
    """A sampler that evaluates the left and the right half of a latent one after the other."""

    def sample(self, model_wrap, *args, **kwargs):
        class Halves:
            def __getattr__(self, name):
                return getattr(model_wrap, name)

            def __call__(self, x, sigma, **extra):
                return torch.cat([model_wrap(h, sigma, **extra) for h in x.chunk(2, -1)], -1)

        return super().sample(Halves(), *args, **kwargs)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_each_tile_holds_a_difference_of_its_own(sampler):
    turn = {}

    def place(args):
        sigma = float(args["sigma"][0])
        turn[sigma] = turn.get(sigma, -1) + 1
        return turn[sigma]

    tiles = InTiles(comfy.samplers.ksampler(sampler).sampler_function)
    theirs = held_by_hand(shared_model(), 2, place=place)
    found, expected = (
        sampled_by(comfy.samplers.CFGGuider, model, steps=4, sampler=tiles)
        for model in (guide("SLG", shared_model(), every=2), theirs)
    )
    assert deviation(found, expected) < EXACT


def test_where_the_noise_rises_above_that_of_a_held_difference_it_is_computed(caplog):
    """As in schedules that restart: scaled up from the last details it would grow without bound."""
    caplog.set_level("INFO")
    sigmas = torch.tensor([3.0, 0.6, 0.2, 6.0, 2.0, 0.5, 0.0])
    found, expected = (
        sampled_by(comfy.samplers.CFGGuider, model, sigmas=sigmas)
        for model in (guide("SLG", shared_model(), every=8), held_by_hand(shared_model(), 8))
    )
    assert deviation(found, expected) < 1e-5  # the step upwards amplifies rounding
    assert "2 in the same model call, 0 in extra passes, 4 held, " in caplog.text


def test_where_other_prompts_become_active_the_difference_is_computed(caplog):
    caplog.set_level("INFO")
    prompts = [
        conditioning(seed, start_percent=start, end_percent=end)[0]
        for seed, start, end in ((1, 0.0, 0.5), (3, 0.5, 1.0))
    ]
    sample(guide("SLG", shared_model(), every=8), steps=6, positive=prompts)
    assert "1 because other prompts are active than when it was held" in caplog.text


def test_free_makes_no_prediction_that_could_be_held(caplog):
    free = guide("SEG", shared_model(), branch="free", every=2)
    assert "every has no effect with branch 'free'" in caplog.text
    always = guide("SEG", shared_model(), branch="free")
    assert torch.equal(sample(free), sample(always))


@pytest.mark.parametrize("wrong", [0, 9, math.nan, 1.5, -1])
def test_numbers_that_are_none_are_refused(wrong):
    for method in ("SEG", "PAG", "TPG", "SLG", "SSG"):
        with pytest.raises(ValueError, match="every must be a whole number from 1 to 8"):
            guide(method, shared_model(), every=wrong)


def test_context_windows_hold_the_difference_of_the_whole_latent():
    cut = context_windows(tiny_dit("wan"), length=2, overlap=1, axis=2)
    shape = shape_of("wan", frames=4)
    with reported() as counts:
        found = sampled(guide("SEG", cut, every=2), "wan", shape, steps=4, cfg=2.0)
    assert torch.isfinite(found).all()
    plain = sampled(guide("SEG", cut), "wan", shape, steps=4, cfg=2.0)
    assert 1e-5 < deviation(found, plain) < 0.5
    assert counts.shared > 0
    assert not counts.full


# What it costs.


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_a_held_step_costs_what_a_plain_one_costs(cfg):
    """In floating-point operations and in reads of weights, counted."""

    def costs(model, evaluations):
        step = GuidedStep(model, conditioning(1), conditioning(2), cfg, (2, 4, 8, 8))

        def body():
            for number in range(evaluations):
                step.evaluate(number)

        counters = FlopCounterMode(display=False), ParametersRead(step.networks)
        with torch.inference_mode(), counters[0] as flops, counters[1] as parameters:
            step.run(body)
        return flops.get_total_flops(), parameters.read

    model = tiny_model()
    costs(model, 1)  # ComfyUI's first steps
    plain, whole = costs(model, 1), costs(guide("SEG", model), 1)
    held = costs(guide("SEG", model, every=4), 4)
    assert whole[0] > plain[0]
    assert held[0] == whole[0] + 3 * plain[0]
    assert held[1] == whole[1] + 3 * plain[1]
