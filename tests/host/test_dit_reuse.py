"""Diffusion transformers make a guided step in one call: the same outputs, each block once."""

from __future__ import annotations

import importlib
import math

import comfy.controlnet
import pytest
import torch
from dit_models import TINY, available, prompt, sample_dit, tiny_dit
from dit_oracle import block_modules, entered, float64_rotary, selector, shape_of
from host_models import noise_like, seg
from host_oracle import deviation
from reuse_checks import part, reported

KINDS = [kind for kind in TINY if available(kind) and kind != "anima"]  # slow; as cosmos2
TWO_LISTS = [kind for kind in KINDS if kind in ("flux", "flux2", "chroma", "radiance", "aura",
                                                "hunyuan_video", "hunyuan_image", "hidream",
                                                "boogu", "pixeldit")]  # fmt: skip
ONLY_FLOAT32 = {"cosmos1": 1e-5}


def bound(kind, cfg=4.0):
    """Return how far one call may be from whole passes, in units of the output's std."""
    if kind.startswith("wan") and cfg > 1:
        # The host embeds Wan's patches in float32, whose rounding depends on the batch's size.
        return 5e-6
    return ONLY_FLOAT32.get(kind, 1e-12)


def model_of(kind):
    """Return a tiny model in the highest precision that its network takes."""
    return tiny_dit(kind, dtype=torch.float32 if kind in ONLY_FLOAT32 else torch.float64)


def run(kind, *, reuse, numbers=(2,), around=lambda model: model, **options):
    """Return the network's outputs, the report of a run, and which blocks were entered in it."""
    model = model_of(kind)
    shape = options.pop("shape", None) or shape_of(kind, (3, 4))
    blocks = selector(model, kind, numbers)
    guided = around(seg(model, 3.0, math.inf, blocks=blocks, reuse=reuse))
    outs = []
    hook = model.model.diffusion_model.register_forward_hook(
        lambda _module, _args, out: outs.append(out.clone())
    )
    with float64_rotary(), reported() as reports, entered(model, kind) as state:
        sample_dit(guided, kind, shape, **{"steps": 1, **options})
    hook.remove()
    ((report, _),) = reports
    return outs, report, state["runs"]


def check(kind, *, passes=1, **options):
    """Require that one call gives what whole passes give, and enters each block once."""
    on, report, few = run(kind, reuse=True, **options)
    off, _, all_ = run(kind, reuse=False, **options)
    assert not report.full, report.full
    assert sum(report.shared.values()) == passes
    assert len(on) == len(off)
    for one, whole in zip(on, off, strict=True):
        assert deviation(one, whole) <= bound(kind, options.get("cfg", 4.0))
    assert few == all_[: len(few)], "as often as without guidance, and in the same order"
    assert len(all_) == len(few) + passes * len(block_modules(tiny_dit(kind), kind))
    return on


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_makes_a_guided_step_in_one_call(kind, cfg):
    check(kind, cfg=cfg)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_the_first_block(kind):
    check(kind, numbers=(0,), shape=shape_of(kind, (3, 4), batch=2))


@pytest.mark.parametrize("kind", TWO_LISTS)
def test_a_block_of_the_second_list(kind):
    check(kind, numbers=(len(block_modules(tiny_dit(kind), kind)) - 1,))


ONE_AT_A_TIME = "ComfyUI takes this reference image for one picture at a time"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if TINY[kind].refs])
def test_with_reference_images(kind):
    if kind != "hunyuan_video":
        check(kind, cond=TINY[kind].refs, cfg=1.0)
        return
    on, report, _ = run(kind, reuse=True, cond=TINY[kind].refs, cfg=1.0)
    off, _, _ = run(kind, reuse=False, cond=TINY[kind].refs, cfg=1.0)
    assert {reason for _, reason in report.full} == {ONE_AT_A_TIME}
    assert all(torch.equal(a, b) for a, b in zip(on, off, strict=True))


def identity(model, kind, numbers, **options):
    node = importlib.import_module("seg_pack_under_test.nodes.pag").SEGuidancePAG
    blocks = selector(model, kind, numbers)
    return node.execute(model, 1.0, 0.0, 1.0, blocks=blocks, **options)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_several_guidances_are_one_call_and_fork_each_at_its_own_block(kind):
    results = {}
    for reuse in (True, False):
        model = model_of(kind)
        guided = seg(model, 2.0, 1.5, blocks=selector(model, kind, (2,)), reuse=reuse)
        guided = identity(guided, kind, (1, 3), reuse=reuse)
        outs = []
        model.model.diffusion_model.register_forward_hook(
            lambda _module, _args, out, outs=outs: outs.append(out.clone())
        )
        with float64_rotary(), entered(model, kind) as state:
            sample_dit(guided, kind, shape_of(kind, (3, 4)), steps=1)
        results[reuse] = outs, len(state["runs"])
    (on, few), (off, many) = results[True], results[False]
    assert many == 3 * few
    for one, whole in zip(on, off, strict=True):
        assert deviation(one, whole) <= bound(kind)


@pytest.mark.parametrize("plant", ["rows of another cond", "one block late"])
@pytest.mark.parametrize("kind", ["flux", "lumina2", "wan", "cosmos1"])
def test_the_comparison_notices_a_planted_error(kind, plant, monkeypatch):
    rows = part("calls.rows").Rows
    if plant == "one block late":
        late = lambda self, block: sum(join.fork < block for join in self.joins)  # noqa: E731
        monkeypatch.setattr(rows, "_joined", late)
        on, _, _ = run(kind, reuse=True)
    else:
        right = rows.widened

        def wrong(self, tensor, block=None, axis=0):
            wide = right(self, tensor, block, axis)
            if wide is not tensor and self.plain == 2:
                wide = wide.clone()
                other = 1 - self.joins[0].chunk
                wide.narrow(axis, 2, 1).copy_(wide.narrow(axis, other, 1))
            return wide

        monkeypatch.setattr(rows, "widened", wrong)
        on, _, _ = run(kind, reuse=True)
    monkeypatch.undo()
    off, _, _ = run(kind, reuse=False)
    assert deviation(on[1], off[1]) > 1e-4


def test_area_conds_in_a_batch_are_told_apart():
    shape = shape_of("flux", (4, 4), batch=2)
    positive = prompt("flux", shape, 1, area=(4, 8, 0, 0), strength=0.7)
    positive += prompt("flux", shape, 3, area=(4, 8, 4, 0)) + prompt("flux", shape, 4)
    check("flux", shape=shape, positive=positive, passes=2)


class FixedControl(comfy.controlnet.ControlBase):
    """A ControlNet whose residuals are given, and which counts how often it is asked."""

    def __init__(self, residuals):
        super().__init__()
        self.residuals = residuals
        self.asked = 0

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        del t, cond, batched_number, transformer_options
        self.asked += 1
        return {
            part: [r.repeat(x_noisy.shape[0], 1, 1) for r in tensors]
            for part, tensors in self.residuals.items()
        }


CONTROLLED = {
    "flux": (32, {"input": 2, "output": 3}),
    "qwen": (32, {"input": 4}),
    "sd3": (64, {"output": 5}),
    "hunyuan_video": (32, {"input": 2, "output": 3}),
}


@pytest.mark.parametrize("numbers", [(1,), (3,)])
@pytest.mark.parametrize("kind", CONTROLLED)
def test_control_residuals_are_neither_lost_nor_doubled_nor_computed_twice(kind, numbers):
    width, counts = CONTROLLED[kind]
    shape = shape_of(kind, (3, 4))
    tokens = 12 * (shape[2] if len(shape) == 5 else 1)
    residuals = {
        part: [0.3 * noise_like((1, tokens, width), 70 + n) for n in range(count)]
        for part, count in counts.items()
    }
    (plain, *_), _, _ = run(kind, reuse=True, numbers=numbers, cfg=1.0)
    results = {}
    for reuse in (True, False):
        control = FixedControl({"input": [], **residuals})
        cond = {"control": control, "control_apply_to_uncond": False}
        outs, report, _ = run(kind, reuse=reuse, numbers=numbers, cfg=1.0, cond=cond)
        results[reuse] = outs
        assert control.asked == (1 if reuse else 2)
        assert sum(report.shared.values()) == (1 if reuse else 0)
    for one, whole in zip(results[True], results[False], strict=True):
        assert deviation(one, whole) <= bound(kind)
    assert deviation(plain, results[True][0]) > 1e-2
