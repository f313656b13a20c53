"""Blur matrices and blurred queries: limits, oracle, invariants, cache."""

from __future__ import annotations

import itertools
import math
import threading

import oracles
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seg_core.blur import blur_queries, is_identity, mean_queries
from seg_core.kernels import KERNELS, gaussian_matrix, reflected_matrix
from seg_core.matrices import BlurMatrices

SIZES = (1, 2, 3, 5, 7, 11, 16)
SIGMAS = (0.1, 0.3, 0.5, 1.0, 2.7, 6.0, 40.0)
WIDTHS = st.one_of(st.sampled_from([0.0, 1e-6, 9999.0, 1e300, math.inf]), st.floats(1e-3, 200.0))
EDGES = st.integers(1, 70)


def queries(grid, dim=11, batch=2, dtype=torch.float64, seed=7):
    seeded = torch.Generator().manual_seed(seed)
    return torch.randn(batch, math.prod(grid), dim, generator=seeded, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_zero_is_the_identity_and_infinity_the_mean(size, kernel):
    eye = torch.eye(size, dtype=torch.float64)
    assert torch.equal(gaussian_matrix(size, 0.0, kernel=kernel), eye)
    flat = torch.full((size, size), 1.0 / size, dtype=torch.float64)
    assert torch.equal(gaussian_matrix(size, math.inf, kernel=kernel), flat)


@pytest.mark.parametrize("size", SIZES)
def test_the_full_kernel_meets_both_limits_continuously(size):
    eye, flat = (gaussian_matrix(size, sigma, kernel="full") for sigma in (0.0, math.inf))
    oracles.assert_near(gaussian_matrix(size, 1e-6, kernel="full"), eye)
    oracles.assert_near(gaussian_matrix(size, 9999.0, kernel="full"), flat)
    below, above = (
        gaussian_matrix(size, size * factor, kernel="full") for factor in (1 - 1e-14, 1 + 1e-14)
    )
    oracles.assert_near(above, below)  # no seam where the series change


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("size", SIZES)
def test_matrices_agree_with_scalar_loops(size, sigma, kernel):
    expected = oracles.blur_matrix(size, sigma, kernel)
    oracles.assert_near(gaussian_matrix(size, sigma, kernel=kernel), expected)
    taps = oracles.blur_matrix(7, 1.0, "reference", 3)
    oracles.assert_near(reflected_matrix(7, 1.0, 3), taps)


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
def test_all_eigenvalues_of_the_full_kernel_fall_as_sigma_grows(size):
    spectra = [
        torch.linalg.eigvalsh(gaussian_matrix(size, sigma, kernel="full"))
        for sigma in (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0, math.inf)
    ]
    for sharper, softer in itertools.pairwise(spectra):
        assert bool((softer <= sharper + 1e-12).all())
        assert bool((softer >= -1e-12).all())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: gaussian_matrix(0, 1.0), "at least 1"),
        (lambda: gaussian_matrix(5, -1.0), "0 or more"),
        (lambda: gaussian_matrix(5, math.nan), "0 or more"),
        (lambda: gaussian_matrix(5, 1.0, kernel="box"), "reference, full, got 'box'"),
        (lambda: blur_queries(queries((5, 7)), (5, 7), 0.0, kernel="box"), "reference, full"),
        (lambda: BlurMatrices(limit=0), "at least 1"),
        *(
            (lambda s=sigma: blur_queries(queries((6, 6)), (5, 7), s), "35 tokens, got 36")
            for sigma in (0.0, 1.0, math.inf)
        ),
    ],
)
def test_what_is_impossible_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sigma", [0.0, 0.5, 2.0, 30.0, math.inf])
@pytest.mark.parametrize("grid", [(1, 5, 7), (3, 5, 7), (2, 1, 13), (1, 13, 1), (3, 1, 1)])
def test_blurred_queries_agree_with_the_dense_matrix(grid, sigma, kernel):
    query = queries(grid)
    before, strided = query.clone(), query.mT.contiguous().mT
    expected = oracles.blurred(query, grid, sigma, kernel)
    oracles.assert_near(blur_queries(strided, grid, sigma, kernel=kernel), expected)
    result = blur_queries(query, grid, sigma, kernel=kernel)
    oracles.assert_near(result, expected)
    if grid[1:] != (1, 1):  # of one cell, the query itself is the result
        result.add_(1.0)
    assert torch.equal(query, before)


@settings(max_examples=60)
@given(
    height=EDGES,
    width=EDGES,
    sigma=WIDTHS,
    kernel=st.sampled_from(KERNELS),
    dtype=st.sampled_from(list(oracles.TOLERANCE)),
)
def test_every_grid_sigma_and_dtype_blurs_to_averages_of_its_queries(
    height, width, sigma, kernel, dtype
):
    query = queries((height, width), dim=3, dtype=dtype)
    result = blur_queries(query, (height, width), sigma, kernel=kernel)
    assert (result.shape, result.dtype) == (query.shape, dtype)
    assert bool(torch.isfinite(result).all())
    low, high = (extreme.double() for extreme in torch.aminmax(query, dim=1, keepdim=True))
    slack = oracles.TOLERANCE[dtype] * 8
    assert bool(((result >= low - slack) & (result <= high + slack)).all())


@pytest.mark.parametrize("dtype", list(oracles.TOLERANCE))
@pytest.mark.parametrize("sigma", [0.7, 3.0, math.inf])
def test_low_precision_rounds_only_once(dtype, sigma):
    query = queries((5, 7), dtype=dtype)
    expected = oracles.blurred(query, (1, 5, 7), sigma, "reference")
    bound = max(torch.finfo(dtype).eps, 1e-15) / 2 * 1.01 + 1e-6 * (dtype != torch.float64)
    error = (blur_queries(query, (5, 7), sigma).double() - expected).abs()
    assert bool((error <= bound * expected.abs().clamp_min(0.25) + 1e-15).all())


def test_infinite_sigma_is_the_mean_of_all_queries_of_a_frame():
    query = queries((3, 5, 7))
    expected = query.reshape(2, 3, 35, 11).mean(2)
    oracles.assert_near(mean_queries(query, (3, 5, 7)), expected)
    spread_out = expected.repeat_interleave(35, dim=1)
    oracles.assert_near(blur_queries(query, (3, 5, 7), math.inf), spread_out)
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


def test_a_cached_matrix_is_the_matrix():
    kept = BlurMatrices()
    first = kept.get(7, 1.5, "full", torch.float32, "cpu")
    assert kept.get(7, 1.5, "full", torch.float32, torch.device("cpu")) is first
    assert torch.equal(first, gaussian_matrix(7, 1.5, kernel="full").float())
    query = queries((5, 7))
    assert torch.equal(
        blur_queries(query, (5, 7), 1.5, matrices=kept), blur_queries(query, (5, 7), 1.5)
    )
    assert len(kept) == 3
    kept = BlurMatrices(limit=2)  # drops what was not used for longest
    first, second = (kept.get(size, 1.0, "full", torch.float32, "cpu") for size in (2, 3))
    for size in (2, 5):
        kept.get(size, 1.0, "full", torch.float32, "cpu")
    assert len(kept) == 2
    assert kept.get(2, 1.0, "full", torch.float32, "cpu") is first
    assert kept.get(3, 1.0, "full", torch.float32, "cpu") is not second


def test_two_threads_may_share_a_cache():
    kept, failures = BlurMatrices(limit=3), []

    def work():
        for step in range(200):
            size = 1 + step % 7
            matrix = kept.get(size, 2.0, "reference", torch.float64, "cpu")
            if not torch.equal(matrix, gaussian_matrix(size, 2.0)):
                failures.append(size)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(kept) == 3


def test_the_dense_oracle_notices_a_planted_error():
    grid, query = (3, 5, 7), queries((3, 5, 7))
    expected = oracles.blurred(query, grid, 1.5, "reference")
    for wrong in (
        blur_queries(query, (3, 7, 5), 1.5),
        blur_queries(query, (15, 7), 1.5),
        blur_queries(query, grid, 1.51),
        torch.einsum("ji,bjd->bid", oracles.dense_blur(grid, 1.5, "reference"), query),
    ):
        with pytest.raises(AssertionError):
            oracles.assert_near(wrong, expected)
