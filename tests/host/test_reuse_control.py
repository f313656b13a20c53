"""ControlNets: evaluated once for both predictions, and acting on both."""

from __future__ import annotations

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
from neighbours import WRAPPERS, wrapped
from reuse_checks import (
    MemoryShortage,
    adapter,
    both,
    control_net,
    controlled,
    controlled_pair,
    difference,
    outcome,
    require_equal,
    require_reference,
)

STEPS = 3
PROMPTS = (conditioning(1), conditioning(2))


def one(**settings):
    """Return both prompts under one ControlNet, and its evaluations."""
    control, calls = control_net()
    return controlled_pair(*PROMPTS, control, **settings), [calls]


def chain():
    first, second, third = control_net(seed=5), control_net(seed=6), adapter()
    pair = PROMPTS
    for (control, _), strength in ((first, 0.7), (third, 0.6), (second, 0.5)):
        pair = [controlled(conds, control, strength=strength) for conds in pair]
    return pair, [first[1], second[1]]


def one_after_the_other():
    first, second = control_net(seed=5), control_net(seed=6)
    pair = PROMPTS
    for (control, _), percent in ((first, (0.0, 0.5)), (second, (0.5, 1.0))):
        pair = [controlled(conds, control, percent=percent) for conds in pair]
    return pair, [first[1], second[1]]


def on_masks_and_areas():
    half = torch.zeros(1, 8, 8)
    half[:, :, :4] = 1.0
    positive = conditioning(1) + conditioning(3, area=(4, 8, 4, 0), strength=1.0)
    negative = conditioning(2) + conditioning(4, mask=half, mask_strength=0.9)
    control, calls = control_net()
    return controlled_pair(positive, negative, control), [calls]


def on_one_cond_alone():
    control, calls = control_net()
    return (controlled(conditioning(1), control) + conditioning(3), conditioning(2)), [calls]


def hints_of_two():
    control, calls = control_net()
    control.set_cond_hint(noise_like((2, 3, 64, 64), 7).sigmoid(), 0.8)
    return [[[e, {**v, "control": control}] for e, v in conds] for conds in PROMPTS], [calls]


CONTROLS = {
    "one": one,
    "a chain": chain,
    "one after the other": one_after_the_other,
    "one that starts late": lambda: one(percent=(0.4, 1.0)),
    "one that ends early": lambda: one(percent=(0.0, 0.4)),
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
    settings = {"positive": pair[0], "negative": pair[1], "cfg": cfg, "steps": STEPS}

    def run(model):
        for one in calls:
            one.clear()
        return outcome(model, batch=batch, **settings), [sum(one) for one in calls]

    plain, once = run(shared_model())
    on, as_often = run(seg(shared_model(), blocks=blocks))
    off, more = run(seg(shared_model(), blocks=blocks, reuse=False))
    assert as_often == once < more
    assert on.controls == 0
    assert on.reasons == set()
    require_equal(on, off, bitwise=cfg == 1.0 and batch == 1)
    assert difference(on.latents, plain.latents) > 1e-3
    bare = outcome(seg(shared_model(), blocks=blocks), cfg=cfg, steps=STEPS, batch=batch)
    assert difference(on.latents, bare.latents) > 1e-3 or name == "strength 0"


@pytest.mark.parametrize(*each(blocks=["d1", "middle", "u1"], middle=[False, True]))
def test_a_t2i_adapter(middle, blocks):
    control, _ = adapter(middle=middle)
    pair = controlled_pair(*PROMPTS, control)
    on, off = both(
        lambda: shared_model("sd15"), positive=pair[0], negative=pair[1], options={"blocks": blocks}
    )
    assert (on.shared, on.reasons, on.controls) == (3, set(), 0)
    require_equal(on, off)
    bare = outcome(seg(shared_model("sd15"), blocks=blocks))
    assert difference(on.latents, bare.latents) > 1e-3


@pytest.mark.parametrize(*pairs(kind=["sd15", "sdxl"], cfg=[1.0, 5.0], reuse=[True, False]))
def test_the_controlled_run_is_the_dense_reference(kind, cfg, reuse):
    conds = with_controlnet(*PROMPTS, tiny_controlnet(kind), end=0.5, size=(8, 12))
    positive, negative = with_controlnet(
        *conds, tiny_controlnet(kind, seed=51), strength=0.5, size=(8, 12)
    )
    require_reference(
        shared_model(kind), positive=positive, negative=negative, cfg=cfg, steps=3, reuse=reuse
    )


@pytest.mark.parametrize("chunks", [2, 3])
def test_conds_cut_in_chunks(monkeypatch, chunks):
    memory = MemoryShortage(monkeypatch, chunks=chunks)
    control, calls = control_net()
    pair = controlled_pair(conditioning(1) + conditioning(3), conditioning(2), control)
    on, off = both(lambda: memory.reach(shared_model().clone()), positive=pair[0], negative=pair[1])
    assert sum(calls) == 3 * 3 + 3 * (3 + 2)
    assert on.controls == 0
    require_equal(on, off)


def test_one_residual_for_a_batch_is_joined_row_by_row(monkeypatch):
    # The main pass sees the positive conds in different calls, the perturbed pass in one.
    control, _ = adapter(middle=True)
    pair = controlled_pair(conditioning(1) + conditioning(3), conditioning(2), control)
    memory = MemoryShortage(monkeypatch, chunks=4)
    on, off = both(
        lambda: memory.reach(shared_model("sd15").clone()), positive=pair[0], negative=pair[1],
        batch=2,
    )  # fmt: skip
    assert (on.shared, on.reasons) == (3, set())
    require_equal(on, off)


def test_two_branches_on_both_sides_reuse_it():
    control, calls = control_net()
    pair = controlled_pair(*PROMPTS, control)

    def guided(model, reuse):
        first = seg(model, 2.0, branch="unconditional", reuse=reuse)
        return seg(first, 1.0, 1.5, blocks="u1", reuse=reuse)

    on, off = both(guided=guided, positive=pair[0], negative=pair[1])
    assert (on.shared, on.reasons) == (6, set())
    assert sum(calls) == 3 * 2 + 3 * 4
    require_equal(on, off)


def test_who_looks_at_the_conds_of_a_call_sees_the_controlnet():
    seen = []

    def look(executor, model, conds, *rest):
        for cond in (cond for side in conds for cond in side or ()):
            seen.append(isinstance(cond["control"], comfy.controlnet.ControlNet))
            assert cond["control"].strength == 0.8
        return executor(model, conds, *rest)

    positive, negative = one()[0]
    model = wrapped(WRAPPERS.CALC_COND_BATCH, look)(seg(shared_model()))
    sample(model, positive=positive, negative=negative)
    assert all(seen)
    assert len(seen) == 2 * 3
