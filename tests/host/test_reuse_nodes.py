"""Beside nodes that ComfyUI ships: one call where it is exact, and refusals by name."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from choice import each, pairs
from comfy.ldm.modules import attention
from comfy_extras import nodes_hypertile
from host_models import seg, shared_model, tiny_model
from host_oracle import deviation
from no_op import ACTS
from reuse_checks import both, outcome, require_equal, require_reference
from stand_ins import WRAPPERS, context_windows, patched, shipped, wrapped

REUSE = (True, False)
ORDERS = ("before", "after")


def in_order(order, node, build=shared_model):
    """Return what `both` takes for another node before or after ours."""
    if order == "before":
        return {"build": lambda: node(build())}
    return {"build": build, "around": node}


# Nodes that change the network the same way in each pass.


@functools.cache
def wide_model():
    """Four levels, so that FreeU finds the widths it looks for; clone it, never change it."""
    return tiny_model(
        dtype=torch.float64, channel_mult=[1, 2, 4], num_res_blocks=[1, 1, 1],
        transformer_depth=[0, 1, 1], transformer_depth_output=[0, 0, 1, 1, 1, 1],
    )  # fmt: skip


def deep_shrink(block, end, after_skip):
    return shipped("model_downscale", "PatchModelAddDownscale", block, 2.0, 0.0, end, after_skip,
                   "bicubic", "bicubic")  # fmt: skip


STEADY = {
    "FreeU": shipped("freelunch", "FreeU", 1.3, 1.4, 0.9, 0.2),
    "FreeU_V2": shipped("freelunch", "FreeU_V2", 1.3, 1.4, 0.9, 0.2),
    "Deep Shrink after the skip": deep_shrink(2, 0.6, True),
    "Deep Shrink before the skip": deep_shrink(2, 0.6, False),
}


@pytest.mark.parametrize(*each(name=STEADY, order=ORDERS, blocks=["middle", "u1"], cfg=[7.0, 1.0]))
def test_nodes_that_change_every_pass_alike(name, order, blocks, cfg):
    settings = {"size": (16, 16), "cfg": cfg}
    on, off = both(**in_order(order, STEADY[name], wide_model), options={"blocks": blocks},
                   **settings)  # fmt: skip
    assert (on.shared, on.reasons) == (3, set())
    require_equal(on, off)
    bare = outcome(seg(wide_model(), blocks=blocks), **settings)
    assert deviation(on.latents, bare.latents) > ACTS


@pytest.mark.parametrize("reuse", REUSE)
def test_the_smaller_grid_of_deep_shrink_is_smoothed_as_it_is(reuse):
    # Halved once more by the other node: the middle grid is 4 times smaller than the latent.
    require_reference(
        shared_model("sd15"), size=(12, 16), after=deep_shrink(1, 1.0, True), dense={"level": 2},
        reuse=reuse,
    )  # fmt: skip


# Nodes that cut the tokens of a block, or merge some of them, by a random draw in each call.

CUTTING = {
    "ToMe": lambda deep: shipped("tomesd", "TomePatchModel", 0.4),
    "HyperTile": lambda deep: shipped("hypertile", "HyperTile", 32, 4, int(deep), False),
}


@pytest.fixture
def fixed_draws(monkeypatch):
    """Let both nodes draw the same in each call."""

    def draw(high, size, low=0, device=None, **_):
        return torch.full(size, min(low + 1, high - 1), device=device)

    monkeypatch.setattr(torch, "randint", draw)
    monkeypatch.setattr(nodes_hypertile, "randint", lambda low, high, size: draw(high, size, low))


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
    try:
        on, off = both(**node, options={"blocks": "d0", "sigma": sigma}, size=(16, 16))
    except ValueError as error:
        if not re.search(r"block d0.*HyperTile or ToMe", str(error)):
            raise
        return
    require_equal(on, off)
    assert deviation(on.latents, outcome(shared_model("sd15"), size=(16, 16)).latents) > ACTS


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
    cached = shipped("easycache", name, 3.0, 0.2, 0.9, False)
    plain = outcome(cached(shared_model()), cfg=cfg, steps=6)
    conds = 1 + (cfg > 1)
    evaluated = plain.evaluated["output", 0] // conds
    assert evaluated < 6, "some steps come from the cache"
    on, off = both(**in_order(order, cached), cfg=cfg, steps=6)
    assert not on.full
    for found in (on, off):
        assert found.evaluated["output", 0] == evaluated * (conds + 1), "so does guidance"
    require_equal(on, off, bitwise=True)
    assert deviation(on.latents, plain.latents) > ACTS


# Context windows.


@pytest.mark.parametrize(
    *each(
        schedule=["standard_static", "standard_uniform", "batched"], order=ORDERS, reuse=REUSE,
        fuse=["pyramid", "relative"], cfg=[7.0, 1.0],
    )
)  # fmt: skip
def test_context_windows_are_guided_window_by_window(schedule, order, reuse, fuse, cfg):
    windows = functools.partial(context_windows, fuse=fuse, length=3, overlap=1, schedule=schedule)
    require_reference(batch=5, size=(6, 4), cfg=cfg, reuse=reuse, **{order: windows})


def attention_by_label(model):
    """As regional attention: a replacement that takes the rows of each label for themselves."""

    def replacement(q, k, v, extra):
        labels = extra["cond_or_uncond"]
        pieces = zip(labels, *(t.chunk(len(labels)) for t in (q, k, v)), strict=True)
        return torch.cat([
            attention.optimized_attention(q, k, (1.3 + label) * v, extra["n_heads"])
            for label, q, k, v in pieces
        ])  # fmt: skip

    for layer in (0, 1):
        model = patched("attn1_replace", "middle", 0, layer)(replacement)(model)
    return model


@pytest.mark.parametrize(*each(order=ORDERS, batch=[1, 2], blocks=["m0", "m0.0:h1"]))
def test_softened_attention_is_that_of_the_node_that_computes_it(order, batch, blocks):
    softened = functools.partial(seg, strength=0.4, blocks=blocks)
    on, off = both(guided=softened, **in_order(order, attention_by_label), batch=batch)
    assert on.shared > 0
    require_equal(on, off)


# What other nodes may do to a step or a call.


def with_a_patch(options):
    """Return a run's options with a patch made anew."""
    inner = dict(options["transformer_options"])
    inner["patches"] = {"attn2_patch": [lambda q, k, v, extra: (q, 1.1 * k, v)]}
    return {**options, "transformer_options": inner}


@wrapped(WRAPPERS.CALC_COND_BATCH)
def patches_made_anew(executor, model, conds, x, timestep, options):
    return executor(model, conds, x, timestep, with_a_patch(options))


@wrapped(WRAPPERS.PREDICT_NOISE)
def a_patch_at_first(executor, x, timestep, options, seed):
    options = with_a_patch(options) if timestep[0] >= 5.0 else options
    return executor(x, timestep, options, seed)


@pytest.mark.parametrize(
    *each(other=[patches_made_anew, a_patch_at_first], cfg=[7.0, 1.0], batch=[1, 2])
)
def test_what_others_do_to_a_call_is_done_to_the_rows_that_join_it(other, cfg, batch):
    settings = {"cfg": cfg, "batch": batch, "steps": 4}
    on, off = both(around=other, **settings)
    assert on.shared > 0
    require_equal(on, off)
    plain = outcome(other(shared_model()), **settings).latents
    assert deviation(plain, outcome(shared_model(), **settings).latents) > ACTS
    assert deviation(on.latents, plain) > ACTS
