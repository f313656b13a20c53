"""Blur matrices and blurred queries: limits, oracle, invariants, cache."""

from __future__ import annotations

import itertools
import math

import oracles
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from seg_core.blur import blur_queries, is_identity, mean_queries, repeat_rows
from seg_core.energy import blur_slopes
from seg_core.grid import AXES
from seg_core.kernels import KERNELS, gaussian_matrix
from seg_core.matrices import BlurMatrices

SIZES = (1, 2, 3, 5, 7, 11, 16)
SIGMAS = (0.0, 0.1, 0.3, 0.5, 1.0, 2.7, 6.0, 40.0, math.inf)
WIDTHS = st.one_of(st.sampled_from([0.0, 1e-6, 9999.0, 1e300, math.inf]), st.floats(1e-3, 200.0))
EDGES = st.integers(1, 70)


def queries(grid, dim=11, batch=2, dtype=torch.float64, seed=7):
    seeded = torch.Generator().manual_seed(seed)
    return torch.randn(batch, math.prod(grid), dim, generator=seeded, dtype=torch.float64).to(dtype)


# Matrices.


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_matrices_agree_with_scalar_loops_and_are_exact_at_both_limits(size, kernel):
    for sigma in SIGMAS:
        matrix = gaussian_matrix(size, sigma, kernel=kernel)
        oracles.assert_near(matrix, oracles.blur_matrix(size, sigma, kernel))
        if sigma in (0.0, math.inf):
            assert torch.equal(matrix, oracles.blur_matrix(size, sigma, kernel))


@given(size=EDGES, sigma=WIDTHS, kernel=st.sampled_from(KERNELS))
@example(size=1, sigma=1e-320, kernel="full")
@example(size=2, sigma=1.7e308, kernel="reference")
def test_rows_are_averages_whatever_size_and_sigma(size, sigma, kernel):
    matrix = gaussian_matrix(size, sigma, kernel=kernel)
    assert matrix.dtype == torch.float64
    assert bool((matrix >= 0).all())
    oracles.assert_near(matrix.sum(1), torch.ones(size))
    if kernel == "full":
        oracles.assert_near(matrix, matrix.T)  # so it keeps the mean too


@pytest.mark.parametrize("size", SIZES)
def test_the_full_kernel_falls_from_the_identity_to_the_mean_without_a_seam(size):
    matrices = [
        gaussian_matrix(size, sigma, kernel="full")
        for sigma in (0.0, 1e-6, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0, 9999.0, math.inf)
    ]
    oracles.assert_near(matrices[1], matrices[0])
    oracles.assert_near(matrices[-2], matrices[-1])
    for sharper, softer in itertools.pairwise(map(torch.linalg.eigvalsh, matrices)):
        assert bool((softer <= sharper + 1e-12).all())
        assert bool((softer >= -1e-12).all())
    below, above = (
        gaussian_matrix(size, size * factor, kernel="full") for factor in (1 - 1e-14, 1 + 1e-14)
    )
    oracles.assert_near(above, below)  # where one series takes over from the other


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: gaussian_matrix(0, 1.0), "at least 1"),
        (lambda: gaussian_matrix(5, -1.0), "0 or more"),
        (lambda: gaussian_matrix(5, math.nan), "0 or more"),
        (lambda: gaussian_matrix(5, 1.0, kernel="box"), "reference, full, got 'box'"),
        (lambda: blur_queries(queries((5, 7)), (5, 7), 0.0, kernel="box"), "reference, full"),
        (lambda: blur_queries(queries((5, 7)), (5, 7), 1.0, axes="depth"), "space, time, space"),
        (lambda: mean_queries(queries((5, 7)), (5, 7), axes="depth"), "space, time, space"),
        (lambda: blur_queries(queries((6, 6)), (5, 7), 0.0), "35 tokens, got 36"),
        (lambda: blur_queries(queries((6, 6)), (5, 7), 1.0), "35 tokens, got 36"),
        (lambda: blur_queries(queries((6, 6)), (5, 7), math.inf), "35 tokens, got 36"),
        (lambda: BlurMatrices(limit=0), "at least 1"),
    ],
)
def test_what_is_impossible_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# Queries.


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("grid", [(1, 5, 7), (3, 5, 7), (2, 1, 13), (1, 13, 1), (3, 1, 1)])
def test_blurred_queries_agree_with_the_dense_matrix(grid, kernel, axes):
    query = queries(grid)
    before, strided = query.clone(), query.mT.contiguous().mT
    for sigma in (0.0, 0.5, 2.0, 30.0, math.inf):
        expected = oracles.blurred(query, grid, sigma, kernel, axes)
        for layout in (query, strided):
            found = blur_queries(layout, grid, sigma, kernel=kernel, axes=axes)
            oracles.assert_near(found, expected)
        slopes = oracles.dense_blur(grid, sigma, kernel, axes).square().sum(dim=1)
        oracles.assert_near(blur_slopes(grid, sigma, kernel=kernel, axes=axes), slopes)
    assert torch.equal(query, before)


@pytest.mark.parametrize("dtype", list(oracles.TOLERANCE))
@pytest.mark.parametrize("sigma", [0.7, 3.0, math.inf])
def test_low_precision_rounds_only_once(dtype, sigma):
    query = queries((5, 7), dtype=dtype)
    expected = oracles.blurred(query, (1, 5, 7), sigma, "reference")
    bound = max(torch.finfo(dtype).eps, 1e-15) / 2 * 1.01 + 1e-6 * (dtype != torch.float64)
    error = (blur_queries(query, (5, 7), sigma).double() - expected).abs()
    assert bool((error <= bound * expected.abs().clamp_min(0.25) + 1e-15).all())


@pytest.mark.parametrize(("axes", "count"), [("space", 3), ("time", 35), ("space and time", 1)])
def test_means_stand_for_all_along_their_axes(axes, count):
    grid, query = (3, 5, 7), queries((3, 5, 7))
    means = mean_queries(query, grid, axes=axes)
    assert means.shape == (2, count, 11)
    expected = oracles.blurred(query, grid, math.inf, "full", axes)
    oracles.assert_near(repeat_rows(means, grid, axes=axes), expected)
    large = torch.full((1, 4096, 3), 6e4, dtype=torch.float16)
    assert torch.equal(mean_queries(large, (64, 64)), large[:, :1]), "no overflow"


@pytest.mark.parametrize(
    ("grid", "sigma", "kernel", "expected"),
    [
        ((1, 1), 5.0, "reference", True),
        ((3, 1, 1), math.inf, "full", True),
        ((5, 7), 0.0, "full", True),
        ((5, 7), 1 / 6, "reference", True),
        ((5, 7), 0.25, "reference", False),
        ((5, 7), 0.05, "full", True),
        ((1, 7), 0.5, "full", False),
        ((5, 1), math.inf, "reference", False),
    ],
)
def test_a_blur_without_effect_is_known_beforehand(grid, sigma, kernel, expected):
    assert is_identity(grid, sigma, kernel=kernel) is expected
    query = queries(grid, dtype=torch.float32)
    same = torch.equal(blur_queries(query, grid, sigma, kernel=kernel), query)
    assert same is expected


# The cache.


def test_matrices_are_kept_and_the_one_not_used_for_longest_goes():
    kept = BlurMatrices(limit=2)

    def get(size):
        return kept.get(size, 1.5, "full", torch.float32, torch.device("cpu"))

    first, second = get(5), get(7)
    assert torch.equal(first, gaussian_matrix(5, 1.5, kernel="full").float())
    assert get(5) is first
    get(3)
    assert len(kept) == 2
    assert get(5) is first
    assert get(7) is not second
    query = queries((5, 7))
    plain = blur_queries(query, (5, 7), 1.5)
    assert torch.equal(blur_queries(query, (5, 7), 1.5, matrices=BlurMatrices()), plain)
