"""ControlNets: the perturbed pass takes what the cond's own evaluation gave."""

from __future__ import annotations

import comfy.controlnet
import pytest
import torch
from host_models import conditioning, noise_like, seg
from reuse_checks import (
    MemoryShortage,
    adapter,
    both,
    control_net,
    controlled,
    controlled_pair,
    exact_model,
    outcome,
    part,
    require_effect,
    require_equal,
    require_shared,
    set_free_memory,
)


@pytest.mark.parametrize("cfg", [7.0, 1.0])
@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_the_perturbed_pass_evaluates_no_controlnet(cfg, size):
    control, calls = control_net()
    pair = controlled_pair(conditioning(1), conditioning(2), control, size=size)
    settings = {"positive": pair[0], "negative": pair[1], "cfg": cfg, "size": size, "steps": 3}
    plain = outcome(exact_model(), **settings)
    per_run, calls[:] = list(calls), []
    on = outcome(seg(exact_model()), **settings)
    assert calls == per_run
    calls.clear()
    off = outcome(seg(exact_model(), reuse=False), **settings)
    assert sum(calls) == sum(per_run) + 3
    assert (on.controls, plain.controls) == (0, 0)
    # The floor of ComfyUI shares the ControlNet's output although it cannot pass over blocks.
    require_equal(on, off, bitwise=cfg == 1.0)
    require_effect(than=on, **settings)


@pytest.mark.parametrize(
    ("blocks", "cfg"),
    [*((blocks, 7.0) for blocks in ("d0", "middle", "u0", "u1")), ("middle", 1.0), ("u1", 1.0)],
)
def test_what_controlnet_adds_before_the_fork_is_not_added_twice(blocks, cfg):
    control, _ = control_net()
    pair = controlled_pair(conditioning(1), conditioning(2), control)
    on, off = both(positive=pair[0], negative=pair[1], cfg=cfg, options={"blocks": blocks})
    require_shared(on, off, passes=3)
    require_equal(on, off, bitwise=cfg == 1.0)
    assert on.controls == 0


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("blocks", ["d1", "middle", "u1"])
def test_t2i_adapter(middle, blocks):
    control, _ = adapter(middle=middle)
    pair = controlled_pair(conditioning(1), conditioning(2), control)
    on, off = both(
        lambda: exact_model("sd15"), positive=pair[0], negative=pair[1], options={"blocks": blocks}
    )
    require_shared(on, off, passes=3)
    require_equal(on, off)
    assert on.controls == 0
    require_effect(
        lambda: seg(exact_model("sd15"), blocks=blocks),
        than=on,
        positive=conditioning(1),
        negative=conditioning(2),
    )


def test_several_controlnets_in_a_chain():
    first, calls_of_first = control_net(seed=5)
    second, calls_of_second = control_net(seed=6)
    third, _ = adapter()
    pair = [conditioning(1), conditioning(2)]
    for control, strength in ((first, 0.7), (third, 0.6), (second, 0.5)):
        pair = [controlled(c, control, strength=strength) for c in pair]
    settings = {"positive": pair[0], "negative": pair[1]}
    outcome(exact_model(), **settings)
    plain = (sum(calls_of_first), sum(calls_of_second))
    calls_of_first.clear()
    calls_of_second.clear()
    on = outcome(seg(exact_model()), **settings)
    assert (sum(calls_of_first), sum(calls_of_second)) == plain
    off = outcome(seg(exact_model(), reuse=False), **settings)
    assert on.controls == 0
    require_equal(on, off)


@pytest.mark.parametrize("percent", [(0.0, 0.4), (0.4, 1.0), (0.3, 0.6)])
def test_start_and_end_percent(percent):
    control, calls = control_net()
    pair = controlled_pair(conditioning(1), conditioning(2), control, percent=percent)
    settings = {"positive": pair[0], "negative": pair[1], "steps": 5}
    outcome(exact_model(), **settings)
    plain = sum(calls)
    assert 0 < plain < 2 * 5
    calls.clear()
    on, off = both(**settings)
    assert sum(calls) == plain + plain + plain // 2
    assert on.controls == 0
    require_equal(on, off)


def test_two_controlnets_of_which_each_has_its_own_time():
    first, _ = control_net(seed=5)
    second, _ = control_net(seed=6)
    pair = [conditioning(1), conditioning(2)]
    pair = [controlled(c, first, percent=(0.0, 0.5)) for c in pair]
    pair = [controlled(c, second, percent=(0.5, 1.0)) for c in pair]
    on, off = both(positive=pair[0], negative=pair[1], steps=4)
    assert on.controls == 0
    require_equal(on, off)


@pytest.mark.parametrize(
    "settings",
    [
        {"strength_type": comfy.controlnet.StrengthType.LINEAR_UP},
        {"global_average_pooling": True},
        {"strength": 0.0},
    ],
)
def test_strength_schedules(settings):
    control, _ = control_net()
    pair = controlled_pair(conditioning(1), conditioning(2), control, **settings)
    on, off = both(positive=pair[0], negative=pair[1])
    assert on.controls == 0
    require_equal(on, off)


def masked(seed, **extra):
    half = torch.zeros(1, 8, 8)
    half[:, :, :4] = 1.0
    return conditioning(seed, mask=half, mask_strength=0.9, **extra)


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        (masked(1), conditioning(2)),
        (conditioning(1) + conditioning(3, area=(4, 8, 4, 0), strength=1.0), conditioning(2)),
        (conditioning(1) + conditioning(3, start_percent=0.5), conditioning(2) + masked(4)),
    ],
)
def test_conds_with_masks_and_areas(positive, negative):
    control, _ = control_net()
    pair = controlled_pair(positive, negative, control)
    on, off = both(positive=pair[0], negative=pair[1])
    require_shared(on, off)
    require_equal(on, off)
    assert on.controls == 0


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_a_controlnet_on_one_cond_alone(cfg):
    control, _ = control_net()
    positive = controlled(conditioning(1), control) + conditioning(3)
    on, off = both(positive=positive, negative=conditioning(2), cfg=cfg)
    assert on.controls == 0
    require_equal(on, off, bitwise=cfg == 1.0)


@pytest.mark.parametrize("chunks", [1, 2])
def test_conds_cut_in_chunks(monkeypatch, chunks):
    memory = MemoryShortage(monkeypatch, chunks=chunks)
    control, calls = control_net()
    positive, negative = conditioning(1) + conditioning(3), conditioning(2)
    pair = controlled_pair(positive, negative, control)
    on, off = both(lambda: memory.reach(exact_model()), positive=pair[0], negative=pair[1])
    assert sum(calls) == 3 * 3 + 3 * (3 + 2)
    assert on.controls == 0
    require_equal(on, off)


@pytest.mark.parametrize("batch", [2, 3])
def test_batches_of_images_and_of_hints(batch):
    control, _ = control_net()
    control.set_cond_hint(noise_like((batch, 3, 64, 64), 7).sigmoid(), 0.8)
    pair = [[[e, {**v, "control": control}] for e, v in conditioning(s)] for s in (1, 2)]
    on, off = both(positive=pair[0], negative=pair[1], batch=batch)
    assert on.controls == 0
    require_equal(on, off)


def test_two_branches_on_both_sides_reuse_it():
    control, calls = control_net()
    pair = controlled_pair(conditioning(1), conditioning(2), control)

    def guided(model, reuse):
        first = seg(model, 2.0, branch="unconditional", reuse=reuse)
        return seg(first, 1.0, 1.5, blocks="u1", reuse=reuse)

    on, off = both(guided=guided, positive=pair[0], negative=pair[1])
    require_shared(on, off, passes=6)
    assert sum(calls) == 3 * 2 + 3 * 4
    require_equal(on, off)


def test_where_the_controlnet_was_not_kept_it_is_evaluated(monkeypatch):
    control, calls = control_net()
    pair = controlled_pair(conditioning(1), conditioning(2), control)
    aside = part("sampling.aside").Aside
    monkeypatch.setattr(aside, "put", lambda *_: None)
    on, off = both(positive=pair[0], negative=pair[1])
    assert on.controls == 3
    assert sum(calls) == 2 * (3 * 2 + 3)
    assert on.shared == 0
    require_equal(on, off)


class Lllite(comfy.controlnet.ControlBase):
    """A ControlNet that gives nothing, and patches the network through the options instead."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        del x_noisy, t, cond, batched_number
        self.asked += 1
        patches = dict(transformer_options.get("patches", {}))
        patches["attn2_patch"] = [lambda q, k, v, extra: (1.3 * q, k, v)]
        transformer_options["patches"] = patches


@pytest.mark.parametrize("free", [None, 1e6])
@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_a_controlnet_that_acts_through_the_options_acts_on_both_predictions(
    monkeypatch, cfg, free
):
    if free is not None:
        set_free_memory(monkeypatch, free)
    pair = [[[e, {**v, "control": Lllite()}] for e, v in conditioning(s)] for s in (1, 2)]
    settings = {"positive": pair[0], "negative": pair[1], "cfg": cfg}
    on, off = both(**settings)
    assert on.shared == (3 if free is None else 0)
    require_equal(on, off)
    require_effect(seg_model, than=on, cfg=cfg)


def seg_model():
    return seg(exact_model())


def test_who_looks_at_a_waiting_controlnet_sees_the_controlnet():
    control, _ = control_net()
    stand_in = part("calls.control").ControlStandIn(control, lambda *_: (None,))
    assert isinstance(stand_in, comfy.controlnet.ControlNet)
    stand_in.cond_hint = 5
    assert control.cond_hint == 5
    del stand_in.cond_hint
    assert not hasattr(control, "cond_hint")


def test_one_residual_for_a_batch_is_joined_row_by_row(monkeypatch):
    # The main pass sees the positive conds in different calls, the perturbed pass in one.
    control, _ = adapter(middle=True)
    positive, negative = conditioning(1) + conditioning(3), conditioning(2)
    pair = controlled_pair(positive, negative, control)
    memory = MemoryShortage(monkeypatch, chunks=4)
    on, off = both(
        lambda: memory.reach(exact_model("sd15")), positive=pair[0], negative=pair[1], batch=2
    )
    require_shared(on, off, passes=3)
    require_equal(on, off)
