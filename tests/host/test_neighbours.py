"""A good guest: guidance beside the kinds of things that other packs do, before and after it.

What a perturbation that changes nothing pushes, and what one call and whole passes differ by, is
what guidance gets wrong beside them.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import re
from pathlib import Path

import comfy.model_patcher
import pytest
import torch
from choice import each, pairs
from dit_models import available, sample_dit, tiny_dit
from dit_oracle import float64_rotary, shape_of
from family_oracle import guide
from host_models import conditioning, noise_like, seg, shared_model
from neighbours import KINDS, ActsThroughOptions, cache_around_blocks, cache_in_a_closure
from reuse_checks import (
    control_net,
    controlled_pair,
    difference,
    exact_model,
    outcome,
    require_equal,
    sampled_by,
)

NOTHING = 1e-6
ACTS = 1e-3
CFGS = (7.0, 1.0)
REUSE = (True, False)
ORDERS = ("before", "after")
SIDES = ("conditional", "unconditional")
WITHOUT_EFFECT = (
    "wrappers dropped", "functions in conditions", "two evaluations in a step",
    "tangential damping", "adaptive projected guidance",
)  # fmt: skip

pag = functools.partial(guide, "PAG")
still = functools.partial(pag, scale=3.0, strength=1e-12)
METHODS = {
    "SEG": functools.partial(seg, sigma=2.0),
    "TPG": functools.partial(guide, "TPG", scale=3.0),
    "SLG": functools.partial(guide, "SLG", scale=3.0, blocks="d0.1,m0"),
    "heads": functools.partial(pag, scale=3.0, blocks="m0:h1-2"),
}


def run(model, kind="", **settings):
    """Return what came of a run; beside caches it is long enough for them to answer."""
    steps = 6 if "cache" in kind else 3
    return outcome(model, **{"size": (8, 12), "steps": steps, **settings})


def beside(kind, order, guided):
    """Return a guided model with a neighbour before or after our node."""
    neighbour = KINDS[kind]
    # Caches inside of a network keep what they know there: each run has a network of its own.
    model = exact_model() if kind == "a cache inside the network" else shared_model()
    return guided(neighbour(model)) if order == "before" else neighbour(guided(model))


@functools.cache
def alone(kind, cfg=7.0):
    """Return the latents beside a neighbour without guidance."""
    return run(beside(kind, "before", lambda model: model), kind, cfg=cfg).latents


@functools.cache
def plain(cfg, steps):
    return outcome(shared_model(), size=(8, 12), cfg=cfg, steps=steps).latents


@pytest.mark.floor
@pytest.mark.parametrize("cfg", CFGS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_acts_by_itself(kind, cfg):
    steps = 6 if "cache" in kind else 3
    acts = difference(alone(kind, cfg), plain(cfg, steps)) > ACTS
    assert acts or kind in WITHOUT_EFFECT


@pytest.mark.parametrize(
    *pairs(
        lambda cfg, side, **_: cfg > 1 or side == "conditional",
        kind=KINDS, cfg=CFGS, order=ORDERS, side=SIDES, reuse=REUSE,
    )
)  # fmt: skip
def test_a_perturbation_that_changes_nothing_pushes_nothing(kind, cfg, order, side, reuse):
    guided = functools.partial(still, branch=side, reuse=reuse)
    found = run(beside(kind, order, guided), kind, cfg=cfg).latents
    assert difference(found, alone(kind, cfg)) <= NOTHING


@pytest.mark.parametrize(*each(kind=KINDS, order=ORDERS, side=SIDES))
def test_a_blur_of_the_input_that_changes_nothing_pushes_nothing(kind, order, side):
    guided = functools.partial(
        guide, "SAG", scale=0.5, blur_sigma=1e-3, branch=side, mask="everywhere"
    )
    found = run(beside(kind, order, guided), kind).latents
    assert difference(found, alone(kind)) <= NOTHING


@pytest.mark.parametrize(*each(place=list(itertools.product(KINDS, ORDERS)), method=METHODS))
def test_one_call_beside_it_gives_what_whole_passes_give(place, method):
    one, whole = (
        run(beside(*place, functools.partial(METHODS[method], reuse=reuse)), place[0])
        for reuse in REUSE
    )
    require_equal(one, whole)
    assert difference(one.latents, alone(place[0])) > ACTS, "it acts"


def test_the_table_of_neighbours_has_a_row_for_each():
    page = Path(__file__).resolve().parents[2] / "docs" / "neighbours.md"
    first, *_ = page.read_text(encoding="utf-8").split("\n## ")
    rows = re.findall(r"^\| ([^|]+) \|", first, re.MULTILINE)
    assert rows[0] == "Kind"
    assert rows[1:] == list(KINDS)


# Caches, each of which answers both predictions or neither.


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_inside_the_network_remembers_each_prediction_by_itself(method):
    """As if the perturbed prediction had a network, and a cache, of its own."""
    kind = "a cache inside the network"

    def first(model, seen):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(
            lambda args: seen.append(args["cond_denoised"]) or args["denoised"]
        )
        return model

    seen = []
    model = first(beside(kind, "after", METHODS[method]), seen)
    found = run(model, kind, cfg=1.0).latents
    assert difference(found, alone(kind, 1.0)) > ACTS
    assert set(vars(model.model.diffusion_model)["known"]) == {0}, "the plain prediction's alone"
    run(first(beside(kind, "after", lambda model: model), seen), kind, cfg=1.0)
    assert difference(seen[0], seen[6]) <= NOTHING


@pytest.mark.parametrize(*each(cfg=[4.0, 1.0], blocks=["double.1", "single.1"]))
def test_a_cache_around_the_blocks_answers_both_predictions_or_neither(blocks, cfg):
    def sampled(guided):
        state = {}
        model = cache_around_blocks(guided(tiny_dit("flux", dtype=torch.float64)), state)
        with float64_rotary():
            latents = sample_dit(model, "flux", shape_of("flux", (3, 4)), cfg=cfg, steps=5)
        return latents, state["hits"]

    unguided, hits = sampled(lambda m: m)
    assert hits == 2
    assert difference(sampled(lambda m: still(m, blocks=blocks))[0], unguided) <= NOTHING
    assert difference(sampled(lambda m: seg(m, blocks=blocks))[0], unguided) > ACTS


@pytest.mark.parametrize("cfg", CFGS)
def test_a_cache_in_a_closure_answers_both_predictions_or_neither(cfg, caplog):
    def sampled(guided):
        state = {}
        model = cache_in_a_closure(guided(shared_model()), state)
        latents = run(model, "cache", cfg=cfg).latents
        assert state["hits"] > 1
        return latents

    nothing = sampled(functools.partial(still, scale=1e-9))
    assert difference(sampled(still), nothing) <= NOTHING
    assert difference(sampled(seg), nothing) > ACTS
    assert "has no effect" not in caplog.text


# Attention that is made of both sides of cfg.

NAG = KINDS["attention made of both sides"]


@pytest.mark.parametrize(
    *each(
        lambda cfg, side, **_: cfg > 1 or side == "conditional",
        kind=[kind for kind in ("flux", "chroma", "krea2") if available(kind)],
        cfg=[4.0, 1.0], side=SIDES, reuse=REUSE, order=ORDERS,
    )
)  # fmt: skip
def test_attention_made_of_both_sides_of_a_transformer(kind, cfg, side, reuse, order):
    model = tiny_dit(kind, dtype=torch.float64)

    def sampled(model):
        with float64_rotary():
            return sample_dit(model, kind, shape_of(kind, (3, 4), batch=2), cfg=cfg)

    unguided = sampled(NAG(model))
    assert difference(unguided, sampled(model)) > ACTS
    guided = functools.partial(still, branch=side, reuse=reuse)
    found = guided(NAG(model)) if order == "before" else NAG(guided(model))
    assert difference(sampled(found), unguided) <= NOTHING
    one, whole = (sampled(NAG(pag(seg(model, sigma=1.0, reuse=on), 3.0, reuse=on))) for on in REUSE)
    assert difference(one, whole) <= NOTHING
    assert difference(one, unguided) > ACTS


@pytest.mark.parametrize("controlled", [False, True])
def test_several_prompts_and_perturbations_beside_attention_made_of_both_sides(controlled):
    positive = conditioning(1, area=(8, 6, 0, 0)) + conditioning(3)
    negative = conditioning(2)
    if controlled:
        positive, negative = controlled_pair(positive, negative, control_net()[0], size=(8, 12))
    settings = {"positive": positive, "negative": negative}
    model = shared_model()
    unguided = run(NAG(model), **settings).latents
    found = []
    for reuse in REUSE:
        nothing = seg(still(model, reuse=reuse), sigma=1e-3, reuse=reuse)
        assert difference(run(NAG(nothing), **settings).latents, unguided) <= NOTHING
        found.append(run(NAG(pag(seg(model, reuse=reuse), 3.0, reuse=reuse)), **settings))
    require_equal(*found)
    assert difference(found[0].latents, unguided) > ACTS


# Prompts of unusual kinds.


@pytest.mark.parametrize(*each(reuse=REUSE, side=SIDES))
def test_conds_on_three_sides_under_a_nested_guider(reuse, side):
    def sampled(model):
        module = importlib.import_module("comfy_extras.nodes_custom_sampler")
        guider = module.Guider_DualCFG(model)
        guider.set_conds(conditioning(1), conditioning(3), conditioning(2))
        guider.set_cfg(4.0, 3.0)
        return sampled_by(guider, model)

    reads = KINDS["effects by side"](shared_model())
    found = sampled(still(reads, branch=side, reuse=reuse))
    assert difference(found, sampled(reads)) <= NOTHING


class Objects(torch.nn.Module):
    """As GLIGEN: objects at places of the image, for as many rows as the prompt has."""

    def set_position(self, shape, params, device):
        places = noise_like((shape[0], 1, 1), 9).to(device) + params[0]
        return lambda x, extra: x + 0.3 * places.to(x.dtype) * (len(x) == len(places) or 1 / 0)

    def set_empty(self, shape, device):
        return self.set_position(shape, [0.0], device)


def with_objects():
    cpu = torch.device("cpu")
    gligen = comfy.model_patcher.ModelPatcher(Objects(), load_device=cpu, offload_device=cpu)
    return conditioning(1, gligen=("position", gligen, [1.0])), conditioning(2)


def with_control_through_options():
    return [
        [[e, {**v, "control": ActsThroughOptions()}] for e, v in conditioning(s)] for s in (1, 2)
    ]


@pytest.mark.parametrize(
    *pairs(prompts=[with_objects, with_control_through_options], cfg=CFGS, reuse=REUSE)
)
def test_prompts_that_act_on_the_network_act_on_both_predictions(prompts, cfg, reuse):
    positive, negative = prompts()
    settings = {"positive": positive, "negative": negative, "cfg": cfg, "batch": 2}
    model = shared_model()
    unguided = run(model, **settings).latents
    assert difference(unguided, run(model, cfg=cfg, batch=2).latents) > ACTS
    assert difference(run(still(model, reuse=reuse), **settings).latents, unguided) <= NOTHING
    one, whole = (run(seg(model, reuse=on), **settings) for on in REUSE)
    require_equal(one, whole)
    assert difference(one.latents, unguided) > ACTS
