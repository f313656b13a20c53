"""What guidance costs in floating-point operations and reads, counted on the true networks.

On the meta device, through ComfyUI's own guider. Counted are matrix products, convolutions and
attention (torch's formula of its fused kernel: 4 * queries * keys * channels); nothing else is.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math

import pytest
import torch
from choice import each, some
from comfy.ldm.modules import attention
from dit_models import KINDS, sampled, tiny_dit
from dit_oracle import KEYS_TOO
from family_oracle import guide
from host_models import part, sample, seg, shared_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models, variants
from benchmarks.counting import ParametersRead, PeakBytes, count
from benchmarks.step import on_meta
from benchmarks.variants import CFG, FINITE, PAG, SEG_OFF, SEG_ON, Variant

pytestmark = pytest.mark.current_only


@functools.cache
def bench(name):
    node = part("seg").SEGuidance
    return variants.Bench(models.KINDS[name], torch.device("meta"), torch.float16, node)


@functools.cache
def counted(name, method, cfg, control=False, **changes):
    variant = Variant(method, cfg, control, **changes)
    with on_meta():
        return count(bench(name).step(variant, models.KINDS[name].size), variant.every)


WITH_CONTROL = "with a ControlNet"
FIGURES = {
    # of a step in units of the same step without guidance, at cfg 7 and at cfg 1
    ("sdxl", SEG_ON): (1.331, 1.662),
    ("sdxl", WITH_CONTROL): (1.230, 1.458),
    ("sdxl", SEG_OFF): (1.494, 1.987),
    ("sdxl", PAG): (1.496, 1.992),
    ("sdxl", variants.OUR_PAG): (1.331, 1.662),
    ("sdxl", variants.OUR_TPG): (1.447, 1.893),
    ("sdxl", variants.OUR_SSG): (1.279, 1.557),
    ("sdxl", variants.OUR_SLG): (1.288, 1.576),
    ("sdxl", variants.OUR_SAG): (1.500, 2.000),
    ("sdxl", variants.SEG_AND_PAG): (1.662, 2.325),
    ("sdxl", variants.SEG_AND_SLG): (1.619, 2.238),
    ("sdxl", variants.CORE_SAG): (1.500, 3.000),
    ("sd15", SEG_ON): (1.342, 1.685),
    ("sd15", SEG_OFF): (1.500, 1.999),
    ("sd15", PAG): (1.500, 2.000),
    ("sd15", variants.OUR_PAG): (1.342, 1.685),
    ("sd15", variants.OUR_TPG): (1.457, 1.914),
    ("sd15", variants.OUR_SSG): (1.343, 1.685),
    ("sd15", variants.OUR_SLG): (1.340, 1.680),
    ("sd15", variants.OUR_SAG): (1.500, 2.000),
    ("sd15", variants.SEG_AND_PAG): (1.684, 2.369),
    ("sd15", variants.SEG_AND_SLG): (1.682, 2.364),
}
CFGS = (7.0, 1.0)
JOINED = (variants.OUR_PAG, variants.OUR_TPG, variants.OUR_SSG, variants.OUR_SLG,
          variants.SEG_AND_PAG, variants.SEG_AND_SLG)  # fmt: skip
CASES = {
    # Steps of one network that share its plain steps.
    "SDXL": ("sdxl", (SEG_ON, WITH_CONTROL), CFGS),
    "SD1.5": ("sd15", (SEG_ON, SEG_OFF, *JOINED), (1.0,)),
    "SD1.5 at cfg 7": ("sd15", (SEG_ON, SEG_OFF, *JOINED), (7.0,)),
    "SDXL's relatives": ("sdxl", JOINED, CFGS),
    "whole passes of SDXL": ("sdxl", (SEG_OFF, PAG, variants.OUR_SAG, variants.CORE_SAG), CFGS),
    "whole passes of SD1.5": ("sd15", (PAG, variants.OUR_SAG), CFGS),
}


@pytest.mark.parametrize("case", some(CASES, "SDXL", "SD1.5"))
def test_a_step_costs_what_the_tables_say_and_reads_each_weight_once(case):
    name, methods, cfgs = CASES[case]
    for method, cfg in itertools.product(methods, cfgs):
        control = method == WITH_CONTROL
        plain = counted(name, CFG, cfg, control)
        step = counted(name, SEG_ON if control else method, cfg, control)
        figure = FIGURES[name, method][CFGS.index(cfg)]
        assert step.flops / plain.flops == pytest.approx(figure, abs=0.006), (method, cfg)
        reads = 1.0 if method in (SEG_ON, WITH_CONTROL, *JOINED) else 2.0
        assert step.parameters_read / plain.parameters_read == pytest.approx(reads, abs=0.02)
        if (name, method) == ("sdxl", SEG_ON):  # the memory of a batch with the joined rows
            extra, rows = step.peak_bytes - plain.peak_bytes, 1 + (cfg > 1)
            assert 100e6 < extra <= 1.15 * plain.peak_bytes / rows


@pytest.mark.long
def test_a_finite_blur_costs_a_little_more_and_a_later_block_less():
    def cost(**changes):
        return counted("sd15", SEG_ON, 1.0, **changes).flops

    early, middle, late = (cost(blocks=blocks) for blocks in ("early", "middle", "late"))
    assert early > middle > late
    assert middle < cost(sigma=FINITE) < 1.01 * middle
    reads = counted("sd15", CFG, 1.0).parameters_read
    assert counted("sd15", SEG_ON, 1.0, blocks="late").parameters_read <= 1.02 * reads


def test_one_query_attends_where_it_stands_for_all(monkeypatch):
    attend, seen = attention.optimized_attention, []

    def counting(query, *args, **kwargs):
        seen.append(query.shape[:2])
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(attention, "optimized_attention", counting)
    for sigma in (math.inf, 1.3):
        seen.clear()
        sample(seg(shared_model(), sigma=sigma, blocks="m0.0"), steps=1)
        assert seen.count((1, 1)) == math.isinf(sigma)  # a row, a query


def test_a_strength_below_1_costs_the_plain_attention_of_the_perturbed_rows_alone():
    added = []
    for cfg in CFGS:  # of two prompts, and of one
        flops = []
        for strength in (0.5, 1.0):
            model = seg(shared_model(), 3.0, 1.3, strength=strength)
            with FlopCounterMode(display=False) as counter:
                sample(model, cfg=cfg, steps=1)
            flops.append(counter.get_total_flops())
        added.append(flops[0] - flops[1])
    assert added[0] == added[1] > 0


# Transformers.

NODES = {
    "SEG": ("SEG",), "TPG": ("TPG",), "SLG": ("SLG",), "SEG and PAG": ("SEG", "PAG"),
    "all": ("SEG", "PAG", "TPG", "SLG"),
}  # fmt: skip


def read_by_a_run(model, kind, cfg):
    with ParametersRead([model.model]) as counter:
        sampled(model, kind, steps=1, cfg=cfg)
    return counter.read


@pytest.mark.parametrize(
    *each(
        lambda kind, nodes, **_: kind not in KEYS_TOO or nodes in ("SEG", "SEG and PAG"),
        kind=KINDS, nodes=NODES, cfg=CFGS,
    )
)  # fmt: skip
def test_a_guided_step_of_a_transformer_reads_each_weight_once(kind, nodes, cfg):
    base = tiny_dit(kind)
    sampled(base, kind, steps=1, cfg=cfg)  # ComfyUI's first steps
    plain = read_by_a_run(base, kind, cfg)
    model = base
    for node in NODES[nodes]:
        model = guide(node, model, 3.0)
    assert plain <= read_by_a_run(model, kind, cfg) <= 1.02 * plain
    if nodes == "SEG":
        assert read_by_a_run(seg(base, reuse=False), kind, cfg) > 1.6 * plain


# What is counted, and that it is counted right.


class CountsCopies(TorchDispatchMode):
    """Counts copies of latents."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.copies = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        clones = function is torch.ops.aten.clone.default
        self.copies += clones and tuple(args[0].shape) == self.shape
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["SEG", "SLG", "SAG"])
def test_steps_before_the_window_copy_no_latent(method):
    counts = []
    for model in (shared_model(), guide(method, shared_model(), start=0.9)):
        with CountsCopies((1, 4, 6, 8)) as counted:
            sample(model, steps=4, last_step=2, size=(6, 8))
        counts.append(counted.copies)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("flops_too", [False, True])
def test_the_parameters_read_agree_with_a_count_by_hand(flops_too):
    linear = torch.nn.Linear(30, 20, device="meta")
    norm = torch.nn.GroupNorm(2, 4, device="meta")
    tokens, image = torch.empty(7, 30, device="meta"), torch.empty(2, 4, 8, 8, device="meta")
    inner = FlopCounterMode(display=False) if flops_too else contextlib.nullcontext()
    by_hand = 0
    with torch.inference_mode(), ParametersRead([linear, norm]) as counter, inner:
        for read, size in (
            (lambda: norm(linear(tokens).new_empty(image.shape)), 30 * 20 + 20 + 4 + 4),
            (lambda: linear(tokens[:3]), 30 * 20 + 20),
            (lambda: torch.nn.Linear(30, 5, device="meta")(tokens), 0),  # others' weights
            (lambda: linear.weight.t()[:4].view(4, 20).detach().to("meta"), 0),  # views
            (lambda: tokens @ linear.weight[:5].t(), 5 * 30),  # a part
            (lambda: linear.weight.half().square(), 30 * 20),  # and a copy of it
            (lambda: tokens * linear.bias[:1].expand(7, 30), 20),  # at most all of it
        ):
            read()
            by_hand += size
            assert counter.read == by_hand


def test_peak_memory_counts_what_lives_at_once():
    with PeakBytes() as memory:
        first = torch.zeros(100, device="meta") + 1
        second = first[:50] * 2
        del first, second
        torch.zeros(10, device="meta")
    assert memory.peak == 4 * (100 + 100)
