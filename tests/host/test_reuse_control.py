"""ControlNets: evaluated once for both predictions, and acting on both."""

from __future__ import annotations

import functools

import comfy.controlnet
import pytest
import torch
from choice import each, pairs
from host_models import (
    conditioning,
    noise_like,
    sample,
    seg,
    shared_model,
    tiny_controlnet,
    with_controlnet,
)
from host_oracle import deviation
from reuse_checks import (
    adapter,
    both,
    control_net,
    outcome,
    require_equal,
    require_reference,
    with_room_for,
)
from stand_ins import WRAPPERS, wrapped

PROMPTS = (conditioning(1), conditioning(2))


def one(**attributes):
    """Return both prompts under one ControlNet, and its evaluations."""
    control, calls = control_net()
    pair = with_controlnet(*PROMPTS, control, strength=0.8)
    for name, value in attributes.items():
        setattr(pair[0][0][1]["control"], name, value)
    return pair, [calls]


def chain():
    """Each side of cfg has objects of its own."""
    first, second = control_net(seed=5), control_net(seed=6)
    pair = PROMPTS
    for control, strength in ((first[0], 0.7), (adapter(), 0.6), (second[0], 0.5)):
        pair = [with_controlnet(conds, [], control, strength=strength)[0] for conds in pair]
    return pair, [first[1], second[1]]


def one_after_the_other():
    first, second = control_net(seed=5), control_net(seed=6)
    pair = with_controlnet(*PROMPTS, first[0], end=0.5)
    return with_controlnet(*pair, second[0], start=0.5), [first[1], second[1]]


def on_masks_and_areas():
    half = torch.zeros(1, 8, 8)
    half[:, :, :4] = 1.0
    positive = conditioning(1) + conditioning(3, area=(4, 8, 4, 0), strength=1.0)
    negative = conditioning(2) + conditioning(4, mask=half, mask_strength=0.9)
    control, calls = control_net()
    return with_controlnet(positive, negative, control), [calls]


def on_one_cond_alone():
    control, calls = control_net()
    positive, _ = with_controlnet(conditioning(1), [], control)
    return (positive + conditioning(3), conditioning(2)), [calls]


def hints_of_two():
    pair, calls = one()
    pair[0][0][1]["control"].set_cond_hint(noise_like((2, 3, 64, 64), 7).sigmoid(), 0.8)
    return pair, calls


CONTROLS = {
    "one": one,
    "a chain": chain,
    "one after the other": one_after_the_other,
    "one that starts late": lambda: one(timestep_percent_range=(0.4, 1.0)),
    "one that ends early": lambda: one(timestep_percent_range=(0.0, 0.4)),
    "a rising strength": lambda: one(strength_type=comfy.controlnet.StrengthType.LINEAR_UP),
    "averaged over the image": lambda: one(global_average_pooling=True),
    "strength 0": lambda: one(strength=0.0),
    "masks and areas": on_masks_and_areas,
    "one cond alone": on_one_cond_alone,
    "a hint for each image": hints_of_two,
}
BLOCKS = ("d0", "middle", "u0", "u1")


@pytest.mark.parametrize(*each(name=CONTROLS, cfg=[7.0, 1.0], blocks=BLOCKS))
def test_a_controlnet_is_evaluated_once_and_acts_on_both_predictions(name, cfg, blocks):
    pair, calls = CONTROLS[name]()
    batch = 2 if name == "a hint for each image" else 1
    settings = {"positive": pair[0], "negative": pair[1], "cfg": cfg}

    def run(model):
        for one in calls:
            one.clear()
        return outcome(model, batch=batch, **settings), [sum(one) for one in calls]

    plain, once = run(shared_model())
    on, as_often = run(seg(shared_model(), blocks=blocks))
    off, more = run(seg(shared_model(), blocks=blocks, reuse=False))
    assert as_often == once < more
    assert on.reasons == set()
    require_equal(on, off, bitwise=cfg == 1.0 and batch == 1)
    assert deviation(on.latents, plain.latents) > 1e-3
    bare = outcome(seg(shared_model(), blocks=blocks), cfg=cfg, batch=batch)
    assert deviation(on.latents, bare.latents) > 1e-3 or name == "strength 0"


@pytest.mark.parametrize(
    *each(blocks=["d1", "middle", "u1"], middle=[False, True], cut=[False, True])
)
def test_a_t2i_adapter(monkeypatch, middle, blocks, cut):
    """It has one residual for a batch; cut conds meet in other calls of a whole pass."""
    positive = conditioning(1) + conditioning(3)
    positive, negative = with_controlnet(positive, PROMPTS[1], adapter(middle=middle))
    settings = {"positive": positive, "negative": negative, "batch": 2}
    model = shared_model("sd15")
    if cut:
        model = with_room_for(monkeypatch, 4, model)
    on, off = both(lambda: model, options={"blocks": blocks}, **settings)
    assert (on.shared, on.reasons) == (3, set())
    require_equal(on, off)
    bare = outcome(seg(model, blocks=blocks), **settings | {"positive": PROMPTS[0] * 2})
    assert deviation(on.latents, bare.latents) > 1e-3


@pytest.mark.parametrize(*pairs(kind=["sd15", "sdxl"], cfg=[1.0, 5.0], reuse=[True, False]))
def test_the_controlled_run_is_the_dense_reference(kind, cfg, reuse):
    conds = with_controlnet(*PROMPTS, tiny_controlnet(kind), end=0.5, size=(8, 12))
    positive, negative = with_controlnet(
        *conds, tiny_controlnet(kind, seed=51), strength=0.5, size=(8, 12)
    )
    require_reference(
        shared_model(kind), positive=positive, negative=negative, cfg=cfg, steps=3, reuse=reuse
    )


@pytest.mark.parametrize("conds", [2, 3])
def test_conds_cut_in_several_calls(monkeypatch, conds):
    control, calls = control_net()
    pair = with_controlnet(conditioning(1) + conditioning(3), conditioning(2), control)
    cut = functools.partial(with_room_for, monkeypatch, conds, shared_model())
    on, off = both(cut, positive=pair[0], negative=pair[1])
    assert sum(calls) == 3 * 3 + 3 * (3 + 2)
    require_equal(on, off)


def test_two_branches_on_both_sides_reuse_it():
    control, calls = control_net()
    pair = with_controlnet(*PROMPTS, control)

    def guided(model, reuse):
        first = seg(model, 2.0, branch="unconditional", reuse=reuse)
        return seg(first, 1.0, 1.5, blocks="u1", reuse=reuse)

    on, off = both(guided=guided, positive=pair[0], negative=pair[1])
    assert (on.shared, on.reasons) == (6, set())
    assert sum(calls) == 3 * 2 + 3 * 4
    require_equal(on, off)


def test_who_looks_at_the_conds_of_a_call_sees_the_controlnet():
    seen = []

    @wrapped(WRAPPERS.CALC_COND_BATCH)
    def looking(executor, model, conds, *rest):
        for cond in (cond for side in conds for cond in side or ()):
            seen.append(isinstance(cond["control"], comfy.controlnet.ControlNet))
            assert cond["control"].strength == 0.8
        return executor(model, conds, *rest)

    positive, negative = one()[0]
    sample(looking(seg(shared_model())), positive=positive, negative=negative)
    assert all(seen)
    assert len(seen) == 2 * 3
