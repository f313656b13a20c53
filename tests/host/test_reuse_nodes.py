"""Reuse beside other nodes on the same model: shared where it is exact, a whole pass elsewhere."""

from __future__ import annotations

import functools
import importlib
import threading

import comfy.hooks
import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import pytest
import torch
from host_models import COMMON, PACK, conditioning, noise_like, sample, seg
from neighbours import in_pieces, regrouped
from reuse_checks import (
    both,
    core_node,
    difference,
    exact_model,
    outcome,
    reported,
    require_effect,
    require_equal,
    require_shared,
)

WRAPPERS = comfy.patcher_extension.WrappersMP
FREEU = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
SHRINK = {
    "downscale_factor": 2.0,
    "start_percent": 0.0,
    "end_percent": 0.6,
    "downscale_method": "bicubic",
    "upscale_method": "bicubic",
}


def wide_model(kind="sdxl"):
    """Four levels, so that FreeU finds the widths it looks for."""
    deep = {
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [1, 1, 1],
        "transformer_depth": [0, 1, 1],
        "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    }
    return exact_model(kind, **deep)


def before(node, *args, **widgets):
    return lambda: core_node(*node, wide_model(), *args, **widgets)


# Nodes that change the network the same way in each pass.

STEADY = {
    "FreeU": (("nodes_freelunch", "FreeU"), FREEU),
    "FreeU_V2": (("nodes_freelunch", "FreeU_V2"), FREEU),
    "Deep Shrink after the skip": (
        ("nodes_model_downscale", "PatchModelAddDownscale"),
        {**SHRINK, "block_number": 2, "downscale_after_skip": True},
    ),
    "Deep Shrink before the skip": (
        ("nodes_model_downscale", "PatchModelAddDownscale"),
        {**SHRINK, "block_number": 2, "downscale_after_skip": False},
    ),
    "PAG": (("nodes_pag", "PerturbedAttentionGuidance"), {"scale": 2.0}),
    "SAG": (("nodes_sag", "SelfAttentionGuidance"), {"scale": 0.5, "blur_sigma": 2.0}),
}


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize(
    ("order", "blocks"), [("before", "middle"), ("before", "u1"), ("after", "middle")]
)
def test_nodes_that_change_every_pass_alike(name, order, blocks):
    node, widgets = STEADY[name]
    settings = {"size": (16, 16), "options": {"blocks": blocks}}
    if order == "before":
        on, off = both(before(node, **widgets), **settings)
    else:
        around = lambda model: core_node(*node, model, **widgets)  # noqa: E731
        on, off = both(wide_model, around=around, **settings)
    require_shared(on, off, passes=3)
    require_equal(on, off)


@pytest.mark.parametrize("name", ["FreeU_V2", "PAG", "Deep Shrink before the skip"])
def test_nodes_that_change_every_pass_alike_at_cfg_1(name):
    node, widgets = STEADY[name]
    on, off = both(before(node, **widgets), cfg=1.0, size=(16, 16), batch=2)
    require_shared(on, off, passes=3)
    require_equal(on, off, bitwise=True)


# Nodes that draw random numbers in each pass: reuse repeats the plain pass's draw for the blocks
# before the fork, a whole pass draws anew. What can be tested: the plain part of the pass is the
# plain pass's own, and with the draws fixed both are the same.


RANDOM = {
    "ToMe": (("nodes_tomesd", "TomePatchModel"), {"ratio": 0.4}, "torch.randint"),
    "HyperTile": (
        ("nodes_hypertile", "HyperTile"),
        {"tile_size": 32, "swap_size": 4, "max_depth": 1, "scale_depth": False},
        "randint",
    ),
}


def tall_model():
    """Attention at the first level, which is where ToMe and HyperTile act."""
    return exact_model("sd15")


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize(
    ("order", "blocks"), [("before", "middle"), ("before", "d1"), ("after", "u0")]
)
def test_nodes_that_draw_for_each_pass_agree_where_they_draw_the_same(
    monkeypatch, name, order, blocks
):
    node, widgets, _ = RANDOM[name]
    fixed = lambda high, *_a, size, low=0, device=None, **_k: torch.full(  # noqa: E731
        size, min(low + 1, high - 1), device=device
    )
    monkeypatch.setattr(torch, "randint", lambda high, size, **k: fixed(high, size=size, **k))
    hypertile = importlib.import_module("comfy_extras.nodes_hypertile")
    monkeypatch.setattr(
        hypertile, "randint", lambda low, high, size: fixed(high, low=low, size=size)
    )
    on_model = lambda model: core_node(*node, model, **widgets)  # noqa: E731
    if order == "before":
        build, around = lambda: on_model(tall_model()), lambda model: model
    else:
        build, around = tall_model, on_model
    on, off = both(build, around=around, size=(16, 16), options={"blocks": blocks})
    require_shared(on, off, passes=3)
    require_equal(on, off)
    plain = lambda: seg(tall_model(), blocks=blocks)  # noqa: E731
    require_effect(plain, than=on, size=(16, 16))


def test_a_pass_that_draws_anew_differs_and_a_shared_one_has_less_noise():
    # A blur so weak that the guidance ought to be next to nothing: what is left is the draw.
    build = lambda: core_node("nodes_tomesd", "TomePatchModel", tall_model(), ratio=0.4)  # noqa: E731
    on, off = both(build, size=(16, 16), options={"blocks": "u0", "sigma": 0.6})
    plain = outcome(build(), size=(16, 16))
    assert on.shared == 3
    assert difference(on.latents, plain.latents) < difference(off.latents, plain.latents)


# Caches of whole steps.


@pytest.mark.parametrize(("order", "cfg"), [("before", 7.0), ("before", 1.0), ("after", 7.0)])
@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
def test_caches_of_steps(name, order, cfg):
    threshold = 3.0  # answers from the cache wherever it may
    widgets = {"reuse_threshold": threshold, "start_percent": 0.2, "end_percent": 0.9}
    on_model = lambda m: core_node("nodes_easycache", name, m, **widgets, verbose=False)  # noqa: E731
    build = (lambda: on_model(exact_model())) if order == "before" else exact_model
    around = on_model if order == "after" else lambda model: model
    on, off = both(build, around=around, cfg=cfg, steps=6)
    cached = lambda: on_model(exact_model())  # noqa: E731
    plain = outcome(cached(), cfg=cfg, steps=6)
    assert plain.evaluated["output", 0] < 6 * (1 + (cfg > 1)), "some steps come from the cache"
    assert on.shared > 0
    assert not on.full
    rows = plain.evaluated["output", 0] // (1 + (cfg > 1)) * (2 + (cfg > 1))
    assert on.evaluated["output", 0] == rows, "so does their part of the guidance"
    assert off.evaluated["output", 0] == rows
    require_equal(on, off, bitwise=True)
    require_effect(cached, than=on, cfg=cfg, steps=6)


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_a_perturbation_that_changes_nothing_pushes_nothing_beside_a_cache(cfg):
    """Both predictions come from the cache, or neither does."""
    widgets = {"reuse_threshold": 3.0, "start_percent": 0.2, "end_percent": 0.9, "verbose": False}
    cached = core_node("nodes_easycache", "EasyCacheNode", exact_model(), **widgets)
    plain = outcome(cached, cfg=cfg, steps=6)
    pag = importlib.import_module(PACK + ".nodes.pag").SEGuidancePAG
    for reuse in (True, False):
        model = pag.execute(cached, 3.0, 0.0, 1.0, strength=1e-12, reuse=reuse)[0]
        assert difference(outcome(model, cfg=cfg, steps=6).latents, plain.latents) < 1e-5


# torch.compile, by the mechanism of ComfyUI's TorchCompileModel node.


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_not_recorded_and_the_perturbed_pass_is_whole():
    torch._dynamo.reset()
    helpers = importlib.import_module("comfy_api.torch_helpers")
    node = importlib.import_module("comfy_extras.nodes_torch_compile")
    one_level = {"num_res_blocks": [1], "channel_mult": [1]}
    depths = {"transformer_depth": [0], "transformer_depth_output": [0, 0]}
    bare = exact_model("sd15", **one_level, **depths)
    compiled = bare.clone()
    # As the node TorchCompileModel does, with the fastest backend there is for a test.
    guards = {"guard_filter_fn": node.skip_torch_compile_dict}
    helpers.set_torch_compile_wrapper(model=compiled, backend="eager", options=guards)

    def compile_after(model):
        key = "torch.compile"
        for wrapper in compiled.get_wrappers(WRAPPERS.APPLY_MODEL, key):
            model.add_wrapper_with_key(WRAPPERS.APPLY_MODEL, key, wrapper)
        return model

    settings = {"cfg": 1.0, "steps": 3}
    off = outcome(seg(compiled, reuse=False), **settings)
    for model in (seg(compiled), compile_after(seg(bare))):
        on = outcome(model, **settings)
        assert on.full == {"the model is compiled": 3}
        require_equal(on, off, bitwise=True)
    eager = outcome(seg(bare), **settings)
    assert difference(on.latents, eager.latents) < 1e-4, "guidance acts as without compilation"
    require_effect(lambda: bare, than=on, **settings)


# Context windows.


def windowed(model, **changes):
    widgets = {
        "context_length": 2,
        "context_overlap": 1,
        "context_schedule": "standard_static",
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "pyramid",
        "dim": 0,
        "freenoise": False,
    }
    name = "ContextWindowsManualNode"
    return core_node("nodes_context_windows", name, model, **widgets | changes)


@pytest.mark.parametrize(
    ("order", "cfg", "fuse"),
    [
        ("before", 7.0, "pyramid"),
        ("before", 1.0, "relative"),
        ("after", 7.0, "relative"),
    ],
)
def test_context_windows_are_shared_window_by_window(order, cfg, fuse):
    on_model = lambda model: windowed(model, fuse_method=fuse)  # noqa: E731
    build = (lambda: on_model(exact_model())) if order == "before" else exact_model
    around = on_model if order == "after" else lambda model: model
    on, off = both(build, around=around, batch=4, cfg=cfg)
    require_shared(on, off, passes=9)  # 3 windows of 2 out of 4
    require_equal(on, off, bitwise=cfg == 1.0)


def test_context_windows_with_two_nodes_and_several_conds():
    def guided(model, reuse):
        return seg(seg(model, 2.0, reuse=reuse), 1.0, 1.5, blocks="u1", reuse=reuse)

    on, off = both(
        guided=guided,
        around=windowed,
        batch=3,
        positive=conditioning(1) + conditioning(3),
    )
    require_shared(on, off)
    require_equal(on, off)


# LoRA, and hooks that change weights for one cond.


@functools.cache
def _weights():
    return dict(exact_model().model.diffusion_model.named_parameters())


def lora(seed=0, strength=0.5):
    weights = {}
    state = _weights()
    names = (
        "input_blocks.3.1.transformer_blocks.0.attn1.to_q",
        "middle_block.1.transformer_blocks.0.attn1.to_v",
        "middle_block.1.transformer_blocks.1.ff.net.2",
    )
    for index, name in enumerate(names):
        out, inner = state[f"{name}.weight"].shape
        key = f"diffusion_model.{name}"
        weights[f"{key}.lora_up.weight"] = strength * noise_like((out, 4), seed + index)
        weights[f"{key}.lora_down.weight"] = noise_like((4, inner), 9 + seed + index) / inner**0.5
    return weights


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_lora(order, cfg):
    on_model = lambda model: comfy.sd.load_lora_for_models(model, None, lora(), 1.0, 0.0)[0]  # noqa: E731
    build = (lambda: on_model(exact_model())) if order == "before" else exact_model
    around = on_model if order == "after" else lambda model: model
    on, off = both(build, around=around, cfg=cfg)
    require_shared(on, off, passes=3)
    require_equal(on, off, bitwise=cfg == 1.0)
    require_effect(lambda: seg(exact_model()), than=on, cfg=cfg)


def hooked(seed, *, keyframes=(), of=0):
    hooks = comfy.hooks.create_hook_lora(lora(of), 1.0, 0.0)
    if keyframes:
        group = comfy.hooks.HookKeyframeGroup()
        for strength, start in keyframes:
            group.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        hooks.set_keyframes_on_hooks(group)
    return comfy.hooks.set_hooks_for_conditioning(conditioning(seed), hooks)


HOOKED = {
    "positive": (lambda: hooked(1), lambda: conditioning(2)),
    "keyframes": (
        lambda: hooked(1, keyframes=((0.2, 0.0), (1.0, 0.4), (0.5, 0.7))),
        lambda: conditioning(2),
    ),
    "two loras": (lambda: hooked(1) + hooked(3, of=5), lambda: conditioning(2)),
    "both sides": (
        lambda: hooked(1, keyframes=((1.0, 0.0), (0.0, 0.5))),
        lambda: hooked(2, of=5),
    ),
}


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_hooks_that_change_weights_for_a_cond(name, cfg):
    positive, negative = HOOKED[name]
    on, off = both(positive=positive, negative=negative, cfg=cfg, steps=4)
    require_shared(on, off)
    require_equal(on, off, bitwise=cfg == 1.0)
    plain = outcome(seg(exact_model()), cfg=cfg, steps=4)
    assert difference(on.latents, plain.latents) > 1e-3, "the hooks act"


# Guiders that name or order their conds in their own way.


@pytest.mark.parametrize("nested", [False, True])
def test_a_guider_of_three_conds_shares_from_the_first_step(nested, comfy_host):
    module = importlib.import_module("comfy_extras.nodes_custom_sampler")

    def run(model):
        guider = module.Guider_DualCFG(model)
        guider.set_conds(conditioning(1), conditioning(3), conditioning(2))
        guider.set_cfg(4.0, 3.0, nested=nested)
        sigmas = comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), "normal", 3
        )
        latent = torch.zeros(1, 4, 8, 8)
        with torch.inference_mode():
            sampler = comfy.samplers.sampler_object("euler")
            return guider.sample(noise_like(latent.shape), latent, sampler, sigmas)

    with reported() as reports:
        on = run(seg(exact_model()))
        off = run(seg(exact_model(), reuse=False))
    assert difference(on, off) < 1e-5
    report, _ = reports[0]
    shared, reasons = sum(report.shared.values()), {reason for _, reason in report.full}
    if comfy_host.version >= (0, 17):
        assert shared == 3
        assert not reasons


# What other nodes may do to a step, and the reason that the report then gives.


def wrapped(kind, wrapper):
    def around(model):
        model.add_wrapper_with_key(kind, "test", wrapper)
        return model

    return around


def fresh_patches(executor, model, conds, x, timestep, options):
    """Install a patch made anew for each batch of conds, as some nodes do."""
    transformer_options = dict(options["transformer_options"])
    patches = dict(transformer_options.get("patches", {}))
    patches["attn2_patch"] = [lambda q, k, v, extra: (q, k * 1.1, v)]
    transformer_options["patches"] = patches
    return executor(
        model, conds, x, timestep, {**options, "transformer_options": transformer_options}
    )


def own_batches(args):
    return comfy.samplers.calc_cond_batch(
        args["model"], args["conds"], args["input"], args["sigma"],
        {k: v for k, v in args["model_options"].items() if k != "sampler_calc_cond_batch_function"},
    )  # fmt: skip


def with_own_batches(model):
    model.model_options["sampler_calc_cond_batch_function"] = own_batches
    return model


DIFFERENT = {
    "another latent": wrapped(
        WRAPPERS.PREDICT_NOISE, lambda executor, x, *rest: executor(1.01 * x, *rest)
    ),
    "the latent in pieces": in_pieces,
    "patches made anew": wrapped(WRAPPERS.CALC_COND_BATCH, fresh_patches),
}


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_what_others_do_to_a_call_is_done_to_the_rows_that_join_it(name, cfg):
    on, off = both(around=DIFFERENT[name], cfg=cfg, batch=2)
    require_shared(on, off)
    require_equal(on, off)
    require_effect(lambda: DIFFERENT[name](exact_model()), than=on, cfg=cfg, batch=2)


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_rows_that_another_node_regroups_are_never_taken_for_a_cond_s_own(cfg):
    on, off = both(around=regrouped, cfg=cfg)
    require_equal(on, off)
    if cfg > 1:
        assert on.reasons == {"another node regroups the rows"}
        assert on.evaluated["output", 0] < 3 * (4 + 2 + 2), "no rows are made for nobody"
    require_effect(lambda: regrouped(exact_model()), than=on, cfg=cfg)


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_conds_that_another_node_evaluates_by_itself(cfg):
    on, off = both(around=with_own_batches, cfg=cfg, batch=2)
    require_shared(on, off)
    require_equal(on, off)
    require_effect(lambda: with_own_batches(exact_model()), than=on, cfg=cfg, batch=2)


def test_a_network_answered_for_in_the_main_pass_is_so_in_the_perturbed_one():
    kept = {}

    def cache(executor, x, *rest, **kwargs):
        options = rest[-1] if isinstance(rest[-1], dict) else kwargs["transformer_options"]
        key = tuple(options["uuids"])
        if key not in kept:
            kept[key] = executor(x, *rest, **kwargs)
            return kept[key]
        answer = kept.pop(key)
        return answer.clone()

    def around(model):
        kept.clear()
        model.add_wrapper_with_key(WRAPPERS.DIFFUSION_MODEL, "test", cache)
        return model

    on, off = both(around=around, steps=4)
    # The cache answers every second call of each cond, the perturbed ones included.
    assert on.shared == 2
    assert not on.full
    require_equal(on, off)


def test_a_patch_that_comes_and_goes_between_steps_does_not_disturb():
    def around(model):
        def wrapper(executor, x, timestep, options, seed):
            if timestep[0] < 5.0:
                return executor(x, timestep, options, seed)
            transformer_options = dict(options["transformer_options"])
            transformer_options["patches"] = {
                "attn2_patch": [lambda q, k, v, extra: (q, k, 1.1 * v)]
            }
            return executor(
                x, timestep, {**options, "transformer_options": transformer_options}, seed
            )

        model.add_wrapper_with_key(WRAPPERS.PREDICT_NOISE, "test", wrapper)
        return model

    on, off = both(around=around, steps=4)
    require_shared(on, off, passes=4)
    require_equal(on, off)


# Clones, threads, interruption, exceptions.


def test_clones_of_a_guided_model_are_guided_alike_and_apart():
    base = exact_model()
    guided = seg(base)
    first = outcome(guided.clone())
    other = seg(guided.clone(), 1.0, 1.0, blocks="u1")
    outcome(other)
    again = outcome(guided)
    assert torch.equal(first.latents, again.latents)
    assert first.shared == again.shared == 3
    plain = outcome(base)
    assert plain.shared == 0
    assert difference(plain.latents, first.latents) > 1e-3


def test_two_threads_on_two_clones():
    # One network each, as the clones of two devices have; ComfyUI hooks threads up that way.
    models = [seg(exact_model(seed=s), blocks=b) for s, b in ((0, "middle"), (1, "u1"))]
    alone = [sample(model, steps=3) for model in models]
    together = [None, None]

    def work(index):
        for _ in range(2):
            together[index] = sample(models[index], steps=3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


class Boom(RuntimeError):
    """What a test throws."""


def failing(model, error, *, at):
    """Make one block of the network fail in its n-th call."""
    calls = []

    def fail(_module, _args):
        calls.append(1)
        if len(calls) == at:
            raise error

    return model.model.diffusion_model.output_blocks[1][0].register_forward_pre_hook(fail)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize(
    "error", [Boom(), comfy.model_management.InterruptProcessingException()], ids=["error", "stop"]
)
def test_a_run_that_breaks_off_leaves_nothing_behind(at, error):
    model = seg(exact_model())
    right = sample(model, steps=3)
    options = (
        str(model.model_options.keys()),
        str(model.model_options["transformer_options"].keys()),
    )
    handle = failing(model, error, at=at)
    with pytest.raises(type(error)):
        sample(model, steps=3)
    handle.remove()
    now = str(model.model_options.keys()), str(model.model_options["transformer_options"].keys())
    assert now == options
    assert torch.equal(sample(model, steps=3), right)


def test_all_models_here_have_the_widths_that_freeu_looks_for():
    assert COMMON["model_channels"] == 32
    widths = {block[0].out_channels for block in wide_model().model.diffusion_model.output_blocks}
    assert {64, 128} <= widths
