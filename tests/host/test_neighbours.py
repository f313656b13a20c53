"""A good guest: guidance beside the kinds of things that other packs do, before and after it.

What a perturbation that changes nothing pushes, and what one call and whole passes differ by, is
what guidance gets wrong beside them.
"""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import pytest
import torch
from choice import each, pairs
from dit_models import sampled
from dit_oracle import exact_model
from family_oracle import guide
from host_models import (
    conditioning,
    noise_like,
    patcher_of,
    sample,
    seg,
    shared_model,
    tiny_controlnet,
    tiny_model,
    with_controlnet,
)
from host_oracle import deviation
from neighbours import KINDS, ActsThroughOptions, cache_around_blocks, cache_in_a_closure
from no_op import ACTS, NOTHING, nothing
from reuse_checks import ROUNDING
from stand_ins import noted

CFGS = (7.0, 1.0)
REUSE = (True, False)
ORDERS = ("before", "after")
SIDES = ("conditional", "unconditional")
WITHOUT_EFFECT = (
    "wrappers dropped", "functions in conditions", "tangential damping",
    "adaptive projected guidance", "rows in another order",
    "rows in another order inside of the call",
)  # fmt: skip

pag = functools.partial(guide, "PAG", scale=3.0)
METHODS = {
    "SEG": functools.partial(seg, sigma=2.0),
    "TPG": functools.partial(guide, "TPG", scale=3.0),
    "SLG": functools.partial(guide, "SLG", scale=3.0, blocks="d0.1,m0"),
    "heads": functools.partial(pag, blocks="m0:h1-2"),
}


def run(model, kind="", **settings):
    """Return the latents of a run; beside caches it is long enough for them to answer."""
    torch.manual_seed(11)
    return sample(model, **{"size": (8, 12), "steps": 6 if "cache" in kind else 3, **settings})


def beside(kind, order, guided):
    """Return a guided model with a neighbour before or after our node."""
    neighbour = KINDS[kind]
    # Caches inside of a network keep what they know there: each run has a network of its own.
    own = kind == "a cache inside the network"
    model = tiny_model(dtype=torch.float64) if own else shared_model()
    return guided(neighbour(model)) if order == "before" else neighbour(guided(model))


@functools.cache
def alone(kind, cfg=7.0):
    """Return the latents beside a neighbour without guidance."""
    return run(beside(kind, "before", lambda model: model), kind, cfg=cfg)


@functools.cache
def plain(cfg, cache):
    return run(shared_model(), cache, cfg=cfg)


@pytest.mark.floor
@pytest.mark.parametrize("cfg", CFGS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_acts_by_itself(kind, cfg):
    unaffected = plain(cfg, "cache" if "cache" in kind else "")
    assert deviation(alone(kind, cfg), unaffected) > ACTS or kind in WITHOUT_EFFECT


STILL = {
    "an identity map": nothing,
    "a blur of the input": functools.partial(
        guide, "SAG", scale=0.1, blur_sigma=0.164, mask="everywhere"
    ),  # the narrowest blur that the node takes for one
}


@pytest.mark.parametrize(
    *pairs(
        lambda cfg, side, **_: cfg > 1 or side == "conditional",
        kind=KINDS, cfg=CFGS, order=ORDERS, side=SIDES, reuse=REUSE, still=STILL,
    )
)  # fmt: skip
def test_a_perturbation_that_changes_nothing_pushes_nothing(kind, cfg, order, side, reuse, still):
    guided = functools.partial(STILL[still], branch=side, reuse=reuse)
    found = run(beside(kind, order, guided), kind, cfg=cfg)
    assert deviation(found, alone(kind, cfg)) <= NOTHING


@pytest.mark.parametrize(*each(place=list(itertools.product(KINDS, ORDERS)), method=METHODS))
def test_one_call_beside_it_gives_what_whole_passes_give(place, method):
    one, whole = (
        run(beside(*place, functools.partial(METHODS[method], reuse=reuse)), place[0])
        for reuse in REUSE
    )
    assert deviation(one, whole) <= ROUNDING
    assert deviation(one, alone(place[0])) > ACTS, "it acts"


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
    kind, seen = "a cache inside the network", []
    model = noted(beside(kind, "after", METHODS[method]), seen)
    found = run(model, kind, cfg=1.0)
    assert deviation(found, alone(kind, 1.0)) > ACTS
    assert set(vars(model.model.diffusion_model)["known"]) == {0}, "the plain prediction's alone"
    run(noted(beside(kind, "after", lambda model: model), seen), kind, cfg=1.0)
    first, again = (seen[step]["cond_denoised"] for step in (0, 6))
    assert deviation(first, again) <= NOTHING


@pytest.mark.parametrize(*each(cfg=[4.0, 1.0], blocks=["double.1", "single.1"]))
def test_a_cache_around_the_blocks_answers_both_predictions_or_neither(blocks, cfg):
    def cached(guided):
        state = {}
        model = cache_around_blocks(state)(guided(exact_model("flux")))
        return sampled(model, "flux", cfg=cfg, steps=5), state["hits"]

    unguided, hits = cached(lambda m: m)
    assert hits == 2
    still, found = (cached(functools.partial(by, blocks=blocks))[0] for by in (nothing, seg))
    assert deviation(still, unguided) <= NOTHING
    assert deviation(found, unguided) > ACTS


@pytest.mark.parametrize(*each(cfg=CFGS, start=[0.0, 0.2]))
def test_a_cache_in_a_closure_answers_both_predictions_or_neither(cfg, start, caplog):
    def cached(guided, **widgets):
        state = {}
        model = cache_in_a_closure(state)(guided(shared_model(), start=start, **widgets))
        latents = run(model, "cache", cfg=cfg)
        assert state["hits"] > 1
        return latents

    unmoved = cached(nothing, scale=1e-9)
    assert deviation(cached(nothing), unmoved) <= NOTHING
    assert deviation(cached(seg), unmoved) > ACTS
    assert "no effect" not in caplog.text, "guidance acts in the other calls"


# Prompts of unusual kinds.


class Objects(torch.nn.Module):
    """As GLIGEN: objects at places of the image, for as many rows as the prompt has."""

    def set_position(self, shape, params, device):
        places = noise_like((shape[0], 1, 1), 9).to(device) + params[0]
        return lambda x, extra: x + 0.3 * places.to(x.dtype) * (len(x) == len(places) or 1 / 0)

    def set_empty(self, shape, device):
        return self.set_position(shape, [0.0], device)


def with_objects():
    gligen = patcher_of(Objects())
    return conditioning(1, gligen=("position", gligen, [1.0])), conditioning(2)


def with_control_through_options():
    return [
        [[e, {**v, "control": ActsThroughOptions()}] for e, v in conditioning(s)] for s in (1, 2)
    ]


def with_areas(control=False):
    positive, negative = conditioning(1, area=(8, 6, 0, 0)) + conditioning(3), conditioning(2)
    if control:
        return with_controlnet(positive, negative, tiny_controlnet(), size=(8, 12))
    return positive, negative


NAG = KINDS["attention made of both sides"]
PROMPTS = {
    "objects": with_objects,
    "control through the options": with_control_through_options,
    "areas": with_areas,
    "areas under a ControlNet": functools.partial(with_areas, control=True),
}


@pytest.mark.parametrize(
    *each(
        None, lambda prompts, cfg, nag, **_: "areas" in prompts and nag and cfg > 1,
        prompts=PROMPTS, cfg=CFGS, reuse=REUSE, nag=[False, True],
    )
)  # fmt: skip
def test_prompts_that_act_on_the_network_act_on_all_predictions(prompts, cfg, reuse, nag):
    positive, negative = PROMPTS[prompts]()

    def bare(model, **settings):
        return run(NAG(model) if nag else model, cfg=cfg, batch=2, **settings)

    sampled_so = functools.partial(bare, positive=positive, negative=negative)
    model = shared_model()
    unguided = sampled_so(model)
    assert deviation(unguided, bare(model)) > ACTS
    still = nothing(nothing(model, reuse), reuse, blocks="u1")
    assert deviation(sampled_so(still), unguided) <= NOTHING
    one, whole = (sampled_so(pag(seg(model, reuse=on), reuse=on)) for on in REUSE)
    assert deviation(one, whole) <= ROUNDING
    assert deviation(one, unguided) > ACTS
