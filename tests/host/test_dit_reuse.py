"""Passing over blocks of diffusion transformers: the same latents, and fewer blocks computed."""

from __future__ import annotations

import math

import comfy.controlnet
import pytest
import torch
from dit_models import TINY, available, prompt, sample_dit, tiny_dit
from dit_oracle import block_modules, entered, selector, shape_of
from host_models import noise_like, seg
from host_oracle import deviation
from reuse_checks import ROUNDING, reported

KINDS = [kind for kind in TINY if available(kind) and kind != "anima"]  # slow; as cosmos2
NO_HOOK = (
    "lumina2", "zimage", "cosmos1", "cosmos2", "krea2", "hidream", "omnigen2", "boogu",
    "cogvideox", "ideogram4", "pixeldit",
)  # fmt: skip
WITHOUT = {
    **dict.fromkeys(NO_HOOK, "this network offers no hook to pass over blocks"),
    "kandinsky5": "this network's hook around blocks does not work",
}
EXACT = [kind for kind in KINDS if kind not in WITHOUT]
TWO_LISTS = [kind for kind in EXACT if kind in ("flux", "flux2", "chroma", "radiance", "aura",
                                                "hunyuan_video", "hunyuan_image")]  # fmt: skip


def run(kind, *, reuse, numbers=(2,), around=lambda model: model, **options):
    """Return latents, the report of a run, and which blocks were entered in it."""
    model = tiny_dit(kind)
    shape = options.pop("shape", None) or shape_of(kind, (3, 4))
    blocks = selector(model, kind, numbers)
    guided = around(seg(model, 3.0, math.inf, blocks=blocks, reuse=reuse))
    with reported() as reports, entered(model, kind) as state:
        latents = sample_dit(guided, kind, shape, **options)
    ((report, _),) = reports
    return latents, report, state["runs"]


def check(kind, *, bitwise=False, passes=2, **options):
    """Require that reuse on and off agree, and that every pass was shared."""
    on, report, few = run(kind, reuse=True, **options)
    off, _, all_ = run(kind, reuse=False, **options)
    assert not report.full, report.full
    assert sum(report.shared.values()) == passes
    if bitwise:
        assert torch.equal(on, off)
    else:
        assert deviation(on, off) <= ROUNDING
    first = min(options.get("numbers", (2,)))
    assert len(all_) - len(few) == first * passes, "the blocks before the first were passed over"
    return on


@pytest.mark.parametrize("kind", EXACT)
def test_one_prompt_without_cfg_is_bitwise_the_same(kind):
    check(kind, bitwise=True, cfg=1.0)


@pytest.mark.parametrize("kind", EXACT)
def test_two_prompts_agree_to_rounding(kind):
    check(kind)


@pytest.mark.parametrize("kind", TWO_LISTS)
def test_a_block_of_the_second_list_passes_over_all_of_the_first(kind):
    check(kind, numbers=(len(block_modules(tiny_dit(kind), kind)) - 1,), bitwise=True, cfg=1.0)


@pytest.mark.parametrize("kind", [kind for kind in EXACT if TINY[kind].refs])
def test_with_reference_images(kind):
    check(kind, cond=TINY[kind].refs, bitwise=True, cfg=1.0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in WITHOUT])
def test_a_network_without_hooks_runs_full_passes_and_says_why(kind):
    latents, report, _ = run(kind, reuse=True)
    off, _, _ = run(kind, reuse=False)
    assert torch.equal(latents, off)
    assert not report.shared
    assert {reason for _, reason in report.full} == {WITHOUT[kind]}


def test_the_first_block_leaves_nothing_to_pass_over():
    _, report, _ = run("flux", reuse=True, numbers=(0, 3))
    assert {reason for _, reason in report.full} == {"the first block is perturbed"}


def test_two_nodes_begin_each_at_its_own_block():
    results = {}
    for reuse in (True, False):
        model = tiny_dit("flux")
        guided = seg(model, 2.0, math.inf, blocks="double.1", reuse=reuse)
        guided = seg(guided, 2.0, 1.5, blocks="single.1", reuse=reuse)
        with entered(model, "flux") as state:
            results[reuse] = sample_dit(guided, "flux", shape_of("flux", (3, 4)), cfg=1.0)
        results[reuse, "runs"] = len(state["runs"])
    assert torch.equal(results[True], results[False])
    assert results[False, "runs"] - results[True, "runs"] == 2 * (1 + 3)


def test_area_conds_in_a_batch_are_told_apart():
    shape = shape_of("flux", (4, 4), batch=2)
    positive = prompt("flux", shape, 1, area=(4, 8, 0, 0), strength=0.7)
    positive += prompt("flux", shape, 3, area=(4, 8, 4, 0)) + prompt("flux", shape, 4)
    check("flux", shape=shape, positive=positive, passes=4)


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
    plain, _, _ = run(kind, reuse=True, numbers=numbers, cfg=1.0)
    results = {}
    for reuse in (True, False):
        control = FixedControl({"input": [], **residuals})
        cond = {"control": control, "control_apply_to_uncond": False}
        latents, report, _ = run(kind, reuse=reuse, numbers=numbers, cfg=1.0, cond=cond)
        results[reuse] = latents
        assert control.asked == (2 if reuse else 4)
        assert sum(report.shared.values()) == (2 if reuse else 0)
    assert torch.equal(results[True], results[False])
    assert deviation(plain, results[True]) > 1e-2
