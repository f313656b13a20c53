"""Energy and curvature: slow references, and the paper's claims where their premises hold."""

from __future__ import annotations

import itertools
import math

import oracles
import pytest
import torch

from seg_core.blur import blur_queries
from seg_core.energy import (
    attention_energy,
    energy_curvature,
    logit_variance,
    mean_logsumexp,
    smoothed_logits,
)

GRID = (1, 2, 3)
GRIDS = [(1, 5, 7), (1, 11, 3), (2, 5, 3), (1, 1, 13)]
SIGMAS = (0.0, 0.3, 0.6, 1.0, 2.0, 4.0, 10.0, 100.0, math.inf)


@pytest.fixture
def logits(draw):
    return draw(2, 3, 6, 5)


# Formulas.


def test_energy_and_its_gradient_agree_with_scalar_loops(logits):
    expected = [[oracles.energy(head) for head in sample] for sample in logits]
    oracles.assert_near(attention_energy(logits), torch.tensor(expected, dtype=torch.float64))
    oracles.assert_near(mean_logsumexp(logits), -attention_energy(logits) / 6)
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
@pytest.mark.parametrize("sigma", [0.0, 0.7, 2.0, math.inf])
def test_curvature_is_the_trace_of_the_hessian(logits, sigma, kernel):
    clip = logits.reshape(3, 12, 5)
    for maps, grid in ((logits, GRID), (clip, (2, 2, 3))):
        actual = energy_curvature(maps, grid, sigma, kernel=kernel).flatten()
        expected = -oracles.hessian(maps.flatten(0, -3)[1], grid, sigma, kernel).trace()
        oracles.assert_near(actual[1], expected)
    with pytest.raises(ValueError, match="got 6"):
        energy_curvature(logits, (5, 7), sigma)


# Claims.


def ladder(logits, grid):
    return [smoothed_logits(logits, grid, sigma, kernel="full") for sigma in SIGMAS]


def falls(values):
    return all(
        bool((later <= earlier + 1e-10).all()) for earlier, later in itertools.pairwise(values)
    )


@pytest.fixture(params=GRIDS, ids=str)
def case(request, draw):
    grid = request.param
    return grid, draw(4, math.prod(grid), 17)


def test_blurring_queries_blurs_the_logits(draw):
    query, key = draw(2, 35, 11), draw(2, 13, 11)
    for sigma in SIGMAS:
        direct = blur_queries(query, (5, 7), sigma) @ key.mT
        oracles.assert_near(direct, smoothed_logits(query @ key.mT, (5, 7), sigma))


def test_as_sigma_grows_mean_stays_variance_and_log_sum_exp_fall_and_energy_rises(case):
    grid, logits = case
    maps = ladder(logits * 3.0, grid)
    for smooth in maps:
        oracles.assert_near(smooth.mean(1), maps[0].mean(1))
    assert falls([logit_variance(smooth) for smooth in maps])
    assert falls([mean_logsumexp(smooth) for smooth in maps])
    assert falls([-attention_energy(smooth) for smooth in maps])
    if grid[0] == 1:
        assert float(logit_variance(maps[-1]).max()) < 1e-20


def test_curvature_never_rises_with_sigma_when_attention_is_spread_out(case):
    grid, logits = case[0], 0.5 * case[1]
    weights = torch.softmax(logits, dim=-1)
    assert float(weights.max()) < 0.5  # the theorem's premise: small softmax values
    curvatures = [energy_curvature(logits, grid, sigma, kernel="full") for sigma in SIGMAS]
    assert falls(curvatures)
    assert bool((curvatures[-1] > 0).all())


def test_the_determinant_off_the_null_space_falls_and_has_the_docstring_s_closed_form(draw):
    logits = 0.3 * draw(6, 5)
    volumes = []
    for sigma in (0.0, 0.3, 0.5, 0.8):
        spectrum = torch.linalg.eigvalsh(-oracles.hessian(logits, GRID, sigma, "full"))
        flat, curved = spectrum[:6], spectrum[6:]  # one constant direction per query
        assert float(flat.abs().max()) < 1e-12
        volumes.append(curved.log().sum())
        blur = oracles.dense_blur(GRID, sigma, "full")
        rows = math.log(5) * 6 + torch.log_softmax(blur @ logits, dim=-1).sum()
        oracles.assert_near(volumes[-1], 2 * 4 * torch.logdet(blur) + rows, torch.float32)
    assert falls(volumes)
