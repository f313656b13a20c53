"""Blending, rescaling and the window of activity."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from seg_core.guidance import RESCALE_MODES, Window, apply_guidance, blend
from seg_core.rescale import salient_fusion

SHAPES = [(2, 3, 5, 7), (2, 3, 2, 5, 7), (2, 3, 11)]


def predictions(generator, shape=SHAPES[0], dtype=torch.float64):
    """Draw four predictions of different spread: denoised, cond, perturbed and uncond."""
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    return [(tensor * (1 + n)).to(dtype) for n, tensor in enumerate(drawn)]


@pytest.mark.parametrize("mode", RESCALE_MODES)
def test_without_scale_or_rescale_guidance_is_nothing_or_a_plain_blend(generator, mode):
    denoised, cond, perturbed, uncond = predictions(generator)
    assert blend(denoised, cond, perturbed, 0.0) is denoised
    settings = {"rescale": 0.7, "rescale_mode": mode, "uncond": uncond}
    assert apply_guidance(denoised, cond, perturbed, 0.0, **settings) is denoised
    guided = apply_guidance(denoised, cond, perturbed, 3.0, rescale_mode=mode)  # nor an uncond
    assert torch.equal(guided, blend(denoised, cond, perturbed, 3.0))


@pytest.mark.parametrize("dtype", list(oracles.TOLERANCE))
def test_blend_follows_its_formula_and_rounds_once(generator, dtype):
    denoised, cond, perturbed, _ = predictions(generator, dtype=dtype)
    expected = denoised.double() + 7.3 * (cond.double() - perturbed.double())
    actual = blend(denoised, cond, perturbed, 7.3)
    assert actual.dtype == dtype
    bound = torch.finfo(dtype).eps
    atol = 1e-13 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("amount", [0.3, 1.0])
@pytest.mark.parametrize("mode", ["full", "partial"])
def test_rescaled_guidance_agrees_with_scalar_loops(generator, mode, amount, shape):
    denoised, cond, perturbed, uncond = predictions(generator, shape)
    settings = {"rescale": amount, "rescale_mode": mode}
    actual = apply_guidance(denoised, cond, perturbed, 3.0, **settings)
    expected = oracles.rescaled(denoised, cond, cond, perturbed, 3.0, amount, mode)
    oracles.assert_near(actual, expected)
    # Where the negative prediction is compared, the wanted spread is still that of cond.
    actual = apply_guidance(denoised, uncond, perturbed, 3.0, cond=cond, **settings)
    expected = oracles.rescaled(denoised, uncond, cond, perturbed, 3.0, amount, mode)
    oracles.assert_near(actual, expected)


@pytest.mark.parametrize("mode", RESCALE_MODES)
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


@pytest.mark.parametrize("mode", RESCALE_MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1)])
def test_flat_predictions_give_no_nan(shape, mode, dtype):
    flat = torch.zeros(shape, dtype=dtype)
    for perturbed in (flat, flat + 1.0):
        guided = apply_guidance(
            flat, flat, perturbed, 3.0, rescale=1.0, rescale_mode=mode, uncond=flat
        )
        assert bool(torch.isfinite(guided).all())


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 2, 5, 7), (2, 3, 1, 2)])
def test_snf_adds_the_more_salient_of_two_pushes_to_the_unconditional_prediction(generator, shape):
    denoised, cond, perturbed, uncond = predictions(generator, shape)
    oracles.assert_near(salient_fusion(cond, uncond), oracles.fused(cond, uncond))
    expected = uncond + oracles.fused(denoised - uncond, 3.0 * (cond - perturbed))
    for amount in (0.0, 0.5):
        settings = {"rescale": amount, "rescale_mode": "snf", "uncond": uncond}
        oracles.assert_near(apply_guidance(denoised, cond, perturbed, 3.0, **settings), expected)


def test_a_window_holds_both_of_its_ends_and_the_default_one_everything():
    inside = [Window(0.2, 0.8).contains(noise, 9.0, 2.0) for noise in (9.1, 9.0, 5.0, 2.0, 1.9)]
    assert inside == [False, True, True, True, False]
    assert Window().contains(1e12, 1.0, 0.0)
    windows = (Window(), Window(0.0, 0.9), Window(0.1, 1.0))
    assert [window.covers_everything for window in windows] == [True, False, False]


@pytest.mark.parametrize(
    ("ends", "match"),
    [
        *((ends, "between 0 and 1") for ends in ((-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0))),
        ((0.8, 0.2), "lower the start or raise the end"),
    ],
)
def test_an_impossible_window_is_refused(ends, match):
    with pytest.raises(ValueError, match=match):
        Window(*ends)


def test_an_impossible_rescale_is_refused():
    one = torch.ones(1, 1, 2, 2)
    for amount in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            apply_guidance(one, one, one, 1.0, rescale=amount)
    with pytest.raises(ValueError, match="full, partial, snf, got 'half'"):
        apply_guidance(one, one, one, 1.0, rescale_mode="half")
