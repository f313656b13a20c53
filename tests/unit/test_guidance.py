"""Blending, rescaling and the window of activity."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from seg_core.guidance import Window, apply_guidance, blend
from seg_core.rescale import salient_fusion

SHAPES = [(2, 3, 5, 7), (2, 3, 2, 5, 7), (2, 3, 11)]


def predictions(generator, shape, count=4, dtype=torch.float64):
    drawn = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype) for tensor in drawn]


@pytest.mark.parametrize("mode", ["full", "partial", "snf"])
def test_scale_zero_returns_the_very_same_tensor(generator, mode):
    denoised, cond, perturbed, uncond = predictions(generator, SHAPES[0])
    assert blend(denoised, cond, perturbed, 0.0) is denoised
    guided = apply_guidance(
        denoised, cond, perturbed, 0.0, rescale=0.7, rescale_mode=mode, uncond=uncond
    )
    assert guided is denoised


def test_blend_follows_its_formula(generator):
    denoised, cond, perturbed, _ = predictions(generator, SHAPES[0])
    flat = zip(*(t.flatten().tolist() for t in (denoised, cond, perturbed)), strict=True)
    expected = torch.tensor([d + 3.0 * (p - q) for d, p, q in flat], dtype=torch.float64)
    expected = expected.reshape(denoised.shape)
    oracles.assert_near(blend(denoised, cond, perturbed, 3.0), expected)
    for mode in ("full", "partial", "snf"):  # without rescale, and for snf without an uncond
        guided = apply_guidance(denoised, cond, perturbed, 3.0, rescale_mode=mode)
        assert torch.equal(guided, blend(denoised, cond, perturbed, 3.0))
    for wrong in (
        denoised - 3.0 * (cond - perturbed),
        cond + 3.0 * (denoised - perturbed),
        denoised + 2.0 * (cond - perturbed),
    ):
        with pytest.raises(AssertionError):
            oracles.assert_near(wrong, expected)


@pytest.mark.parametrize("dtype", list(oracles.TOLERANCE))
def test_half_precision_predictions_are_blended_in_float32(generator, dtype):
    denoised, cond, perturbed, _ = predictions(generator, SHAPES[0], dtype=dtype)
    expected = denoised.double() + 7.3 * (cond.double() - perturbed.double())
    actual = blend(denoised, cond, perturbed, 7.3)
    assert actual.dtype == dtype
    bound = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=4 * 8e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("amount", [0.3, 1.0])
@pytest.mark.parametrize("mode", ["full", "partial"])
def test_rescaled_guidance_agrees_with_scalar_loops(generator, mode, amount, shape):
    denoised, cond, perturbed, _ = predictions(generator, shape)
    expected = oracles.rescaled(denoised, cond, perturbed, 3.0, amount, mode)
    actual = apply_guidance(denoised, cond, perturbed, 3.0, rescale=amount, rescale_mode=mode)
    oracles.assert_near(actual, expected)
    other = {"full": "partial", "partial": "full"}[mode]
    with pytest.raises(AssertionError):
        oracles.assert_near(
            apply_guidance(denoised, cond, perturbed, 3.0, rescale=amount, rescale_mode=other),
            expected,
        )


@pytest.mark.parametrize("mode", ["full", "partial"])
def test_the_wanted_spread_is_conds_whatever_prediction_is_compared(generator, mode):
    denoised, cond, uncond, perturbed = (
        torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64) * (n + 1)
        for n in range(4)
    )
    guided = apply_guidance(
        denoised, uncond, perturbed, 3.0, rescale=0.4, rescale_mode=mode, cond=cond
    )
    for sample in range(2):
        push = 3.0 * (uncond[sample] - perturbed[sample])
        start = denoised[sample] if mode == "full" else cond[sample]
        ratio = cond[sample].std() / (start + push).std()
        expected = denoised[sample] + push * (0.6 + 0.4 * ratio)
        torch.testing.assert_close(guided[sample], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("mode", ["full", "partial", "snf"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_mate_never_changes_an_image(generator, shape, mode):
    tensors = predictions(generator, shape)
    settings = {"rescale": 0.7, "rescale_mode": mode}
    before = [tensor.clone() for tensor in tensors]
    both = apply_guidance(*tensors[:3], 3.0, **settings, uncond=tensors[3])
    assert all(map(torch.equal, tensors, before)), "arguments are left alone"
    for mate in tensors:
        mate[0] *= 1000.0
    other = apply_guidance(*tensors[:3], 3.0, **settings, uncond=tensors[3])
    assert torch.equal(both[1], other[1])


@pytest.mark.parametrize("mode", ["full", "partial", "snf"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_flat_predictions_give_no_nan(mode, dtype):
    flat = torch.zeros(2, 3, 5, 7, dtype=dtype)
    guided = apply_guidance(
        flat, flat, flat + 1.0, 3.0, rescale=1.0, rescale_mode=mode, uncond=flat
    )
    assert bool(torch.isfinite(guided).all())
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    assert bool(torch.isfinite(apply_guidance(one, one, one, 3.0, rescale=1.0)).all())


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 2, 5, 7), (2, 3, 1, 2)])
def test_salient_fusion_agrees_with_plane_by_plane_choice(generator, shape):
    first, second, _, _ = predictions(generator, shape)
    oracles.assert_near(salient_fusion(first, second), oracles.fused(first, second))
    with pytest.raises(AssertionError):
        oracles.assert_near(salient_fusion(second, -first), oracles.fused(first, second))


def test_snf_adds_the_fusion_to_the_unconditional_prediction(generator):
    denoised, cond, perturbed, uncond = predictions(generator, SHAPES[0])
    expected = uncond + oracles.fused(denoised - uncond, 3.0 * (cond - perturbed))
    for amount in (0.0, 0.5):
        guided = apply_guidance(
            denoised, cond, perturbed, 3.0, rescale=amount, rescale_mode="snf", uncond=uncond
        )
        oracles.assert_near(guided, expected)


def test_the_default_window_covers_everything():
    assert Window().covers_everything
    assert Window().contains(1e12, 1.0, 0.0)
    assert not Window(0.0, 0.9).covers_everything
    assert not Window(0.1, 1.0).covers_everything


@pytest.mark.parametrize(
    ("noise", "inside"), [(9.1, False), (9.0, True), (5.0, True), (2.0, True), (1.9, False)]
)
def test_both_ends_of_a_window_belong_to_it(noise, inside):
    assert Window(0.2, 0.8).contains(noise, 9.0, 2.0) is inside


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        *(({"rescale": amount}, "between 0 and 1") for amount in (-0.1, 1.1, math.nan)),
        ({"rescale_mode": "half"}, "full, partial, snf, got 'half'"),
    ],
)
def test_an_impossible_rescale_is_refused(settings, match):
    one = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match=match):
        apply_guidance(one, one, one, 1.0, **settings)


@pytest.mark.parametrize("ends", [(-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0), (0.8, 0.2)])
def test_an_impossible_window_is_refused(ends):
    words = "lower the start or raise the end" if ends == (0.8, 0.2) else "between 0 and 1"
    with pytest.raises(ValueError, match=words):
        Window(*ends)
