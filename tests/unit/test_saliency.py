"""Column sums of attention, the mask made of them, and the blur of a latent."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seg_core.saliency import blur_latent, column_mass, saliency_mask

HEADS, DIM = 3, 11


def pair(generator, queries=35, keys=13, dtype=torch.float64):
    def draw(tokens):
        return torch.randn(2, tokens, HEADS * DIM, generator=generator, dtype=torch.float64)

    return draw(queries).to(dtype), draw(keys).to(dtype)


def dense_mass(query, key):
    rows = []
    for q, k in zip(query, key, strict=True):
        heads = zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), strict=True)
        rows.append(sum(oracles.attention_map(a, b).sum(0) for a, b in heads) / HEADS)
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [1, 2, 11, 35, 1000, None])
def test_mass_agrees_with_the_dense_map_whatever_the_chunk(generator, chunk):
    query, key = pair(generator)
    oracles.assert_near(column_mass(query, key, HEADS, chunk=chunk), dense_mass(query, key))
    square = pair(generator, keys=35)
    with pytest.raises(AssertionError):  # the sums of rows
        oracles.assert_near(column_mass(*square[::-1], HEADS), dense_mass(*square))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mass_is_float32_at_least(generator, dtype):
    query, key = pair(generator, dtype=dtype)
    mass = column_mass(query, key, HEADS)
    assert mass.dtype == torch.float32
    oracles.assert_near(mass, dense_mass(query, key))


def test_the_mask_shows_each_token_at_its_place():
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


def test_a_video_mask_keeps_its_frames_apart():
    mass = torch.zeros(1, 3 * 35)
    mass[0, 35:70] = 3.0
    mask = saliency_mask(mass, (3, 5, 7), 1.0, (6, 5, 7))
    assert mask.shape == (1, 1, 6, 5, 7)
    assert mask.sum(dim=(0, 1, 3, 4)).tolist() == [0.0, 0.0, 35.0, 35.0, 0.0, 0.0]


@pytest.mark.parametrize("sigma", [0.5, 2.0, math.inf])
def test_the_reference_blur_has_nine_taps_reflected(generator, sigma):
    latent = torch.randn(2, 3, 11, 13, generator=generator, dtype=torch.float64)
    offsets = torch.arange(-4.0, 5.0, dtype=torch.float64)
    taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
    taps /= taps.sum()
    padded = torch.nn.functional.pad(latent, (4, 4, 4, 4), mode="reflect")
    kernel = torch.outer(taps, taps).expand(3, 1, 9, 9)
    expected = torch.nn.functional.conv2d(padded, kernel, groups=3)
    oracles.assert_near(blur_latent(latent, sigma), expected)
    video = latent.unflatten(0, (1, 2)).transpose(1, 2)
    frames = expected.unflatten(0, (1, 2)).transpose(1, 2)
    oracles.assert_near(blur_latent(video, sigma), frames)


def test_the_full_blur_is_as_wide_as_sigma_needs(generator):
    latent = torch.randn(2, 3, 11, 13, generator=generator, dtype=torch.float64)
    tokens = latent.flatten(2).mT
    expected = oracles.blurred(tokens, (1, 11, 13), 4.0, "full").mT.reshape(latent.shape)
    oracles.assert_near(blur_latent(latent, 4.0, kernel="full"), expected)
    mean = latent.mean(dim=(2, 3), keepdim=True).expand_as(latent)
    oracles.assert_near(blur_latent(latent, math.inf, kernel="full"), mean)


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
        (lambda x: saliency_mask(torch.ones(1, 36), (5, 7), 1.0, (5, 7)), "got 36"),
        (lambda x: saliency_mask(torch.ones(1, 105), (3, 5, 7), 1.0, (5, 7)), "have three sizes"),
        (lambda x: blur_latent(x[None], -1.0), "0 or more"),
        (lambda x: blur_latent(x[None], 1.0, kernel="box"), "reference, full"),
    ],
)
def test_what_is_impossible_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make(torch.ones(2, 5, 7))
