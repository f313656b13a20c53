"""Together with other nodes: each keeps its own effect, and the smoothed pass sees all of them."""

from __future__ import annotations

import math

import comfy.hooks
import comfy.samplers
import comfy.sd
import node_helpers
import nodes
import pytest
import torch
from host_models import (
    conditioning,
    core_node,
    counted_calls,
    noise_like,
    sample,
    seg,
    shared_model,
    tiny_controlnet,
    tiny_lora,
    tiny_model,
    with_controlnet,
)
from host_oracle import blur_map, deviation, deviation_of_node

SIZE = (8, 12)
LARGEST = 1e-6


def agrees(model=None, **options):
    options = {"sigma": 1.3, "size": SIZE} | options
    found = deviation_of_node(shared_model() if model is None else model, **options)
    assert found <= LARGEST, found


# Conditionings


def combined(*conds):
    return [entry for cond in conds for entry in cond]


def area(seed, rows, columns, top, left, strength=1.0):
    """A conditioning for a part of the image, in latent cells."""
    return core_node("nodes", "ConditioningSetArea", conditioning(seed), columns * 8, rows * 8,
                     left * 8, top * 8, strength)  # fmt: skip


def masked(seed, strength=1.0, bounds="default"):
    mask = torch.zeros(1, SIZE[0] * 8, SIZE[1] * 8)
    mask[:, 8 * 2 : 8 * 7, 8 * 3 :] = 1.0
    return core_node("nodes", "ConditioningSetMask", conditioning(seed), mask, bounds, strength)


def ranged(seed, start, end):
    return core_node("nodes", "ConditioningSetTimestepRange", conditioning(seed), start, end)


POSITIVES = {
    "several prompts": lambda: combined(conditioning(1), conditioning(3), conditioning(4)),
    "prompts of different length": lambda: combined(conditioning(1), conditioning(3, tokens=14)),
    "a mask": lambda: combined(conditioning(1), masked(3, 0.8)),
    "only a mask": lambda: masked(3),
    "timestep ranges": lambda: combined(ranged(1, 0.0, 0.5), ranged(3, 0.5, 1.0)),
    "a prompt that ends": lambda: combined(conditioning(1), ranged(3, 0.0, 0.3)),
}


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("positive", POSITIVES.values(), ids=POSITIVES)
def test_conditioning_is_guided_as_by_the_dense_reference(positive, reuse):
    agrees(positive=positive(), steps=3, batch=2, node={"reuse": reuse}, visible=1e-5)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("sigma", [math.inf, 1.3])
def test_area_is_smoothed_on_its_own_grid(sigma, reuse):
    """An area is a smaller image to the network, so the smoothing of each has its own grid."""
    model = shared_model()
    whole, part = conditioning(1), area(3, 6, 4, 2, 8)
    seen = []

    def watch(args):
        seen.append(args)
        return args["denoised"]

    def watched(m):
        m = m.clone()
        m.set_model_sampler_post_cfg_function(watch)
        return m

    def effect(positive, size, noise):
        seen.clear()
        guided = watched(seg(watched(model), 1.0, sigma, reuse=reuse))
        sample(guided, positive=positive, size=size, noise=noise, steps=1, cfg=1.0)
        return seen[1]["denoised"] - seen[0]["denoised"]

    # An area at strength 1 over the whole image's cond: outside, the cond's effect alone remains.
    noise = noise_like((1, 4, *SIZE))
    both = effect(combined(whole, part), SIZE, noise)
    alone = effect(whole, SIZE, noise)
    torch.testing.assert_close(both[..., :2, :], alone[..., :2, :], rtol=1e-4, atol=1e-4)
    assert deviation(both[..., 3:, 9:], alone[..., 3:, 9:]) > 1e-3
    only = effect(core_node("nodes", "ConditioningSetArea", conditioning(3), 32, 48, 64, 16, 1.0),
                  SIZE, noise)  # fmt: skip
    assert torch.isfinite(only).all()
    inside = only[..., 2:8, 8:12]
    crop = noise[..., 2:8, 8:12].clone()
    # The pooled prompt carries the image's size, so it is said to be the whole image's.
    sized = node_helpers.conditioning_set_values(
        conditioning(3), {"width": SIZE[1] * 8, "height": SIZE[0] * 8}
    )
    expected = effect(sized, (6, 4), crop)
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["positive", "negative"])
def test_prompt_that_is_inactive_changes_nothing_of_the_extra_pass(where):
    model = shared_model()
    options = {where: ranged(1, 0.0, 0.4)}
    found = sample(seg(model), steps=4, **options)
    assert torch.isfinite(found).all()
    agrees(steps=4, **options)


def test_steps_without_any_active_prompt_are_plain():
    model = shared_model()
    positive = ranged(1, 0.0, 0.0)
    with counted_calls(model) as calls:
        found = sample(seg(model), positive=positive, steps=4, cfg=1.0)
    assert torch.isfinite(found).all()
    assert len(calls) <= 2


def test_inpainting_is_guided_and_leaves_the_rest_of_the_latent_alone():
    latent = noise_like((1, 4, *SIZE), 5)
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., 3:7, 2:9] = 1.0
    agrees(latent=latent, noise_mask=mask, denoise=0.8, steps=3)
    found = sample(seg(shared_model()), latent=latent, noise_mask=mask, size=SIZE, steps=3)
    outside = (mask == 0).expand_as(found)
    torch.testing.assert_close(found[outside], latent[outside], rtol=1e-4, atol=1e-4)


def test_inpainting_nodes_of_the_host_are_guided():
    latent = {"samples": noise_like((1, 4, *SIZE), 5)}
    mask = torch.zeros(1, SIZE[0] * 8, SIZE[1] * 8)
    mask[:, 24:56, 16:72] = 1.0
    latent = core_node("nodes", "SetLatentNoiseMask", latent, mask)

    def run(model, size):
        with torch.inference_mode():
            return nodes.KSampler().sample(
                model, 3, 2, 4.0, "euler", "normal", conditioning(1), conditioning(2), latent, 0.7
            )[0]["samples"]

    agrees(run=run)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_image_of_a_batch_is_what_it_is_alone(batch):
    model = seg(shared_model(), sigma=1.3)
    noise = noise_like((batch, 4, *SIZE), 8)
    together = sample(model, noise=noise, latent=torch.zeros_like(noise))
    for i in range(batch):
        alone = sample(model, noise=noise[i : i + 1], latent=torch.zeros(1, 4, *SIZE))
        assert deviation(together[i : i + 1], alone) <= LARGEST
    agrees(batch=batch)


@pytest.mark.parametrize("free_memory", ["for the skips", "too little for the skips"])
@pytest.mark.parametrize("branch", ["conditional", "unconditional", "free"])
def test_chunks_split_by_low_memory_give_the_same_result(monkeypatch, branch, free_memory):
    model = tiny_model("sdxl", dtype=torch.float64)
    guided = seg(model, sigma=1.3, branch=branch)
    options = {"batch": 2, "positive": combined(conditioning(1), conditioning(3)), "steps": 2}
    expected = sample(guided, **options)
    least = 0 if free_memory == "for the skips" else 1e30
    monkeypatch.setattr(
        model.model, "memory_required", lambda shape, **_: least if shape[0] <= 2 else 1e30
    )
    with counted_calls(model) as calls:
        found = sample(guided, **options)
    assert set(calls) == {2}
    assert deviation(found, expected) <= LARGEST


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform", "batched"])
def test_context_windows_give_what_the_dense_reference_gives(schedule):
    def windows(model):
        return core_node(
            "comfy_extras.nodes_context_windows", "ContextWindowsManualNode", model, 3, 1, schedule,
            1, False, "pyramid", 0, False,
        )  # fmt: skip

    agrees(batch=5, after=windows, size=(6, 4), steps=2)
    agrees(batch=5, before=windows, size=(6, 4), steps=2, node={"reuse": False})


# ControlNet, LoRA, hooks


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_controlnet_steers_the_extra_pass_too(kind, cfg, reuse):
    positive, negative = with_controlnet(
        conditioning(1), conditioning(2), tiny_controlnet(kind), strength=0.8, size=SIZE
    )
    agrees(
        shared_model(kind), positive=positive, negative=negative, cfg=cfg, batch=2,
        node={"reuse": reuse},
    )  # fmt: skip
    plain = sample(shared_model(kind), size=SIZE, cfg=cfg)
    steered = sample(shared_model(kind), size=SIZE, cfg=cfg, positive=positive, negative=negative)
    assert deviation(plain, steered) > 1e-3


def test_controlnet_that_ends_and_a_second_one_steer_the_extra_pass_too():
    control, second = tiny_controlnet(), tiny_controlnet(seed=51)
    conds = with_controlnet(conditioning(1), conditioning(2), control, end=0.5, size=SIZE)
    positive, negative = with_controlnet(*conds, second, strength=0.5, size=SIZE)
    agrees(positive=positive, negative=negative, steps=4)


def test_controlnet_on_one_of_two_prompts_steers_the_extra_pass_too():
    positive, negative = with_controlnet(
        conditioning(1), conditioning(2), tiny_controlnet(), size=SIZE
    )
    agrees(positive=combined(positive, conditioning(3)), negative=negative)


@pytest.mark.parametrize("part", ["middle_block", "input_blocks", "output_blocks"])
def test_lora_changes_the_extra_pass_too(part):
    model = shared_model()
    tuned = comfy.sd.load_lora_for_models(model, None, tiny_lora(model, part), 1.0, 0.0)[0]
    assert deviation(sample(tuned, size=SIZE), sample(model, size=SIZE)) > 1e-4
    agrees(tuned)
    agrees(before=lambda m: m, after=lambda m: comfy.sd.load_lora_for_models(
        m, None, tiny_lora(model, part), 1.0, 0.0)[0])  # fmt: skip


def hooked(model, cond, *, keyframes=(), part="middle_block", seed=70):
    group = comfy.hooks.create_hook_lora(tiny_lora(model, part, seed=seed), 1.0, 0.0)
    if keyframes:
        frames = comfy.hooks.HookKeyframeGroup()
        for strength, start in keyframes:
            frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        group.set_keyframes_on_hooks(frames)
    return core_node("comfy_extras.nodes_hooks", "ConditioningSetProperties", cond, 1.0, "default",
                     hooks=group)  # fmt: skip


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("keyframes", [(), ((1.0, 0.0), (0.2, 0.4), (0.0, 0.8))])
@pytest.mark.parametrize("part", ["middle_block", "input_blocks"])
def test_hooks_of_a_prompt_change_its_extra_pass_alone(part, keyframes, reuse):
    model = tiny_model("sdxl", dtype=torch.float64)
    positive = combined(
        hooked(model, conditioning(1), keyframes=keyframes, part=part), conditioning(3)
    )
    options = {"size": SIZE, "steps": 3}
    without = sample(model, positive=combined(conditioning(1), conditioning(3)), **options)
    assert deviation(sample(model, positive=positive, **options), without) > 1e-4
    agrees(model, positive=positive, steps=3, node={"reuse": reuse})


def test_different_hooks_on_both_prompts_change_their_own_passes():
    model = tiny_model("sdxl", dtype=torch.float64)
    positive = hooked(model, conditioning(1), part="input_blocks")
    negative = hooked(model, conditioning(2), seed=71, keyframes=((0.5, 0.0), (1.0, 0.5)))
    for branch, side in (("conditional", "cond"), ("unconditional", "uncond")):
        agrees(model, positive=positive, negative=negative, steps=3, node={"branch": branch},
               dense={"side": side})  # fmt: skip


# Attention: overrides, precision, patches of other nodes


def with_options(model, **options):
    model = model.clone()
    model.model_options["transformer_options"] |= options
    return model


@pytest.mark.parametrize("sigma", [math.inf, 1.3])
def test_attention_override_is_called_for_smoothed_blocks_with_what_the_host_passes(sigma):
    calls = []

    def override(attention, query, key, value, heads, *args, **kwargs):
        options = dict(kwargs["transformer_options"])  # the host goes on writing to it
        calls.append((query, key, options, kwargs.keys(), kwargs.get("attn_precision")))
        return attention(query, key, value, heads, *args, **kwargs)

    model = shared_model("sd15")
    watched = with_options(model, optimized_attention_override=override, my_own_key="mine")
    found = sample(seg(watched, sigma=sigma, reuse=False), size=SIZE, steps=1, cfg=1.0)
    assert deviation(found, sample(seg(model, sigma=sigma), size=SIZE, steps=1, cfg=1.0)) <= LARGEST
    assert len(calls) == 2 * (len(calls) // 2) > 0
    main, extra = calls[: len(calls) // 2], calls[len(calls) // 2 :]
    middle = [
        i for i, (query, key, options, *_) in enumerate(main)
        if options["block"] == ("middle", 0) and query.shape == key.shape
    ]  # fmt: skip
    assert len(middle) == 1
    for (*_, ours, names, precision), (*_, theirs, same_names, same) in zip(
        main, extra, strict=True
    ):
        assert ours["my_own_key"] == theirs["my_own_key"] == "mine"
        assert ours["block"] == theirs["block"]
        assert (names, precision) == (same_names, same)
    blur = blur_map(4, 6, sigma)
    expected = torch.einsum("qt,btd->bqd", blur, main[middle[0]][0])
    torch.testing.assert_close(extra[middle[0]][0], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sigma", [math.inf, 1.3])
def test_attention_precision_of_the_model_holds_in_smoothed_blocks(sigma):
    model = tiny_model("sd15", dtype=torch.float32, attn_precision=torch.float32)
    precisions = []

    def override(attention, *args, **kwargs):
        precisions.append(kwargs.get("attn_precision"))
        return attention(*args, **kwargs)

    watched = with_options(model, optimized_attention_override=override)
    sample(seg(watched, sigma=sigma, reuse=False), size=SIZE, steps=1, cfg=1.0)
    assert set(precisions) == {torch.float32}


@pytest.mark.parametrize("sigma", [math.inf, 1.3])
@pytest.mark.parametrize("place", [("middle", 0), ("middle", 0, 0)])
def test_replacement_of_another_node_is_called_with_smoothed_queries(place, sigma):
    queries = []

    def replace(query, key, value, extra_options):
        queries.append(query)
        return 0.5 * value + 0.5 * query

    model = shared_model("sd15").clone()
    for patched in (seg(model, sigma=sigma), None):
        queries.clear()
        if patched is None:  # the other order of the nodes
            model.set_model_attn1_replace(replace, *place)
            patched = seg(model, sigma=sigma)
        else:
            patched.set_model_attn1_replace(replace, *place)
        found = sample(patched, size=SIZE, steps=1, cfg=1.0)
        main, smoothed = queries[0].chunk(2)  # of one call
        expected = torch.einsum("qt,btd->bqd", blur_map(4, 6, sigma), main)
        torch.testing.assert_close(smoothed, expected, rtol=1e-7, atol=1e-9)
        plain = model.clone()
        plain.set_model_attn1_replace(replace, *place)
        assert deviation(found, sample(plain, size=SIZE, steps=1, cfg=1.0)) > 1e-4


def test_patches_of_other_nodes_are_still_run_in_the_extra_pass():
    ran = []

    def patch(query, context, value, extra_options):
        ran.append(("in", extra_options["block"], query.shape[1]))
        return query * 1.1, context * 0.9, value

    def out(h, extra_options):
        ran.append(("out", extra_options["block"], h.shape[1]))
        return h * 1.2

    def others(model):
        model = model.clone()
        model.set_model_attn1_patch(patch)
        model.set_model_attn1_output_patch(out)
        model.set_model_attn2_patch(lambda q, k, v, _: (q, k * 1.3, v))
        return model

    agrees(before=others)
    agrees(after=others)
    agrees(before=others, sigma=math.inf)
    ran.clear()
    sample(others(seg(shared_model(), reuse=False)), size=SIZE, steps=1, cfg=1.0)
    assert ran[: len(ran) // 2] == ran[len(ran) // 2 :]


def test_block_patches_of_other_nodes_act_in_the_extra_pass():
    def others(model):
        model = model.clone()
        model.set_model_input_block_patch(lambda h, _: h * 1.05)
        model.set_model_output_block_patch(lambda h, skip, _: (h * 0.97, skip * 1.04))
        return model

    for reuse in (True, False):
        agrees(before=others, node={"reuse": reuse})


def deep_shrink(model):
    return core_node("comfy_extras.nodes_model_downscale", "PatchModelAddDownscale", model, 1, 2.0,
                     0.0, 1.0, True, "bicubic", "bicubic")  # fmt: skip


def test_deep_shrink_s_smaller_grid_is_smoothed_as_it_is():
    # Halved once more by the other node: the middle grid is 4 times smaller than the latent.
    agrees(shared_model("sd15"), size=(12, 16), after=deep_shrink, dense={"level": 2})


# Other guidance of the host


def effect(model, **options):
    return sample(model, size=(12, 12), steps=1, cfg=4.0, **options)


def sag(model):
    return core_node("comfy_extras.nodes_sag", "SelfAttentionGuidance", model, 0.7, 2.0)


def pag(model):
    return core_node("comfy_extras.nodes_pag", "PerturbedAttentionGuidance", model, 2.0)


@pytest.mark.parametrize("order", ["ours first", "ours last"])
@pytest.mark.parametrize("other", [sag, pag])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("sigma", [math.inf, 1.3])
def test_effects_of_two_guidance_nodes_add_up(kind, other, order, sigma):
    model = shared_model(kind)
    ours = seg(model, sigma=sigma)
    both = other(ours) if order == "ours first" else seg(other(model), sigma=sigma)
    plain, theirs, mine, together = map(effect, (model, other(model), ours, both))
    if other is sag:
        # Core SAG changes plain CFG's guided part too: it blends cfg with nothing of its own.
        assert deviation(theirs, plain) > 1e-4
    assert deviation(mine, plain) > 1e-3
    assert deviation(together, plain + (theirs - plain) + (mine - plain)) <= 5e-6


def test_guidance_beside_two_others_adds_its_own_effect():
    model = shared_model("sd15")
    plain = effect(model)
    ours = effect(seg(model)) - plain
    # On one block of one layer the host's own two get in each other's way; ours in neither's.
    theirs = effect(pag(sag(model)))
    for order in (pag(sag(seg(model))), pag(seg(sag(model))), seg(pag(sag(model)))):
        assert deviation(effect(order), theirs + ours) <= 5e-6


# HyperTile and token merging


def hyper_tile(model, depth=1, swap=1):
    return core_node("comfy_extras.nodes_hypertile", "HyperTile", model, 32, swap, depth, False)


def merged(ratio):
    return lambda m: core_node("comfy_extras.nodes_tomesd", "TomePatchModel", m, ratio)


def smoothed_first(model, blur, block, scale=3.0):
    """Guide by hand: blur the tokens of one block before any patch of another node sees them."""

    def guide(args):
        def smooth(query, context, value, extra_options):
            if extra_options["block"] == block:
                query = torch.einsum("qt,btd->bqd", blur, query)
            return query, context, value

        options = args["model_options"].copy()
        inner = options["transformer_options"].copy()
        patches = inner.get("patches", {})
        inner["patches"] = patches | {"attn1_patch": [smooth, *patches.get("attn1_patch", ())]}
        options["transformer_options"] = inner
        (smoothed,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], options
        )
        return args["denoised"] + scale * (args["cond_denoised"] - smoothed)

    guided = model.clone()
    guided.set_model_sampler_post_cfg_function(guide)
    return guided


@pytest.mark.parametrize("sigma", [math.inf, 1.3])
@pytest.mark.parametrize("order", ["before", "after"])
def test_hyper_tile_that_reaches_the_smoothed_block_cuts_the_smoothed_queries(order, sigma):
    # 8x8 tokens in tiles of 4x4, always the same ones.
    model, options = shared_model("sd15"), {"size": (16, 16), "steps": 1}
    blur = blur_map(8, 8, sigma)
    if order == "before":
        ours, theirs = seg(hyper_tile(model), sigma=sigma), hyper_tile(model)
        theirs = smoothed_first(theirs, blur, ("middle", 0))
    else:
        ours = hyper_tile(seg(model, sigma=sigma))
        theirs = hyper_tile(smoothed_first(model, blur, ("middle", 0)))
    tiles = []

    def watch(query, key, value, extra_options):
        tiles.append(query.shape)
        return query

    assert deviation(sample(ours, **options), sample(theirs, **options)) <= LARGEST
    assert deviation(sample(ours, **options), sample(hyper_tile(model), **options)) > 1e-4
    watched = ours.clone()
    watched.set_model_attn1_replace(watch, "middle", 0)
    sample(watched, cfg=1.0, **options)
    assert tiles == [(8, 16, 64)], "four tiles each of the plain and of the smoothed rows"


@pytest.mark.parametrize("sigma", [math.inf, 1.3])
@pytest.mark.parametrize("order", ["before", "after"])
def test_merging_of_tokens_works_on_the_smoothed_queries(order, sigma, monkeypatch):
    # The one random draw of the merging node, which tokens survive, is made the same each time.
    draw = torch.zeros
    monkeypatch.setattr(torch, "randint", lambda high, size, device=None: draw(size).long())
    model, options = shared_model("sd15"), {"size": (8, 10), "steps": 1}
    blur, merge = blur_map(8, 10, sigma), merged(0.4)
    if order == "before":
        ours = seg(merge(model), sigma=sigma, blocks="d0")
        theirs = smoothed_first(merge(model), blur, ("input", 1))
    else:
        ours = merge(seg(model, sigma=sigma, blocks="d0"))
        theirs = merge(smoothed_first(model, blur, ("input", 1)))
    assert deviation(sample(merge(model), **options), sample(model, **options)) > 1e-4
    assert deviation(sample(ours, **options), sample(theirs, **options)) <= LARGEST


@pytest.mark.parametrize("sigma", [math.inf, 1.3])
@pytest.mark.parametrize("order", ["before", "after"])
def test_hyper_tile_with_random_tiles_runs(order, sigma):
    model = shared_model("sd15", torch.float32)
    for size in ((16, 16), (16, 24)):
        guided = (
            hyper_tile(seg(model, sigma=sigma, blocks="middle, d0"), swap=3)
            if order == "after"
            else seg(hyper_tile(model, swap=3), sigma=sigma, blocks="middle, d0")
        )
        torch.manual_seed(0)
        assert torch.isfinite(sample(guided, size=size)).all()


@pytest.mark.parametrize("order", ["before", "after"])
def test_merging_no_tokens_changes_nothing(order):
    agrees(shared_model("sd15"), **{order: merged(0.0)})
    model = shared_model("sd15")
    guided = merged(0.0)(seg(model)) if order == "after" else seg(merged(0.0)(model))
    assert torch.equal(sample(guided, size=SIZE), sample(seg(model), size=SIZE))


def test_smoothing_sees_all_tokens_when_another_node_drops_some():
    def halve(query, context, value, extra_options):
        return query[:, ::2], context, value

    model = shared_model("sd15").clone()
    model.set_model_attn1_patch(halve)
    model.set_model_attn1_output_patch(lambda h, _: h.repeat_interleave(2, dim=1))
    # First in line, the smoothing sees all tokens.
    assert torch.isfinite(sample(seg(model, sigma=1.3), size=SIZE, steps=1)).all()
