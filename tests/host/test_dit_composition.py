"""Guidance of diffusion transformers beside the other nodes of a graph."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from choice import each
from dit_models import tiny_dit
from dit_oracle import CORE, OVERRIDE, sampled, shape_of
from family_oracle import guide
from host_models import core_node, seg
from host_oracle import deviation
from reuse_checks import ROUNDING

REUSE = (True, False)


@functools.cache
def model_of(kind):
    """Return a tiny model that tests share; clone it, never change it."""
    return tiny_dit(kind)


def latents(model, kind="flux", **options):
    return sampled(model, kind, **options)


@pytest.mark.parametrize(*each(kind=CORE, off=[{"sigma": 0.0}, {"scale": 0.0}], cfg=[4.0, 1.0]))
def test_no_blur_and_no_scale_are_bitwise_off(kind, off, cfg):
    model = model_of(kind)
    assert torch.equal(latents(seg(model, **off), kind, cfg=cfg), latents(model, kind, cfg=cfg))


@pytest.mark.parametrize(*each(kind=CORE, order=["before", "after"], reuse=REUSE))
def test_an_override_of_another_node_acts_on_both_predictions(kind, order, reuse):
    def half(func, query, *args, **kwargs):
        return func(0.5 * query, *args, **kwargs)

    def override(model):
        model = model.clone()
        model.model_options["transformer_options"][OVERRIDE] = half
        return model

    model = model_of(kind)
    plain = latents(override(model), kind)
    still = functools.partial(guide, "PAG", scale=3.0, strength=1e-12, reuse=reuse)
    for guided in (still, functools.partial(seg, sigma=1.3, reuse=reuse)):
        both = guided(override(model)) if order == "before" else override(guided(model))
        pushed = deviation(latents(both, kind), plain)
        assert pushed <= 1e-4 if guided is still else pushed > 1e-3


def test_a_replacement_of_another_node_runs_inside_ours():
    plain = latents(seg(model_of("flux"), blocks="double.1"))
    model, seen = model_of("flux").clone(), []

    def replacement(args, extra):
        seen.append(args["img"].shape)
        return extra["original_block"](args)

    for block in (("double_block", 0), ("double_block", 1), ("single_block", 0)):
        model.set_model_patch_replace(replacement, "dit", *block)
    assert deviation(latents(seg(model, blocks="double.1")), plain) <= ROUNDING
    assert seen


@pytest.mark.parametrize(*each(kind=["flux", "wan"], order=["before", "after"]))
def test_easy_cache_answers_both_predictions_or_neither(kind, order):
    def cached(model):
        return core_node("comfy_extras.nodes_easycache", "EasyCacheNode", model, 10.0, 0.0, 1.0,
                         False)  # fmt: skip

    model = model_of(kind)
    guided = cached(seg(model)) if order == "after" else seg(cached(model))
    plain, found = (latents(m, kind, steps=5) for m in (cached(model), guided))
    assert torch.isfinite(found).all()
    assert deviation(found, plain) > 1e-2


SHIFTS = {
    "sd3": ("ModelSamplingSD3", {"shift": 7.0}),
    "flux": (
        "ModelSamplingFlux", {"max_shift": 1.15, "base_shift": 0.5, "width": 512, "height": 512},
    ),
    "aura": ("ModelSamplingAuraFlow", {"shift": 5.0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHIFTS)
def test_flow_shift_nodes_before_and_after(kind):
    name, widgets = SHIFTS[kind]

    def shifted(model):
        return core_node("comfy_extras.nodes_model_advanced", name, model, **widgets)

    before = latents(seg(shifted(model_of(kind))), kind)
    assert torch.equal(before, latents(shifted(seg(model_of(kind))), kind))
    assert deviation(before, latents(seg(model_of(kind)), kind)) > 1e-3


def test_context_windows_of_a_video():
    windows = importlib.import_module("comfy_extras.nodes_context_windows")
    shape = shape_of("wan", (2, 3), frames=7)
    model = windows.WanContextWindowsManualNode.execute(
        model_of("wan"), 13, 4, "standard_static", 1, False, "pyramid", True, False
    )[0]
    one, whole = (latents(seg(model, reuse=reuse), "wan", shape=shape) for reuse in REUSE)
    assert torch.isfinite(one).all()
    assert deviation(one, whole) <= ROUNDING


def test_guide_frames_of_ltx_video_keep_their_queries():
    seen = []

    def spy(func, *args, **kwargs):
        seen.append(args[0].clone())
        return func(*args, **kwargs)

    model = model_of("ltxv").clone()
    model.model_options["transformer_options"][OVERRIDE] = spy
    guides = {
        "keyframe_idxs": torch.zeros(1, 3, 12, 2),
        "concat_mask": torch.ones(1, 1, 3, 3, 4),
    }
    guided = seg(model, blocks="1", reuse=False)
    latents(guided, "ltxv", shape=(1, 128, 3, 3, 4), steps=1, cfg=1.0, cond=guides)
    plain, smoothed = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    changed = (plain[2] - smoothed[2]).abs().amax(-1)[0]
    assert (changed[:24] > 0).all()
    assert (changed[24:] == 0).all()
