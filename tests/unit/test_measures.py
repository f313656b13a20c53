"""The evaluation's measures: closed forms, and a planted error that each of them notices."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dev.demo_model import butterflies
from dev.evaluation import measures
from dev.evaluation.features import RandomFeatures
from dev.evaluation.measures import Gaussian, bootstrap, frechet


def whitened(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """Points whose sample mean is 0 and whose sample covariance is the identity."""
    points = rng.standard_normal((count, dim))
    points -= points.mean(axis=0)
    covariance = points.T @ points / (count - 1)
    return points @ np.linalg.inv(np.linalg.cholesky(covariance)).T


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="module")
def fresh() -> np.ndarray:
    return butterflies.as_images(butterflies.sample_data(2, 200)[0])


@pytest.fixture(scope="module")
def features() -> RandomFeatures:
    return RandomFeatures(butterflies.as_images(butterflies.sample_data(1, 600)[0]))


# The Frechet distance


def test_distance_of_scaled_axes_is_the_closed_form(rng):
    """N(m, diag a^2) and N(0, diag b^2) are |m|^2 + sum (a - b)^2 apart."""
    a, b = rng.uniform(0.5, 2.0, (2, 5))
    mean = rng.standard_normal(5)
    first = whitened(rng, 40, 5) * a + mean
    second = whitened(rng, 60, 5) * b
    expected = (mean**2).sum() + ((a - b) ** 2).sum()
    assert frechet(first, Gaussian.of(second)) == pytest.approx(expected, rel=1e-10)
    assert frechet(first, Gaussian.of(first)) == pytest.approx(0.0, abs=1e-9)


def test_distance_of_full_covariances_is_the_root_of_their_product(rng):
    import scipy.linalg

    first, second = (rng.standard_normal((30, 4)) @ rng.standard_normal((4, 4)) for _ in range(2))
    c1, c2 = (np.cov(each, rowvar=False) for each in (first, second))
    offset = first.mean(axis=0) - second.mean(axis=0)
    root = scipy.linalg.sqrtm(c1 @ c2)
    expected = offset @ offset + np.trace(c1 + c2 - 2.0 * np.real(root))
    assert frechet(first, Gaussian.of(second)) == pytest.approx(expected, rel=1e-9)


# Planted errors


def errors(images: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    half = images.shape[2] // 2
    torn = images.copy()
    torn[:, :, half:] = np.roll(images, 1, axis=0)[:, :, half:]
    shrunk = images.reshape(len(images), 16, 2, 16, 2, 3).mean(axis=(2, 4))
    return {
        "noise": (images + 0.1 * rng.standard_normal(images.shape)).clip(0, 1),
        "blur": shrunk.repeat(2, axis=1).repeat(2, axis=2),
        "washed out": 0.5 + 0.7 * (images - 0.5),
        "glaring": (0.5 + 1.6 * (images - 0.5)).clip(0, 1),
        "halves of different butterflies": torn,
        "upside down": images[:, ::-1],
        "one colour": np.repeat(images[::4], 4, axis=0),
    }


@pytest.mark.parametrize("name", errors(np.zeros((4, 32, 32, 3))))
def test_the_distance_notices(name, fresh, features):
    reference = Gaussian.of(features.reference)
    right = frechet(features(fresh), reference)
    wrong = frechet(features(errors(fresh)[name].astype(np.float32)), reference)
    assert wrong > 1.3 * right


def test_mirror_error_is_zero_for_the_data_one_for_noise_and_grows_between(fresh, rng):
    assert measures.ratio(measures.mirror_parts(fresh)) == 0.0
    noise = rng.standard_normal((200, 32, 32, 3))
    assert measures.ratio(measures.mirror_parts(noise)) == pytest.approx(1.0, abs=0.02)
    torn = errors(fresh)["halves of different butterflies"]
    whole, slightly, pale = (
        measures.ratio(measures.mirror_parts(each))
        for each in (torn, fresh + 0.3 * (torn - fresh), 0.5 + 0.5 * (torn - 0.5))
    )
    assert whole > slightly > 0.0
    assert whole == pytest.approx(pale, rel=1e-6)  # whatever the contrast


def test_contrast_notices_a_washed_out_picture_and_can_be_given_back(fresh):
    pale = 0.5 + 0.7 * (fresh - 0.5)
    np.testing.assert_allclose(measures.contrast(pale), 0.7 * measures.contrast(fresh), rtol=1e-5)
    pale = 0.5 + 0.5 * (fresh - 0.5)
    raised = measures.with_contrast(pale, float(measures.contrast(fresh).mean()))
    assert measures.contrast(raised).mean() == pytest.approx(measures.contrast(fresh).mean(), 0.02)
    assert np.abs(raised - fresh).mean() < 0.5 * np.abs(pale - fresh).mean()


# Uncertainty


def test_standard_error_of_a_mean_is_the_textbook_s(rng):
    values = rng.standard_normal((400, 1))
    found = bootstrap({"off": values}, lambda each: float(each.mean()), "off", resamples=2000)
    expected = values.std(ddof=1) / math.sqrt(400)
    assert found["off"].error == pytest.approx(expected, rel=0.1)
    assert found["off"].change == found["off"].change_error == 0.0


def test_what_seeds_share_cancels_in_the_change_from_off(rng):
    shared = rng.standard_normal((300, 1))
    sets = {"off": shared, "on": shared + 0.5 + 0.01 * rng.standard_normal((300, 1))}
    found = bootstrap(sets, lambda each: float(each.mean()), "off")["on"]
    assert found.change == pytest.approx(0.5, abs=0.01)
    assert found.change_error < 0.1 * found.error


def test_one_point_and_sets_of_different_seeds_are_refused():
    with pytest.raises(ValueError, match="two points"):
        Gaussian.of(np.zeros((1, 3)))
    sets = {"off": np.zeros((4, 1)), "on": np.zeros((5, 1))}
    with pytest.raises(ValueError, match="same seeds"):
        bootstrap(sets, np.mean, "off")
