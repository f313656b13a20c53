"""Attention weights, multi-head output and attention with smoothed queries."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from seg_core.attention import attention_output, attention_weights, smoothed_attention
from seg_core.matrices import BlurMatrices

GRID, HEADS, DIM = (5, 7), 3, 11


def parts(draw, frames=1, dtype=torch.float64):
    return [draw(2, n, HEADS * DIM).to(dtype) for n in (35 * frames, 13, 13)]


def test_weights_agree_with_scalar_loops(draw):
    query, key = draw(5, DIM), draw(7, DIM)
    oracles.assert_near(attention_weights(query, key), oracles.attention_map(query, key))
    large = torch.full((2, 64), 200.0, dtype=torch.float16)
    assert torch.equal(attention_weights(large, large), torch.full((2, 2), 0.5))
    scaled = oracles.attention_map(query * 2.0 * math.sqrt(DIM), key)
    oracles.assert_near(attention_weights(query, key, scale=2.0), scaled)


@pytest.mark.parametrize("heads", [0, 2])
def test_heads_that_do_not_divide_the_channels_are_refused(draw, heads):
    with pytest.raises(ValueError, match=f"got {heads}"):
        attention_output(*parts(draw), heads)
    with pytest.raises(ValueError, match="must have 36 tokens, got 35"):
        smoothed_attention(*parts(draw), (6, 6), math.inf, heads=HEADS)


@pytest.mark.parametrize("kernel", ["reference", "full"])
@pytest.mark.parametrize("sigma", [0.0, 1.5, math.inf])
@pytest.mark.parametrize(
    ("frames", "dtype"),
    [(2, torch.float64), (1, torch.float32), (1, torch.bfloat16), (1, torch.float16)],
)
def test_smoothed_attention_is_attention_of_densely_blurred_queries(
    draw, frames, dtype, sigma, kernel
):
    query, key, value = parts(draw, frames, dtype=dtype)
    grid = (frames, *GRID)
    expected = oracles.multi_head(oracles.blurred(query, grid, sigma, kernel), key, value, HEADS)
    before = [tensor.clone() for tensor in (query, key, value)]
    actual = smoothed_attention(query, key, value, grid, sigma, heads=HEADS, kernel=kernel)
    assert actual.dtype == dtype
    oracles.assert_near(actual, expected)
    actual.add_(1.0)  # the output may be written to
    for tensor, copy in zip((query, key, value), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize(("sigma", "asked"), [(1.5, 70), (math.inf, 2)])
def test_the_host_s_attention_gets_all_blurred_queries_or_one_per_frame(draw, sigma, asked):
    query, key, value = parts(draw, frames=2)
    grid, kept, seen = (2, *GRID), BlurMatrices(), []

    def attend(q, k, v):
        seen.append((q, k is key, v is value))
        return q

    found = smoothed_attention(
        query, key, value, grid, sigma, heads=1, attend=attend, matrices=kept
    )
    ((queries, *rest),) = seen
    assert rest == [True, True]
    assert queries.shape[1] == asked
    oracles.assert_near(found, oracles.blurred(query, grid, sigma, "reference"))
    assert len(kept) == (0 if math.isinf(sigma) else 2)
