"""Column sums of attention, the mask made of them, and the blur of a latent."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seg_core.saliency import blur_latent, column_mass, frame_shares, saliency_mask

HEADS, DIM = 3, 11


def pair(draw, dtype=torch.float64):
    return [draw(2, tokens, HEADS * DIM).to(dtype) for tokens in (35, 13)]


def dense_mass(query, key, scale=DIM**-0.5, mask=None):
    q, k = (t.double().unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (query, key))
    logits = scale * q @ k.mT
    if mask is not None:
        is_boolean = mask.dtype == torch.bool
        logits = logits.masked_fill(~mask, -torch.inf) if is_boolean else logits + mask
    return logits.softmax(-1).sum(dim=2).mean(dim=1)


@pytest.mark.parametrize("chunk", [1, 2, 11, 35, 1000, None])
def test_mass_agrees_with_the_dense_map_whatever_the_chunk(draw, chunk):
    query, key = pair(draw)
    oracles.assert_near(column_mass(query, key, HEADS, chunk=chunk), dense_mass(query, key))


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 13), (2, HEADS, 1, 13), (1, 1, 35, 13)])
def test_mass_under_a_mask_and_a_scale(draw, shape, chunk):
    query, key = pair(draw)
    added = draw(shape)
    for mask in (added, (added > -1) | (torch.arange(13) == 0)):
        found = column_mass(query, key, HEADS, scale=0.2, mask=mask, chunk=chunk)
        oracles.assert_near(found, dense_mass(query, key, 0.2, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mass_is_float32_at_least(draw, dtype):
    query, key = pair(draw, dtype=dtype)
    mass = column_mass(query, key, HEADS)
    assert mass.dtype == torch.float32
    oracles.assert_near(mass, dense_mass(query, key))


def test_shares_are_one_on_average_in_each_frame(draw):
    mass = draw(2, 12).abs()
    frames = mass.reshape(2, 3, 4)
    expected = (frames / frames.mean(dim=2, keepdim=True)).flatten(1)
    oracles.assert_near(frame_shares(mass, (3, 2, 2)), expected)
    assert torch.equal(frame_shares(torch.zeros(1, 4), (2, 2)), torch.zeros(1, 4))


def test_the_mask_shows_each_token_at_its_place_and_in_its_frame():
    mass = torch.zeros(2, 35)
    mass[0, 2 * 7 + 4] = 3.0
    mass[1, 4 * 7 + 1] = 3.0
    mask = saliency_mask(mass, (5, 7), 1.0, (10, 14))
    expected = torch.zeros(2, 1, 10, 14)
    expected[0, 0, 4:6, 8:10] = 1.0
    expected[1, 0, 8:10, 2:4] = 1.0
    assert torch.equal(mask, expected)
    even = torch.ones(1, 35)
    assert not saliency_mask(even, (5, 7), 1.0, (5, 7)).any(), "a mass at the threshold is not"
    assert saliency_mask(even, (5, 7), 0.0, (5, 7)).all()
    clip = torch.cat([0 * even, 3 * even, 0 * even], dim=1)
    mask = saliency_mask(clip, (3, 5, 7), 1.0, (6, 5, 7))
    assert mask.shape == (1, 1, 6, 5, 7)
    assert mask.sum(dim=(0, 1, 3, 4)).tolist() == [0.0, 0.0, 35.0, 35.0, 0.0, 0.0]


@pytest.mark.parametrize(("kernel", "taps"), [("reference", 9), ("full", None)])
@pytest.mark.parametrize("sigma", [0.5, 2.0, 4.0, math.inf])
def test_a_latent_is_blurred_along_both_axes_with_nine_taps_or_all(draw, sigma, kernel, taps):
    rows, columns = (oracles.blur_matrix(size, sigma, kernel, taps) for size in (11, 13))
    for shape in ((2, 3, 11, 13), (1, 3, 2, 11, 13)):
        latent = draw(shape)
        oracles.assert_near(blur_latent(latent, sigma, kernel=kernel), rows @ latent @ columns.T)


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    sigma=st.floats(0.0, 50.0),
    kernel=st.sampled_from(["reference", "full"]),
)
def test_no_size_fails_and_a_flat_latent_stays_flat(height, width, sigma, kernel):
    for dtype in (torch.float32, torch.float16):
        latent = torch.full((1, 2, height, width), 0.7, dtype=dtype)
        result = blur_latent(latent, sigma, kernel=kernel)
        assert result.data_ptr() != latent.data_ptr()
        oracles.assert_near(result, latent)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda x: column_mass(x, x, 1, chunk=0), "at least 1 query, got 0"),
        (lambda x: frame_shares(torch.ones(1, 11), (3, 2, 2)), "must have 12 tokens"),
        (lambda x: saliency_mask(torch.ones(1, 36), (5, 7), 1.0, (5, 7)), "got 36"),
        (lambda x: saliency_mask(torch.ones(1, 105), (3, 5, 7), 1.0, (5, 7)), "have three sizes"),
        (lambda x: blur_latent(x[None], -1.0), "0 or more"),
        (lambda x: blur_latent(x[None], 1.0, kernel="box"), "reference, full"),
    ],
)
def test_what_is_impossible_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make(torch.ones(2, 5, 7))
