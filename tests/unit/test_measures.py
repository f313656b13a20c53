"""The evaluation's measures: textbook figures, and planted errors that they notice."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg

from dev.demo_model import butterflies
from dev.evaluation import measures
from dev.evaluation.features import RandomFeatures
from dev.evaluation.measures import Gaussian, bootstrap, frechet


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="module")
def fresh() -> np.ndarray:
    return butterflies.as_images(butterflies.sample_data(2, 200)[0])


def halves_of_different_butterflies(images: np.ndarray) -> np.ndarray:
    torn, half = images.copy(), images.shape[2] // 2
    torn[:, :, half:] = np.roll(images, 1, axis=0)[:, :, half:]
    return torn


def test_the_frechet_distance_is_that_of_two_gaussians(rng):
    first, second = (rng.standard_normal((30, 4)) @ rng.standard_normal((4, 4)) for _ in range(2))
    c1, c2 = (np.cov(each, rowvar=False) for each in (first, second))
    offset = first.mean(axis=0) - second.mean(axis=0)
    root = scipy.linalg.sqrtm(c1 @ c2)
    expected = offset @ offset + np.trace(c1 + c2 - 2.0 * np.real(root))
    assert frechet(first, Gaussian.of(second)) == pytest.approx(expected, rel=1e-9)
    assert frechet(first, Gaussian.of(first)) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="two points"):
        Gaussian.of(np.zeros((1, 3)))


def test_the_frechet_distance_notices_wrong_pictures(fresh):
    features = RandomFeatures(butterflies.as_images(butterflies.sample_data(1, 600)[0]))
    reference = Gaussian.of(features.reference)
    right = frechet(features(fresh), reference)
    shrunk = fresh.reshape(len(fresh), 16, 2, 16, 2, 3).mean(axis=(2, 4))
    for name, wrong in {
        "blur": shrunk.repeat(2, axis=1).repeat(2, axis=2),
        "washed out": 0.5 + 0.7 * (fresh - 0.5),
        "halves": halves_of_different_butterflies(fresh),
        "one colour": np.repeat(fresh[::4], 4, axis=0),
    }.items():
        assert frechet(features(wrong.astype(np.float32)), reference) > 1.3 * right, name


def test_mirror_error_is_zero_for_the_data_one_for_noise_and_grows_between(fresh, rng):
    def error(images):
        return measures.ratio(measures.mirror_parts(images))

    assert error(fresh) == 0.0
    assert error(rng.standard_normal((200, 32, 32, 3))) == pytest.approx(1.0, abs=0.02)
    torn = halves_of_different_butterflies(fresh)
    assert error(torn) > error(fresh + 0.3 * (torn - fresh)) > 0.0
    assert error(torn) == pytest.approx(error(0.5 + 0.5 * (torn - 0.5)))  # whatever the contrast


def test_contrast_notices_a_washed_out_picture_and_can_be_given_back(fresh):
    pale = 0.5 + 0.5 * (fresh - 0.5)
    np.testing.assert_allclose(measures.contrast(pale), 0.5 * measures.contrast(fresh), rtol=1e-5)
    raised = measures.with_contrast(pale, float(measures.contrast(fresh).mean()))
    assert measures.contrast(raised).mean() == pytest.approx(measures.contrast(fresh).mean(), 0.02)
    assert np.abs(raised - fresh).mean() < 0.5 * np.abs(pale - fresh).mean()


def test_errors_are_the_textbook_s_and_what_seeds_share_cancels_in_the_change_from_off(rng):
    def mean(points):
        return float(points.mean())

    shared = rng.standard_normal((400, 1))
    sets = {"off": shared, "on": shared + 0.5 + 0.01 * rng.standard_normal((400, 1))}
    found = bootstrap(sets, mean, "off", resamples=2000)
    expected = shared.std(ddof=1) / math.sqrt(400)
    assert found["off"].error == pytest.approx(expected, rel=0.1)
    assert found["off"].change == found["off"].change_error == 0.0
    assert found["on"].change == pytest.approx(0.5, abs=0.01)
    assert found["on"].change_error < 0.1 * found["on"].error
    with pytest.raises(ValueError, match="same seeds"):
        bootstrap({**sets, "on": shared[:-1]}, mean, "off")
