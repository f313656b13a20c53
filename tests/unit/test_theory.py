"""The paper's claims as tests, on the kernel for which its premises hold."""

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

GRIDS = [(1, 5, 7), (1, 11, 3), (2, 5, 3), (1, 1, 13)]
SIGMAS = (0.0, 0.3, 0.6, 1.0, 2.0, 4.0, 10.0, 100.0, math.inf)


def ladder(logits, grid):
    return [smoothed_logits(logits, grid, sigma, kernel="full") for sigma in SIGMAS]


def falls(values):
    return all(
        bool((later <= earlier + 1e-10).all()) for earlier, later in itertools.pairwise(values)
    )


@pytest.fixture(params=GRIDS, ids=str)
def case(request, generator):
    grid = request.param
    logits = torch.randn(4, math.prod(grid), 17, generator=generator, dtype=torch.float64)
    return grid, logits


def test_blurring_queries_blurs_the_logits(generator):
    query, key = (torch.randn(2, n, 11, generator=generator, dtype=torch.float64) for n in (35, 13))
    for sigma in SIGMAS:
        direct = blur_queries(query, (5, 7), sigma) @ key.mT
        oracles.assert_near(direct, smoothed_logits(query @ key.mT, (5, 7), sigma))


def test_blur_keeps_the_mean_of_the_logits(case):
    grid, logits = case
    for smooth in ladder(logits, grid):
        oracles.assert_near(smooth.mean(1), logits.mean(1))
    if grid[1:] == (5, 7):
        smooth = smoothed_logits(logits, grid, 2.0, kernel="reference")
        assert float((smooth.mean(1) - logits.mean(1)).abs().max()) > 1e-3, "only the full one does"


def test_variance_never_rises_with_sigma(case):
    grid, logits = case
    variances = [logit_variance(smooth) for smooth in ladder(logits, grid)]
    assert falls(variances)
    if grid[0] == 1:
        assert float(variances[-1].max()) < 1e-20


def test_log_sum_exp_never_rises_and_energy_never_falls(case):
    grid, logits = case
    maps = ladder(logits * 3.0, grid)
    assert falls([mean_logsumexp(smooth) for smooth in maps])
    assert falls([-attention_energy(smooth) for smooth in maps])


def test_curvature_never_rises_with_sigma_when_attention_is_spread_out(case):
    grid, logits = case[0], 0.5 * case[1]
    weights = torch.softmax(logits, dim=-1)
    assert float(weights.max()) < 0.5  # the theorem's premise: small softmax values
    curvatures = [energy_curvature(logits, grid, sigma, kernel="full") for sigma in SIGMAS]
    assert falls(curvatures)
    assert bool((curvatures[-1] > 0).all())


def test_the_curvature_claim_needs_its_premise():
    peaked = 60.0 * torch.eye(6, dtype=torch.float64)
    plain, smooth = (energy_curvature(peaked, (2, 3), sigma) for sigma in (0.0, 1.0))
    assert smooth > plain


def test_the_gaussian_curvature_off_the_null_space_is_attenuated(generator):
    logits = 0.3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    volumes = []
    for sigma in (0.0, 0.3, 0.5, 0.8):
        spectrum = torch.linalg.eigvalsh(-oracles.hessian(logits, (1, 2, 3), sigma, "full"))
        flat, curved = spectrum[:6], spectrum[6:]  # one constant direction per query
        assert float(flat.abs().max()) < 1e-12
        volumes.append(curved.log().sum())
    assert falls(volumes)


def test_the_pseudo_determinant_has_the_closed_form_behind_the_docstring(generator):
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    blur = oracles.dense_blur((1, 2, 3), 0.6, "full")
    spectrum = torch.linalg.eigvalsh(-oracles.hessian(logits, (1, 2, 3), 0.6, "full"))[6:]
    rows = math.log(5) * 6 + torch.log_softmax(blur @ logits, dim=-1).sum()
    oracles.assert_near(spectrum.log().sum(), 2 * 4 * torch.logdet(blur) + rows, torch.float32)
