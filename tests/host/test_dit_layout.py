"""Which queries are smoothed: each image token's, over its own grid, and no other token's."""

from __future__ import annotations

import math

import pytest
import torch
from choice import each
from dit_models import ALL, TINY, VARIANTS, sample_dit, tiny_dit
from dit_oracle import (
    FIRST,
    blur_of,
    grid_size,
    image_rows,
    selector,
    shape_of,
    varied,
    watched,
    without_refiners,
)
from host_models import seg

# SD3.5's image attends to itself a second time, and so does Boogu's.
TWO_CALLS = {"sd3", "boogu"}
CELLS = {"landscape": (3, 4), "portrait": (5, 2), "odd": (2.5, 3.5)}


def queries_of_first_block(kind, shape, sigma, cond=None):
    """Return plain and smoothed queries before and in the first block, call by call."""
    model = without_refiners(tiny_dit(kind))
    noise = varied(kind, shape)
    options = {"steps": 1, "cfg": 1.0, "noise": noise, "cond": cond}
    with watched(model, kind) as (spied, seen):
        guided = seg(spied, 1.0, sigma, blocks=selector(model, kind, [0]), reuse=False)
        sample_dit(guided, kind, noise.shape, **options)
    plain, smoothed = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [(s.block, s.call) for s in plain] == [(s.block, s.call) for s in smoothed]
    return [(a, b) for a, b in zip(plain, smoothed, strict=True) if a.block in (None, 0)]


def check(kind, shape, sigma, cond=None):
    """Require that exactly the image's queries are blurred, each frame over its grid."""
    grid = grid_size(kind, shape)
    blur = blur_of(grid, sigma)
    changed_calls = 0
    for plain, smoothed in queries_of_first_block(kind, shape, sigma, cond):
        if plain.block is None:
            if changed_calls == 0:  # refiners before the blocks
                assert torch.equal(plain.query, smoothed.query)
            continue
        if kind in FIRST and plain.call > 0:  # cross-attention, whose input has changed
            first = smoothed.query[:, :1].expand_as(smoothed.query)
            assert not torch.equal(smoothed.query, first)
            continue
        rows = image_rows(plain.query)
        others = [n for n in range(plain.query.shape[1]) if n not in rows]
        assert torch.equal(plain.query[:, others], smoothed.query[:, others])
        expected = torch.einsum("pt,btd->bpd", blur, plain.query[:, rows].double())
        assert (smoothed.query[:, rows] - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (plain.query[:, rows] - smoothed.query[:, rows]).abs().max() > 1e-2
        if math.isinf(sigma):
            frames = smoothed.query[:, rows].unflatten(1, (grid[0], -1))
            assert torch.equal(frames, frames[:, :, :1].expand_as(frames))
        changed_calls += 1
    assert changed_calls == (2 if kind in TWO_CALLS else 1)


def takes(kind, size):
    """Tell whether a family takes a size, and another one than its relatives."""
    tiny = TINY[kind]
    if kind in VARIANTS:
        return size == "landscape"
    return size != "odd" or (tiny.odd and tiny.unit > 1)


@pytest.mark.parametrize(*each(takes, kind=ALL, size=CELLS))
def test_exactly_the_images_queries_are_smoothed_over_their_own_grid(kind, size):
    check(kind, shape_of(kind, CELLS[size]), math.inf if size == "portrait" else 0.7)


# The host takes a reference image of HunyuanVideo for one sample only; see the dense reference.
@pytest.mark.parametrize(
    "kind", [kind for kind in ALL if TINY[kind].refs and kind != "hunyuan_video"]
)
def test_reference_images_keep_their_queries(kind):
    check(kind, shape_of(kind, (3, 4)), 0.7, cond=TINY[kind].refs)
