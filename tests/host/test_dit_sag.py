"""Self-Attention Guidance on diffusion transformers, and what its mask takes in memory."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from choice import each
from comfy_extras.nodes_sag import attention_basic_with_sim
from dit_models import ALL, KINDS, TINY, sample_dit, tiny_dit
from dit_oracle import (
    OVERRIDE,
    PIXELS,
    entered,
    float64_rotary,
    found_rows,
    grid_size,
    selector,
    shape_of,
)
from family_oracle import blurred_where_attended, guide
from host_oracle import deviation

from benchmarks.counting import PeakBytes
from seg_core import column_mass

PICTURES = [kind for kind in ALL if not TINY[kind].sound and kind in {*KINDS, "ltx2_silent"}]
CORE = [kind for kind in KINDS if kind in ("flux", "sd3", "qwen", "lumina2", "wan")]
SIGMA = 2.0
CELLS = {"whole": (3, 4), "odd": (2.5, 3.5)}
sag = functools.partial(guide, "SAG", scale=0.5, blur_sigma=SIGMA)


@pytest.fixture(autouse=True)
def _float64():
    with float64_rotary():
        yield


@functools.cache
def model_of(kind):
    return tiny_dit(kind)


def additive(mask):
    """Return a mask as numbers to add to `(batch, heads, queries, keys)`."""
    mask = mask.reshape(-1, *[1] * (4 - mask.ndim), *mask.shape[1:])
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    return mask


def drawn(query, key, heads, mask, rows, split):
    """Return the attention that the image's tokens draw from each other, by a whole map."""
    if not split:
        width = query.shape[-1] // heads
        query, key = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (query, key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query @ key.mT / math.sqrt(query.shape[-1])).double()
    map_ = (logits if mask is None else logits + additive(mask)).softmax(-1)
    before = key.shape[2] - query.shape[2]  # text may have no queries
    return map_[:1, :, rows][..., before:][..., rows].sum(2).mean(1)


def by_hand(kind, blocks, shape, size, state):
    """Return a model guided by the formula, with whole maps of blocks; `state` is of `entered`."""
    rows, _ = found_rows(tiny_dit(kind), kind, shape_of(kind, size))
    grid, unit = grid_size(kind, shape), TINY[kind].unit
    seen = []

    def record(func, query, key, value, heads=None, *args, **kwargs):
        state["call"] += 1
        if state["block"] in blocks and state["call"] == 0:
            mask = kwargs.get("mask", args[0] if args else None)
            seen.append(drawn(query, key, heads, mask, rows, kwargs.get("skip_reshape")))
        return func(query, key, value, heads, *args, **kwargs)

    def attention():
        each = torch.stack([mass.reshape(grid) for mass in seen[-len(blocks) :]])
        maps = (each / each.mean((2, 3), keepdim=True)).mean(0)
        maps = maps.repeat_interleave(unit, 1).repeat_interleave(unit, 2)
        return maps[:, : shape[-2], : shape[-1]].reshape(1, 1, *shape[2:])

    model = model_of(kind).clone()
    model.model_options["transformer_options"][OVERRIDE] = record
    return blurred_where_attended(model, attention, 0.5, SIGMA)


def one_step(model, kind, shape):
    return sample_dit(model, kind, shape, steps=1, cfg=1.0)


@pytest.mark.parametrize(
    *each(
        lambda kind, size: size == "whole" or (TINY[kind].odd and TINY[kind].unit > 1),
        kind=PICTURES, size=CELLS,
    )
)  # fmt: skip
def test_one_step_equals_the_formula_with_a_whole_map(kind, size):
    blocks = [1] if kind in PIXELS else [1, 2]
    shape = shape_of(kind, CELLS[size])
    with entered(model_of(kind), kind) as state:
        expected = one_step(by_hand(kind, blocks, shape, CELLS[size], state), kind, shape)
    ours = sag(model_of(kind), blocks=selector(model_of(kind), kind, blocks))
    assert deviation(one_step(ours, kind, shape), expected) < 1e-4
    assert deviation(expected, one_step(model_of(kind), kind, shape)) > 1e-3


@pytest.mark.parametrize("kind", CORE)
def test_auto_looks_at_the_first_block_of_the_middle_range(kind):
    shape, model = shape_of(kind, (3, 4)), model_of(kind)
    auto, named = (
        one_step(sag(model, blocks=blocks), kind, shape)
        for blocks in ("auto", selector(model, kind, [1]))
    )
    assert torch.equal(auto, named)


@pytest.mark.parametrize("kind", CORE)
def test_a_threshold_of_nothing_blurs_everywhere_and_a_high_one_nowhere(kind):
    shape, model = shape_of(kind, (3, 4)), model_of(kind)
    everywhere, low, middle, high, plain = (
        one_step(m, kind, shape)
        for m in (sag(model, mask="everywhere"), sag(model, threshold=0.0), sag(model),
                  sag(model, threshold=100.0), model)
    )  # fmt: skip
    assert deviation(low, everywhere) < 1e-6
    assert deviation(middle, everywhere) > 1e-3
    assert deviation(high, plain) < 1e-6


@pytest.mark.skipif("ltx2" not in KINDS, reason="this ComfyUI has no such network")
@pytest.mark.parametrize("mask", ["attention", "everywhere"])
def test_a_latent_that_sound_shares_is_no_picture_to_blur(mask):
    with pytest.raises(ValueError, match=r"sound and picture packed together"):
        one_step(sag(tiny_dit("ltx2"), mask=mask), "ltx2", shape_of("ltx2", (3, 4)))


# Memory.

HEADS, DIM = 10, 640


def peak(function, tokens):
    q, k, v = (torch.empty(1, tokens, DIM, device="meta") for _ in range(3))
    with PeakBytes() as memory:
        function(q, k, v)
    return memory.peak


@pytest.mark.parametrize("tokens", [4096, 16384])
def test_the_mask_takes_at_most_a_twentieth_of_cores_map(tokens):
    ours = peak(lambda q, k, _v: column_mass(q, k, HEADS), tokens)
    core = peak(lambda q, k, v: attention_basic_with_sim(q, k, v, HEADS), tokens)
    assert core >= HEADS * tokens**2 * 4, "the count sees core's map"
    assert ours <= 0.05 * core


def test_the_count_sees_a_map_that_is_not_cut_into_chunks():
    whole = peak(lambda q, k, _v: column_mass(q, k, HEADS, chunk=4096), 4096)
    assert whole >= HEADS * 4096**2 * 4
