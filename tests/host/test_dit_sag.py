"""Self-Attention Guidance on diffusion transformers, and what its mask takes in memory."""

from __future__ import annotations

import functools

import pytest
import torch
from choice import each
from comfy_extras.nodes_sag import attention_basic_with_sim
from dit_models import ALL, KINDS, TINY, sampled, shape_of, tiny_dit
from dit_oracle import LAST, PIXELS, entered, exact_model, found_rows, grid_size, selector
from family_oracle import blurred_where_attended, drawn, guide
from host_oracle import by_head, deviation
from stand_ins import attention_override

from benchmarks.counting import PeakBytes
from seg_core import column_mass

PICTURES = [kind for kind in ALL if not TINY[kind].sound and kind in {*KINDS, "ltx2_silent"}]
SIGMA = 2.0
CELLS = {"whole": (3, 4), "odd": (2.5, 3.5)}
sag = functools.partial(guide, "SAG", scale=0.5, blur_sigma=SIGMA)


def by_hand(kind, blocks, shape, size, state):
    """Return a model guided by the formula, with whole maps of blocks; `state` is of `entered`."""
    rows, length = found_rows(tiny_dit(kind), kind, shape_of(kind, size))
    rows = list(range(len(rows))) if kind in LAST else rows
    grid, unit = grid_size(kind, shape), TINY[kind].unit
    seen = []

    def record(func, query, key, value, heads=None, *args, **kwargs):
        state["call"] += 1
        is_own = key.shape[-2] == length if kind in LAST else state["call"] == 0
        if state["block"] in blocks and is_own:
            mask = kwargs.get("mask", args[0] if args else None)
            seen.append(drawn(*by_head((query, key), heads, kwargs), rows, mask)[:1])
        return func(query, key, value, heads, *args, **kwargs)

    def attention():
        each = torch.stack([mass.reshape(grid) for mass in seen[-len(blocks) :]])
        maps = (each / each.mean((2, 3), keepdim=True)).mean(0)
        maps = maps.repeat_interleave(unit, 1).repeat_interleave(unit, 2)
        return maps[:, : shape[-2], : shape[-1]].reshape(1, 1, *shape[2:])

    model = attention_override(record)(exact_model(kind))
    return blurred_where_attended(model, attention, 0.5, SIGMA)


def one_step(model, kind, shape):
    return sampled(model, kind, shape, steps=1, cfg=1.0)


@pytest.mark.parametrize(
    *each(
        lambda kind, size: size == "whole" or (TINY[kind].odd and TINY[kind].unit > 1),
        kind=PICTURES, size=CELLS,
    )
)  # fmt: skip
def test_one_step_equals_the_formula_with_a_whole_map(kind, size):
    blocks = [1] if kind in PIXELS else [1, 2]
    shape = shape_of(kind, CELLS[size])
    with entered(exact_model(kind)) as state:
        expected = one_step(by_hand(kind, blocks, shape, CELLS[size], state), kind, shape)
    ours = sag(exact_model(kind), blocks=selector(exact_model(kind), kind, blocks))
    assert deviation(one_step(ours, kind, shape), expected) < 1e-4
    assert deviation(expected, one_step(exact_model(kind), kind, shape)) > 1e-3


@pytest.mark.skipif("ltx2" not in KINDS, reason="this ComfyUI has no such network")
@pytest.mark.parametrize("mask", ["attention", "everywhere"])
def test_a_latent_that_sound_shares_is_no_picture_to_blur(mask):
    with pytest.raises(ValueError, match=r"sound and picture packed together"):
        one_step(sag(tiny_dit("ltx2"), mask=mask), "ltx2", shape_of("ltx2"))


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
