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


def test_the_dense_map_notices_row_sums(generator):
    query, key = pair(generator, keys=35)
    with pytest.raises(AssertionError):
        oracles.assert_near(column_mass(key, query, HEADS), dense_mass(query, key))


def test_all_mass_together_is_the_number_of_queries(generator):
    mass = column_mass(*pair(generator), HEADS)
    oracles.assert_near(mass.sum(1), torch.full((2,), 35.0))


def test_equal_keys_draw_equal_mass():
    mass = column_mass(torch.randn(1, 35, 33), torch.ones(1, 35, 33), HEADS)
    oracles.assert_near(mass, torch.ones(1, 35))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mass_is_float32_at_least(generator, dtype):
    query, key = pair(generator, dtype=dtype)
    mass = column_mass(query, key, HEADS)
    assert mass.dtype == torch.float32
    oracles.assert_near(mass, dense_mass(query, key))


def test_an_impossible_chunk_is_refused(generator):
    with pytest.raises(ValueError, match="at least 1 query, got 0"):
        column_mass(*pair(generator), HEADS, chunk=0)


def test_the_mask_shows_each_token_at_its_place():
    mass = torch.zeros(2, 35)
    mass[0, 2 * 7 + 4] = 3.0
    mass[1, 4 * 7 + 1] = 3.0
    mask = saliency_mask(mass, (5, 7), 1.0, (10, 14))
    expected = torch.zeros(2, 1, 10, 14)
    expected[0, 0, 4:6, 8:10] = 1.0
    expected[1, 0, 8:10, 2:4] = 1.0
    assert torch.equal(mask, expected)


def test_a_mass_at_the_threshold_is_not_salient():
    assert not saliency_mask(torch.ones(1, 35), (5, 7), 1.0, (5, 7)).any()
    assert saliency_mask(torch.ones(1, 35), (5, 7), 0.0, (5, 7)).all()


def test_a_video_mask_keeps_its_frames_apart():
    mass = torch.zeros(1, 3 * 35)
    mass[0, 35:70] = 3.0
    mask = saliency_mask(mass, (3, 5, 7), 1.0, (6, 5, 7))
    assert mask.shape == (1, 1, 6, 5, 7)
    assert mask.sum(dim=(0, 1, 3, 4)).tolist() == [0.0, 0.0, 35.0, 35.0, 0.0, 0.0]


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="got 36"):
        saliency_mask(torch.ones(1, 36), (5, 7), 1.0, (5, 7))
    with pytest.raises(ValueError, match="must have three sizes"):
        saliency_mask(torch.ones(1, 105), (3, 5, 7), 1.0, (5, 7))


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
    latent = torch.full((1, 2, height, width), 0.7)
    oracles.assert_near(blur_latent(latent, sigma, kernel=kernel), latent)


@pytest.mark.parametrize("kernel", ["reference", "full"])
def test_video_frames_are_blurred_one_by_one(generator, kernel):
    latent = torch.randn(2, 3, 4, 5, 7, generator=generator, dtype=torch.float64)
    together = blur_latent(latent, 1.5, kernel=kernel)
    for frame in range(4):
        alone = blur_latent(latent[:, :, frame], 1.5, kernel=kernel)
        oracles.assert_near(together[:, :, frame], alone)


def test_zero_sigma_changes_nothing_and_copies():
    latent = torch.randn(1, 2, 5, 7)
    result = blur_latent(latent, 0.0)
    assert torch.equal(result, latent)
    assert result.data_ptr() != latent.data_ptr()


def test_half_precision_latents_stay_half_precision(generator):
    latent = torch.randn(1, 2, 5, 7, generator=generator).half()
    result = blur_latent(latent, 1.0)
    assert result.dtype == torch.float16
    oracles.assert_near(result, blur_latent(latent.double(), 1.0))


def test_impossible_blurs_are_refused():
    latent = torch.ones(1, 2, 5, 7)
    with pytest.raises(ValueError, match="0 or more"):
        blur_latent(latent, -1.0)
    with pytest.raises(ValueError, match="reference, full"):
        blur_latent(latent, 1.0, kernel="box")
