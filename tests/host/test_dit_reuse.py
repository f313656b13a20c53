"""Diffusion transformers make a guided step in one call: the same outputs, each block once."""

from __future__ import annotations

import comfy.controlnet
import pytest
import torch
from choice import each
from dit_models import ALL, TINY, VARIANTS, packed, prompt, sampled, shape_of
from dit_oracle import KEYS_TOO, ONLY_FLOAT32, PIXELS, block_modules, entered, exact_model, selector
from dit_variants import MUSIC
from family_oracle import guide
from host_models import noise_like
from host_oracle import deviation
from reuse_checks import reported, warned

DOUBLED = {"qwen_no_noise", "krea2_no_noise", "zimage_omni"}  # modulate references by themselves


def bound(kind, cfg):
    """Return how far one call may be from whole passes, in units of the output's std."""
    if kind.startswith("wan") and cfg > 1:
        # The host embeds Wan's patches in float32, whose rounding depends on the batch's size.
        return 5e-6
    return 1e-5 if kind in ONLY_FLOAT32 else 1e-12


def last(kind):
    return len(block_modules(exact_model(kind))) - 1


def all_of(*parts):
    """Return what applies nodes, each given as method, numbers of blocks and further widgets."""

    def guided(kind, **options):
        model = exact_model(kind)
        for method, numbers, widgets in parts:
            if callable(numbers):
                numbers = numbers(kind)
            blocks = selector(exact_model(kind), kind, numbers)
            model = guide(method, model, 2.0, blocks=blocks, **options, **widgets)
        return model

    return guided


def tokens(kind):
    return [0, 1] if kind in PIXELS else [1, 2]


GUIDED = {
    # name: nodes, how many passes they need, how they are sampled
    "SEG": (all_of(("SEG", [2], {})), 1, {"cfg": 4.0}),
    "first block": (all_of(("SEG", [0], {})), 1, {"cfg": 4.0, "batch": 2}),
    "last block": (all_of(("SEG", lambda kind: [last(kind)], {})), 1, {"cfg": 1.0}),
    "TPG": (all_of(("TPG", tokens, {})), 1, {"cfg": 1.0}),
    "SLG": (all_of(("SLG", tokens, {})), 1, {"cfg": 4.0}),
    "SLG, attention": (all_of(("SLG", [1, 2], {"what": "attention"})), 1, {"cfg": 1.0}),
    "SEG and PAG": (
        all_of(("SEG", [2], {"infinite_blur": False}), ("PAG", [1, 3], {})), 2, {"cfg": 1.0},
    ),
    # All on the same block, some on later ones: rows that pass by stand between others.
    "the family": (
        all_of(
            ("SLG", lambda kind: [1] if kind in PIXELS else [1, 3], {}), ("SEG", [1], {}),
            ("TPG", [0, 1], {}), ("SEG", [3], {"branch": "unconditional"}),
            ("PAG", [2], {"strength": 0.5}),
        ), 5, {"cfg": 4.0},
    ),
}  # fmt: skip


def exists(kind, name):
    if kind in KEYS_TOO and name in ("TPG", "SLG", "the family"):
        return False
    return kind not in VARIANTS or name in ("SEG", "the family")


def run(kind, model, **options):
    """Return the network's outputs, what the run did, and which blocks were entered in it."""
    outs = []
    network = exact_model(kind).model.diffusion_model
    hook = network.register_forward_hook(lambda _module, _args, out: outs.append(packed(out)))
    with hook, reported() as counts, entered(exact_model(kind)) as state:
        sampled(model, kind, **{"steps": 1, **options})
    return outs, counts, state["runs"]


def check(kind, guided, *, passes=1, **options):
    """Require that one call gives what whole passes give, and enters each block once."""
    on, counts, few = run(kind, guided(kind, reuse=True), **options)
    off, _, all_ = run(kind, guided(kind, reuse=False), **options)
    assert (counts.shared, counts.reasons) == (passes, set())
    assert len(on) == len(off) > 1
    for one, whole in zip(on, off, strict=True):
        assert deviation(one, whole) <= bound(kind, options["cfg"])
    assert few == all_[: len(few)], "as often as without guidance, and in the same order"
    assert len(all_) == len(few) + passes * (last(kind) + 1)


@pytest.mark.floor
@pytest.mark.parametrize(
    *each(exists, lambda name, **_: name == "the family", kind=ALL, name=GUIDED)
)
def test_every_family_makes_a_guided_step_in_one_call(kind, name, caplog):
    guided, passes, options = GUIDED[name]
    check(kind, guided, passes=passes, **options)
    assert not warned(caplog), "every block was reached"


ONE_AT_A_TIME = "one picture at a time"


@pytest.mark.parametrize(
    *each(
        lambda kind, name: kind in DOUBLED or name == "SEG and PAG",
        lambda **_: True,
        kind=[kind for kind in ALL if TINY[kind].refs], name=["SEG and PAG", "the family"],
    )
)  # fmt: skip
def test_with_reference_images(kind, name):
    guided, passes, _ = GUIDED[name]
    options = {"cond": TINY[kind].refs, "cfg": 4.0 if kind in VARIANTS else 1.0}
    if kind != "hunyuan_video":
        check(kind, guided, passes=passes, **options)
        return
    on, counts, _ = run(kind, guided(kind, reuse=True), **options)
    off, _, _ = run(kind, guided(kind, reuse=False), **options)
    assert counts.because(ONE_AT_A_TIME) == counts.full.total() == passes
    assert all(torch.equal(a, b) for a, b in zip(on, off, strict=True))


@pytest.mark.skipif("wan_dancer" not in ALL, reason="this ComfyUI has no such network")
def test_music_between_blocks():
    """In grids that WanDancer takes with music: a multiple of eight tokens."""
    shape = shape_of("wan_dancer", (2, 4))
    check("wan_dancer", GUIDED["SEG"][0], shape=shape, cond=MUSIC, cfg=4.0)


def test_area_conds_in_a_batch_are_told_apart():
    shape = shape_of("flux", (4, 4), batch=2)
    positive = prompt("flux", shape, 1, area=(4, 8, 0, 0), strength=0.7)
    positive += prompt("flux", shape, 3, area=(4, 8, 4, 0)) + prompt("flux", shape, 4)
    check("flux", GUIDED["SEG"][0], shape=shape, positive=positive, passes=2, cfg=4.0)


class FixedControl(comfy.controlnet.ControlBase):
    """A ControlNet whose residuals are given, and which counts how often it is asked."""

    def __init__(self, residuals):
        super().__init__()
        self.residuals = residuals
        self.asked = 0

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
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


@pytest.mark.parametrize(*each(kind=CONTROLLED, number=[1, 3]))
def test_control_residuals_are_neither_lost_nor_doubled_nor_computed_twice(kind, number):
    width, counts = CONTROLLED[kind]
    shape = shape_of(kind)
    residuals = {
        part: [
            0.3 * noise_like((1, 12 * (shape[2] if len(shape) == 5 else 1), width), 70 + n)
            for n in range(count)
        ]
        for part, count in counts.items()
    }
    guided = all_of(("SEG", [number], {}))
    (plain, *_), _, _ = run(kind, guided(kind, reuse=True), cfg=1.0)
    results = []
    for reuse in (True, False):
        control = FixedControl({"input": [], **residuals})
        cond = {"control": control, "control_apply_to_uncond": False}
        outs, done, _ = run(kind, guided(kind, reuse=reuse), cfg=1.0, cond=cond)
        results.append(outs)
        assert control.asked == (1 if reuse else 2)
        assert done.shared == (1 if reuse else 0)
    for one, whole in zip(*results, strict=True):
        assert deviation(one, whole) <= bound(kind, 1.0)
    assert deviation(plain, results[0][0]) > 1e-2
