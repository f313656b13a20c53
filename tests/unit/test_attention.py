"""Attention weights, multi-head output and attention with smoothed queries."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from seg_core.attention import attention_output, attention_weights, smoothed_attention
from seg_core.matrices import BlurMatrices

GRID, HEADS, DIM = (5, 7), 3, 11


def parts(generator, frames=1, keys=13, dtype=torch.float64):
    def draw(tokens):
        return torch.randn(2, tokens, HEADS * DIM, generator=generator, dtype=torch.float64)

    return [draw(n).to(dtype) for n in (35 * frames, keys, keys)]


def test_weights_agree_with_scalar_loops(generator):
    query, key = (torch.randn(n, DIM, generator=generator, dtype=torch.float64) for n in (5, 7))
    oracles.assert_near(attention_weights(query, key), oracles.attention_map(query, key))
    large = torch.full((2, 64), 200.0, dtype=torch.float16)
    assert torch.equal(attention_weights(large, large), torch.full((2, 2), 0.5))
    scaled = oracles.attention_map(query * 2.0 * math.sqrt(DIM), key)
    oracles.assert_near(attention_weights(query, key, scale=2.0), scaled)


def test_multi_head_output_agrees_with_scalar_loops(generator):
    query, key, value = parts(generator)
    expected = oracles.multi_head(query, key, value, HEADS)
    oracles.assert_near(attention_output(query, key, value, HEADS), expected)
    with pytest.raises(AssertionError):
        oracles.assert_near(attention_output(query, key, value, DIM), expected)


@pytest.mark.parametrize("heads", [0, 2])
def test_heads_that_do_not_divide_the_channels_are_refused(generator, heads):
    with pytest.raises(ValueError, match=f"got {heads}"):
        attention_output(*parts(generator), heads)
    with pytest.raises(ValueError, match="must have 36 tokens, got 35"):
        smoothed_attention(*parts(generator), (6, 6), math.inf, heads=HEADS)


@pytest.mark.parametrize("kernel", ["reference", "full"])
@pytest.mark.parametrize("sigma", [0.0, 1.5, math.inf])
@pytest.mark.parametrize("frames", [1, 2])
def test_smoothed_attention_is_attention_of_densely_blurred_queries(
    generator, frames, sigma, kernel
):
    query, key, value = parts(generator, frames)
    grid = (frames, *GRID)
    expected = oracles.multi_head(oracles.blurred(query, grid, sigma, kernel), key, value, HEADS)
    before = [tensor.clone() for tensor in (query, key, value)]
    actual = smoothed_attention(query, key, value, grid, sigma, heads=HEADS, kernel=kernel)
    oracles.assert_near(actual, expected)
    actual.add_(1.0)  # the output may be written to
    for tensor, copy in zip((query, key, value), before, strict=True):
        assert torch.equal(tensor, copy)


def test_infinite_blur_asks_the_host_for_one_query_per_frame(generator):
    query, key, value = parts(generator, frames=2)
    asked = []

    def attend(q, k, v):
        asked.append((q.shape, k is key, v is value))
        return attention_output(q, k, v, HEADS)

    actual = smoothed_attention(query, key, value, (2, *GRID), math.inf, heads=1, attend=attend)
    assert asked == [((2, 2, HEADS * DIM), True, True)]
    rows = actual.reshape(2, 2, 35, HEADS * DIM)
    assert torch.equal(rows, rows[:, :, :1].expand_as(rows))


def test_finite_blur_asks_the_host_for_all_queries(generator):
    query, key, value = parts(generator)
    kept = BlurMatrices()
    seen = []

    def attend(q, k, v):
        del k, v
        seen.append(q)
        return q

    smoothed_attention(query, key, value, GRID, 1.5, heads=1, attend=attend, matrices=kept)
    oracles.assert_near(seen[0], oracles.blurred(query, (1, *GRID), 1.5, "reference"))
    assert len(kept) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sigma", [1.5, math.inf])
def test_the_output_has_the_dtype_of_the_input(generator, dtype, sigma):
    query, key, value = parts(generator, dtype=dtype)
    actual = smoothed_attention(query, key, value, GRID, sigma, heads=HEADS)
    assert actual.dtype == dtype
    smooth = oracles.blurred(query, (1, *GRID), sigma, "reference")
    oracles.assert_near(actual, oracles.multi_head(smooth, key, value, HEADS))
