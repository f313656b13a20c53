"""Beside nodes that ComfyUI ships: one call where it is exact, and refusals by name."""

from __future__ import annotations

import functools
import importlib
import re

import comfy.samplers
import pytest
import torch
from choice import each, pairs
from host_models import core_node, seg, shared_model
from neighbours import WRAPPERS, wrapped
from reuse_checks import both, difference, exact_model, outcome, require_equal, require_reference

REUSE = (True, False)
ORDERS = ("before", "after")
ACTS = 1e-3


def in_order(order, node, build=shared_model):
    """Return what `both` takes for another node before or after ours."""
    if order == "before":
        return {"build": lambda: node(build())}
    return {"build": build, "around": node}


# Nodes that change the network the same way in each pass.


@functools.cache
def wide_model():
    """Four levels, so that FreeU finds the widths it looks for; clone it, never change it."""
    return exact_model(
        channel_mult=[1, 2, 4], num_res_blocks=[1, 1, 1], transformer_depth=[0, 1, 1],
        transformer_depth_output=[0, 0, 1, 1, 1, 1],
    )  # fmt: skip


def shipped(module, name, *widgets):
    return lambda model: core_node(f"comfy_extras.{module}", name, model, *widgets)


def deep_shrink(after_skip, block=2):
    return shipped("nodes_model_downscale", "PatchModelAddDownscale", block, 2.0, 0.0, 0.6,
                   after_skip, "bicubic", "bicubic")  # fmt: skip


STEADY = {
    "FreeU": shipped("nodes_freelunch", "FreeU", 1.3, 1.4, 0.9, 0.2),
    "FreeU_V2": shipped("nodes_freelunch", "FreeU_V2", 1.3, 1.4, 0.9, 0.2),
    "Deep Shrink after the skip": deep_shrink(True),
    "Deep Shrink before the skip": deep_shrink(False),
    "PAG": shipped("nodes_pag", "PerturbedAttentionGuidance", 2.0),
    "SAG": shipped("nodes_sag", "SelfAttentionGuidance", 0.5, 2.0),
}


@pytest.mark.parametrize(*each(name=STEADY, order=ORDERS, blocks=["middle", "u1"], cfg=[7.0, 1.0]))
def test_nodes_that_change_every_pass_alike(name, order, blocks, cfg):
    settings = {"size": (16, 16), "cfg": cfg}
    on, off = both(**in_order(order, STEADY[name], wide_model), options={"blocks": blocks},
                   **settings)  # fmt: skip
    assert (on.shared, on.reasons) == (3, set())
    require_equal(on, off)
    bare = outcome(seg(wide_model(), blocks=blocks), **settings)
    assert difference(on.latents, bare.latents) > ACTS or (name, cfg) == ("SAG", 1.0)


@pytest.mark.parametrize("reuse", REUSE)
def test_the_smaller_grid_of_deep_shrink_is_smoothed_as_it_is(reuse):
    # Halved once more by the other node: the middle grid is 4 times smaller than the latent.
    shrink = shipped("nodes_model_downscale", "PatchModelAddDownscale", 1, 2.0, 0.0, 1.0, True,
                     "bicubic", "bicubic")  # fmt: skip
    require_reference(
        shared_model("sd15"), size=(12, 16), after=shrink, dense={"level": 2}, reuse=reuse
    )


# Nodes that cut the tokens of a block, or merge some of them, by a random draw in each call.

CUTTING = {
    "ToMe": lambda deep: shipped("nodes_tomesd", "TomePatchModel", 0.4),
    "HyperTile": lambda deep: shipped("nodes_hypertile", "HyperTile", 32, 4, int(deep), False),
}


@pytest.fixture
def fixed_draws(monkeypatch):
    """Let both nodes draw the same in each call."""

    def draw(high, size, low=0, device=None, **_):
        return torch.full(size, min(low + 1, high - 1), device=device)

    monkeypatch.setattr(torch, "randint", draw)
    hypertile = importlib.import_module("comfy_extras.nodes_hypertile")
    monkeypatch.setattr(hypertile, "randint", lambda low, high, size: draw(high, size, low))


@pytest.mark.usefixtures("fixed_draws")
@pytest.mark.parametrize(*pairs(name=CUTTING, order=ORDERS, reuse=REUSE, cfg=[7.0, 1.0]))
def test_nodes_that_cut_tokens_elsewhere_act_in_the_extra_pass_too(name, order, reuse, cfg):
    require_reference(
        shared_model("sd15"), size=(16, 16), reuse=reuse, cfg=cfg, **{order: CUTTING[name](False)}
    )


@pytest.mark.usefixtures("fixed_draws")
@pytest.mark.parametrize(*pairs(name=CUTTING, order=ORDERS, sigma=[float("inf"), 1.3]))
def test_in_a_smoothed_block_they_are_refused_by_name_or_change_both_predictions(
    name, order, sigma
):
    node = in_order(order, CUTTING[name](True), lambda: shared_model("sd15"))
    refusal = None
    try:
        on, off = both(**node, options={"blocks": "d0", "sigma": sigma}, size=(16, 16))
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert re.search(r"block d0.*HyperTile or ToMe", refusal)
        return
    require_equal(on, off)
    assert difference(on.latents, outcome(shared_model("sd15"), size=(16, 16)).latents) > ACTS


@pytest.mark.parametrize(*each(name=CUTTING, order=ORDERS, reuse=REUSE))
def test_with_draws_of_their_own_they_run(name, order, reuse):
    node = CUTTING[name](False)
    guided = functools.partial(seg, blocks="middle", reuse=reuse)
    model = shared_model("sd15", torch.float32)
    model = guided(node(model)) if order == "before" else node(guided(model))
    for size in ((16, 16), (16, 24)):
        assert torch.isfinite(outcome(model, size=size, steps=2).latents).all()


# Caches of whole steps.


@pytest.mark.parametrize(
    *pairs(name=["EasyCacheNode", "LazyCacheNode"], order=ORDERS, cfg=[7.0, 1.0])
)
def test_caches_of_steps(name, order, cfg):
    # The threshold at which it answers wherever it may.
    cached = shipped("nodes_easycache", name, 3.0, 0.2, 0.9, False)
    plain = outcome(cached(shared_model()), cfg=cfg, steps=6)
    conds = 1 + (cfg > 1)
    evaluated = plain.evaluated["output", 0] // conds
    assert evaluated < 6, "some steps come from the cache"
    on, off = both(**in_order(order, cached), cfg=cfg, steps=6)
    assert on.shared > 0
    assert not on.full
    rows = evaluated * (conds + 1)
    assert on.evaluated["output", 0] == rows, "so does their part of the guidance"
    assert off.evaluated["output", 0] == rows
    require_equal(on, off, bitwise=True)
    assert difference(on.latents, plain.latents) > ACTS


# Context windows.


@pytest.mark.parametrize(
    *each(
        schedule=["standard_static", "standard_uniform", "batched"], order=ORDERS, reuse=REUSE,
        fuse=["pyramid", "relative"], cfg=[7.0, 1.0],
    )
)  # fmt: skip
def test_context_windows_are_guided_window_by_window(schedule, order, reuse, fuse, cfg):
    windows = shipped("nodes_context_windows", "ContextWindowsManualNode", 3, 1, schedule, 1, False,
                      fuse, 0, False)  # fmt: skip
    require_reference(batch=5, size=(6, 4), cfg=cfg, reuse=reuse, **{order: windows})


# What other nodes may do to a step or a call.


def fresh_patches(executor, model, conds, x, timestep, options):
    """Install a patch made anew for each batch of conds, as some nodes do."""
    transformer_options = dict(options["transformer_options"])
    patches = dict(transformer_options.get("patches", {}))
    patches["attn2_patch"] = [lambda q, k, v, extra: (q, k * 1.1, v)]
    transformer_options["patches"] = patches
    return executor(
        model, conds, x, timestep, {**options, "transformer_options": transformer_options}
    )


def a_patch_at_first(executor, x, timestep, options, seed):
    if timestep[0] >= 5.0:
        inner = dict(options["transformer_options"])
        inner["patches"] = {"attn2_patch": [lambda q, k, v, extra: (q, k, 1.1 * v)]}
        options = {**options, "transformer_options": inner}
    return executor(x, timestep, options, seed)


def own_batches(model):
    def evaluate(args):
        options = dict(args["model_options"])
        del options["sampler_calc_cond_batch_function"]
        return comfy.samplers.calc_cond_batch(
            args["model"], args["conds"], args["input"], args["sigma"], options
        )

    model = model.clone()
    model.model_options["sampler_calc_cond_batch_function"] = evaluate
    return model


DIFFERENT = {
    "another latent": wrapped(
        WRAPPERS.PREDICT_NOISE, lambda executor, x, *rest: executor(1.01 * x, *rest)
    ),
    "patches made anew": wrapped(WRAPPERS.CALC_COND_BATCH, fresh_patches),
    "a patch that goes": wrapped(WRAPPERS.PREDICT_NOISE, a_patch_at_first),
    "an evaluation of its own": own_batches,
}


@pytest.mark.parametrize(*each(name=DIFFERENT, cfg=[7.0, 1.0], batch=[1, 2]))
def test_what_others_do_to_a_call_is_done_to_the_rows_that_join_it(name, cfg, batch):
    settings = {"cfg": cfg, "batch": batch, "steps": 4}
    on, off = both(around=DIFFERENT[name], **settings)
    assert on.shared > 0
    require_equal(on, off)
    plain = outcome(DIFFERENT[name](shared_model()), **settings).latents
    assert difference(plain, outcome(shared_model(), **settings).latents) > ACTS or "own" in name
    assert difference(on.latents, plain) > ACTS


def test_a_network_answered_for_in_the_plain_call_is_so_in_the_perturbed_one():
    kept = {}

    def cache(executor, x, *rest, **kwargs):
        """Answer every second call of each cond, the perturbed ones included."""
        options = rest[-1] if isinstance(rest[-1], dict) else kwargs["transformer_options"]
        key = tuple(options["uuids"])
        if key in kept:
            return kept.pop(key)
        kept[key] = executor(x, *rest, **kwargs)
        return kept[key].clone()

    def around(model):
        kept.clear()
        return wrapped(WRAPPERS.DIFFUSION_MODEL, cache)(model)

    on, off = both(around=around, steps=4)
    assert (on.shared, on.reasons) == (2, set())
    require_equal(on, off)
