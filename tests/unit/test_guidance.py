"""Blending, rescaling, the window of activity, and what becomes of a difference."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from seg_core.guidance import (
    RESCALE_MODES,
    Window,
    apply_guidance,
    blend,
    effective_cfg,
    held_difference,
)
from seg_core.rescale import salient_fusion

SHAPES = [(2, 3, 5, 7), (2, 3, 2, 5, 7), (2, 3, 11)]


def predictions(draw, shape=SHAPES[0], dtype=torch.float64):
    """Draw four predictions of different spread: denoised, cond, perturbed and uncond."""
    return [(draw(shape) * (1 + n)).to(dtype) for n in range(4)]


@pytest.mark.parametrize("mode", RESCALE_MODES)
def test_without_scale_or_rescale_guidance_is_nothing_or_a_plain_blend(draw, mode):
    denoised, cond, perturbed, uncond = predictions(draw)
    assert blend(denoised, cond, perturbed, 0.0) is denoised
    settings = {"rescale": 0.7, "rescale_mode": mode, "uncond": uncond}
    assert apply_guidance(denoised, cond, perturbed, 0.0, **settings) is denoised
    guided = apply_guidance(denoised, cond, perturbed, 3.0, rescale_mode=mode)  # nor an uncond
    assert torch.equal(guided, blend(denoised, cond, perturbed, 3.0))


@pytest.mark.parametrize("dtype", list(oracles.TOLERANCE))
def test_blend_follows_its_formula_and_rounds_once(draw, dtype):
    denoised, cond, perturbed, _ = predictions(draw, dtype=dtype)
    expected = denoised.double() + 7.3 * (cond.double() - perturbed.double())
    actual = blend(denoised, cond, perturbed, 7.3)
    assert actual.dtype == dtype
    bound = torch.finfo(dtype).eps
    atol = 1e-13 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("amount", [0.3, 1.0])
@pytest.mark.parametrize("mode", ["full", "partial"])
def test_rescaled_guidance_agrees_with_scalar_loops(draw, mode, amount, shape):
    denoised, cond, perturbed, uncond = predictions(draw, shape)
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
def test_a_batch_mate_never_changes_an_image(draw, shape, mode):
    tensors = predictions(draw, shape)
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
def test_snf_adds_the_more_salient_of_two_pushes_to_the_unconditional_prediction(draw, shape):
    denoised, cond, perturbed, uncond = predictions(draw, shape)
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


# Differences of steps.


def test_a_held_difference_is_that_of_the_same_noise(draw):
    """By hand: for eps, v and flow models, the difference of what a fixed noise error makes."""
    x, error, *_ = predictions(draw)
    then, now = torch.tensor([5.0]).double(), torch.tensor([1.25]).double()

    def eps(sigma, wrong):
        return x - sigma * (0.3 * x + wrong)

    def flow(sigma, wrong):
        return x - sigma * (0.7 * x + wrong)

    def v(sigma, wrong):
        root = (sigma**2 + 1).sqrt()
        velocity = 0.1 * x + wrong * root
        return x / (sigma**2 + 1) - velocity * sigma / root

    for model in (eps, flow, v):
        differences = [model(sigma, 0 * error) - model(sigma, error) for sigma in (then, now)]
        held = held_difference(differences[0], then, now)
        torch.testing.assert_close(held, differences[1], rtol=0, atol=1e-12)


def test_a_held_difference_follows_each_sample_s_noise_and_is_zero_where_there_was_none():
    held = held_difference(torch.ones(2, 1, 1), torch.tensor([2.0, 4.0]), torch.tensor([1.0, 3.0]))
    assert held.flatten().tolist() == [0.5, 0.75]
    assert not held_difference(torch.zeros(1, 2, 2), torch.zeros(1), torch.ones(1)).any()


def test_effective_cfg_tells_strength_from_what_cfg_cannot_give(draw):
    uncond, direction, other, _ = predictions(draw, (1, 4, 5, 5))
    other = other - (other * direction).sum() / (direction * direction).sum() * direction
    cond = uncond + direction
    plain = uncond + 7 * direction
    stronger = plain + 2 * direction
    cfg, beside = effective_cfg(plain, stronger, cond, uncond).tolist()
    assert cfg == pytest.approx(9)
    assert beside == pytest.approx(0, abs=1e-7)
    cfg, beside = effective_cfg(plain, plain + other, cond, uncond).tolist()
    assert cfg == pytest.approx(7)
    assert beside == pytest.approx(1)
    both = plain + 3 * direction / direction.norm() + 4 * other / other.norm()
    cfg, beside = effective_cfg(plain, both, cond, uncond).tolist()
    assert cfg == pytest.approx(7 + 3 / float(direction.norm()))
    assert beside == pytest.approx(0.8)
    assert all(math.isnan(n) for n in effective_cfg(plain, plain, cond, cond).tolist())
