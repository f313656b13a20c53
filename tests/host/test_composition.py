"""Together with other nodes: each keeps its own effect, and the perturbed pass sees all of them."""

from __future__ import annotations

import contextlib
import functools
import math

import comfy.hooks
import comfy.sd
import pytest
import torch
from choice import each
from dit_models import sampled, shape_of
from dit_oracle import CORE, exact_model
from host_models import conditioning, core_node, sample, seg, shared_model, tiny_lora, tiny_model
from host_oracle import blur_map, deviation, guided_by_hand
from no_op import nothing
from reuse_checks import ROUNDING, require_reference
from stand_ins import attention_override, context_windows, patched, shipped

SIZE = (8, 12)
LARGEST = 1e-6
REUSE = (True, False)
ORDERS = ("before", "after")
SIGMAS = (math.inf, 1.3)


# LoRA and hooks


@pytest.mark.parametrize(
    *each(part=["middle_block", "input_blocks", "output_blocks"], order=ORDERS, reuse=REUSE)
)
def test_lora_changes_the_extra_pass_too(part, order, reuse):
    model = shared_model()

    def tune(model):
        return comfy.sd.load_lora_for_models(model, None, tiny_lora(model, part), 1.0, 0.0)[0]

    assert deviation(sample(tune(model), size=SIZE), sample(model, size=SIZE)) > 1e-4
    require_reference(model, reuse=reuse, **{order: tune})


def hooked(model, cond, *, keyframes=(), part="middle_block", seed=70):
    group = comfy.hooks.create_hook_lora(tiny_lora(model, part, seed=seed), 1.0, 0.0)
    if keyframes:
        frames = comfy.hooks.HookKeyframeGroup()
        for strength, start in keyframes:
            frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        group.set_keyframes_on_hooks(frames)
    return core_node("comfy_extras.nodes_hooks", "ConditioningSetProperties", cond, 1.0, "default",
                     hooks=group)  # fmt: skip


KEYFRAMES = ((), ((1.0, 0.0), (0.2, 0.4), (0.0, 0.8)))


@pytest.mark.parametrize(
    *each(
        lambda cfg, branch, **_: cfg > 1 or branch == "conditional",
        part=["middle_block", "input_blocks"], keyframes=KEYFRAMES, reuse=REUSE, cfg=[7.0, 1.0],
        branch=["conditional", "unconditional"],
    )
)  # fmt: skip
def test_hooks_change_the_extra_passes_of_their_own_prompts(part, keyframes, reuse, cfg, branch):
    model = tiny_model(dtype=torch.float64)
    bare = conditioning(1) + conditioning(3)
    positive = hooked(model, conditioning(1), keyframes=keyframes, part=part) + conditioning(3)
    negative = hooked(model, conditioning(2), seed=71, keyframes=((0.5, 0.0), (1.0, 0.5)))
    options = {"size": SIZE, "steps": 3, "cfg": cfg}
    assert deviation(*(sample(model, positive=p, **options) for p in (positive, bare))) > 1e-4
    require_reference(
        model, positive=positive, negative=negative, reuse=reuse, node={"branch": branch},
        dense={"side": branch.removesuffix("itional")}, **options,
    )  # fmt: skip


# Attention: overrides, replacements, patches of other nodes


@pytest.mark.parametrize("sigma", SIGMAS)
def test_an_attention_override_sees_the_smoothed_queries_and_what_the_host_passes(sigma):
    calls = []

    @attention_override
    def override(attention, query, key, value, heads, *args, **kwargs):
        block = kwargs["transformer_options"]["block"]
        calls.append((query, block, kwargs["attn_precision"], kwargs.keys()))
        return attention(query, key, value, heads, *args, **kwargs)

    model = tiny_model("sd15", dtype=torch.float64, attn_precision=torch.float32)
    options = {"size": SIZE, "steps": 1, "cfg": 1.0}
    found = sample(seg(override(model), sigma=sigma, reuse=False), **options)
    assert deviation(found, sample(seg(model, sigma=sigma), **options)) <= 1e-5
    plain, extra = calls[: len(calls) // 2], calls[len(calls) // 2 :]
    assert [rest for _, *rest in plain] == [rest for _, *rest in extra]
    assert {precision for _, _, precision, _ in calls} == {torch.float32}
    (one, *_), (smoothed, *_) = (
        [query for query, block, *_ in half if block == ("middle", 0)] for half in (plain, extra)
    )
    expected = torch.einsum("qt,btd->bqd", blur_map(4, 6, sigma), one)
    expected = expected[:, : smoothed.shape[1]]  # one query may stand for all equal ones
    torch.testing.assert_close(smoothed, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    *each(sigma=SIGMAS, place=[("middle", 0), ("middle", 0, 0)], order=ORDERS, reuse=REUSE)
)
def test_a_replacement_of_another_node_is_called_with_smoothed_queries(sigma, place, order, reuse):
    by_hand = []  # not empty while the reference makes its worse prediction

    @patched("attn1_replace", *place)
    def replaced(query, key, value, extra):
        if by_hand:
            query = torch.einsum("qt,btd->bqd", blur_map(4, 6, sigma), query)
        return 0.5 * value + 0.5 * query

    @contextlib.contextmanager
    def smoothed(step, _options):
        by_hand.append(step)
        yield
        by_hand.clear()

    model, options = shared_model("sd15"), {"size": SIZE, "steps": 2, "cfg": 1.0}
    expected = sample(guided_by_hand(replaced(model), smoothed, 3.0), **options)
    assert deviation(expected, sample(replaced(model), **options)) > 1e-4
    guided = functools.partial(seg, sigma=sigma, reuse=reuse)
    model = guided(replaced(model)) if order == "before" else replaced(guided(model))
    assert deviation(sample(model, **options), expected) <= LARGEST


def attention_patches(model):
    model = patched("attn1_patch")(lambda q, k, v, _: (q * 1.1, k * 0.9, v))(model)
    model = patched("attn1_output_patch")(lambda h, _: h * 1.2)(model)
    return patched("attn2_patch")(lambda q, k, v, _: (q, k * 1.3, v))(model)


def block_patches(model):
    model = patched("input_block_patch")(lambda h, _: h * 1.05)(model)
    return patched("output_block_patch")(lambda h, skip, _: (h * 0.97, skip * 1.04))(model)


@pytest.mark.parametrize(
    *each(patches=[attention_patches, block_patches], order=ORDERS, sigma=SIGMAS, reuse=REUSE)
)
def test_patches_of_other_nodes_act_in_the_extra_pass(patches, order, sigma, reuse):
    require_reference(sigma=sigma, reuse=reuse, **{order: patches})


# Transformers


@pytest.mark.parametrize(*each(kind=CORE, order=ORDERS, reuse=REUSE))
def test_an_override_of_another_node_acts_on_both_predictions(kind, order, reuse):
    @attention_override
    def override(func, query, *args, **kwargs):
        return func(0.5 * query, *args, **kwargs)

    model = exact_model(kind)
    plain = sampled(override(model), kind)
    still = functools.partial(nothing, reuse=reuse)
    for guided in (still, functools.partial(seg, sigma=1.3, reuse=reuse)):
        both = guided(override(model)) if order == "before" else override(guided(model))
        pushed = deviation(sampled(both, kind), plain)
        assert pushed <= 1e-4 if guided is still else pushed > 1e-3


def test_a_replacement_of_another_node_runs_inside_ours():
    plain = sampled(seg(exact_model("flux"), blocks="double.1"), "flux")
    model, seen = exact_model("flux"), []

    def replacement(args, extra):
        seen.append(args["img"].shape)
        return extra["original_block"](args)

    for block in (("double_block", 0), ("double_block", 1), ("single_block", 0)):
        model = patched("patch_replace", "dit", *block)(replacement)(model)
    assert deviation(sampled(seg(model, blocks="double.1"), "flux"), plain) <= ROUNDING
    assert seen


def test_a_window_counts_in_a_shifted_schedule_wherever_the_node_that_shifts_it_stands():
    model, guided = exact_model("sd3"), functools.partial(seg, start=0.3, end=0.6)
    shifted = shipped("model_advanced", "ModelSamplingSD3", 7.0)
    before, after = guided(shifted(model)), shifted(guided(model))
    before, after, unshifted = (sampled(m, "sd3", steps=4) for m in (before, after, guided(model)))
    assert torch.equal(before, after)
    assert deviation(before, unshifted) > 1e-3


def test_context_windows_of_a_video():
    model, shape = context_windows(exact_model("wan"), axis=2), shape_of("wan", (2, 3), frames=7)
    one, whole = (sampled(seg(model, reuse=reuse), "wan", shape) for reuse in REUSE)
    assert torch.isfinite(one).all()
    assert deviation(one, whole) <= ROUNDING


def test_guide_frames_of_ltx_video_keep_their_queries():
    seen = []

    @attention_override
    def spy(func, *args, **kwargs):
        seen.append(args[0].clone())
        return func(*args, **kwargs)

    guides = {
        "keyframe_idxs": torch.zeros(1, 3, 12, 2),
        "concat_mask": torch.ones(1, 1, 3, 3, 4),
    }
    guided = seg(spy(exact_model("ltxv")), blocks="1", reuse=False)
    sampled(guided, "ltxv", shape=(1, 128, 3, 3, 4), steps=1, cfg=1.0, cond=guides)
    plain, smoothed = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    changed = (plain[2] - smoothed[2]).abs().amax(-1)[0]
    assert (changed[:24] > 0).all()
    assert (changed[24:] == 0).all()
