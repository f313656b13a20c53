"""The measurements: energy, log-sum-exp, variance, smoothed logits and curvature."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from seg_core.energy import (
    attention_energy,
    energy_curvature,
    logit_variance,
    mean_logsumexp,
    smoothed_logits,
)

GRID = (1, 2, 3)


@pytest.fixture
def logits(generator):
    return torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64)


def test_equal_logits_have_the_energy_of_the_number_of_keys():
    energy = attention_energy(torch.zeros(3, 5))
    torch.testing.assert_close(energy, torch.tensor(-3 * math.log(5)))


def test_energy_agrees_with_scalar_loops(logits):
    expected = [[oracles.energy(head) for head in sample] for sample in logits]
    oracles.assert_near(attention_energy(logits), torch.tensor(expected, dtype=torch.float64))
    oracles.assert_near(mean_logsumexp(logits), -attention_energy(logits) / 6)
    with pytest.raises(AssertionError):
        oracles.assert_near(
            attention_energy(logits[0, 0].T), torch.tensor(oracles.energy(logits[0, 0]))
        )


def test_the_gradient_of_the_energy_is_minus_attention(logits):
    logits.requires_grad_()
    attention_energy(logits).sum().backward()
    oracles.assert_near(logits.grad, -torch.softmax(logits.detach(), dim=-1))


def test_half_precision_logits_are_measured_in_float32():
    energy = attention_energy(torch.full((4096, 3), 100.0, dtype=torch.float16))
    assert energy.dtype == torch.float32
    assert math.isclose(float(energy), -4096 * (100 + math.log(3)), rel_tol=1e-5)


def test_variance_is_taken_over_queries(logits):
    columns = [[oracles.spread(column) ** 2 for column in head.T] for head in logits[0]]
    expected = torch.tensor(columns, dtype=torch.float64).mean(1)
    oracles.assert_near(logit_variance(logits)[0], expected)


@pytest.mark.parametrize("kernel", ["reference", "full"])
@pytest.mark.parametrize("sigma", [0.0, 0.7, math.inf])
def test_smoothed_logits_agree_with_the_dense_matrix(logits, sigma, kernel):
    expected = oracles.dense_blur(GRID, sigma, kernel) @ logits
    oracles.assert_near(smoothed_logits(logits, GRID, sigma, kernel=kernel), expected)


@pytest.mark.parametrize("kernel", ["reference", "full"])
@pytest.mark.parametrize("sigma", [0.0, 0.7, 2.0, math.inf])
def test_curvature_is_the_trace_of_the_hessian(logits, sigma, kernel):
    expected = -oracles.hessian(logits[0, 0], GRID, sigma, kernel).trace()
    actual = energy_curvature(logits, GRID, sigma, kernel=kernel)
    oracles.assert_near(actual[0, 0], expected)


def test_curvature_counts_every_frame(generator):
    logits = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    expected = -oracles.hessian(logits, (2, 2, 3), 0.7, "reference").trace()
    oracles.assert_near(energy_curvature(logits, (2, 2, 3), 0.7), expected)
    with pytest.raises(ValueError, match="got 12"):
        energy_curvature(logits, (5, 7), 1.0)


def test_the_hessian_oracle_notices_derivatives_in_the_blurred_logits(logits):
    smooth = smoothed_logits(logits[0, 0], GRID, 0.7)
    expected = -oracles.hessian(logits[0, 0], GRID, 0.7, "reference").trace()
    with pytest.raises(AssertionError):
        oracles.assert_near(energy_curvature(smooth, GRID, 0.0), expected)
