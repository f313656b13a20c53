"""The demo model's data: symmetric, varied, seeded, and of the colour asked for."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from dev.demo_model import butterflies


@pytest.mark.parametrize("size", [2, 14, 32, 50])
def test_every_picture_is_its_own_mirror_image_exactly(size):
    pictures, _ = butterflies.sample_data(3, 40, size)
    assert pictures.shape == (40, 3, size, size)
    np.testing.assert_array_equal(pictures, pictures[..., ::-1])


def test_pictures_lie_in_the_models_range_and_use_it():
    pictures, _ = butterflies.sample_data(0, 200)
    assert pictures.dtype == np.float32
    assert -1.0 <= pictures.min() < -0.9
    assert 0.9 < pictures.max() <= 1.0


def test_the_seed_decides_everything():
    first, again, other = (butterflies.sample_data(seed, 20)[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max(axis=(1, 2, 3)).min() > 0.5


def test_no_two_pictures_are_alike():
    flat = butterflies.sample_data(1, 300)[0].reshape(300, -1).astype(np.float64)
    squares = (flat**2).sum(axis=1)
    apart = squares[:, None] + squares[None] - 2.0 * flat @ flat.T
    apart[np.diag_indices(300)] = np.inf
    assert np.sqrt(apart.min() / flat.shape[1]) > 0.05


def test_more_pictures_begin_with_the_same_classes_in_turn():
    _, classes = butterflies.sample_data(0, 9)
    assert classes.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("index", range(len(butterflies.HUES)))
def test_a_class_is_the_hue_of_the_wings(index):
    wanted = list(butterflies.HUES.values())[index]
    look = butterflies.appearance(np.random.default_rng(2), np.full(50, index))
    for wing in ("fore", "hind"):
        for colour in look[wing + "_colour"]:
            away = abs(colorsys.rgb_to_hsv(*colour)[0] - wanted)
            assert min(away, 1.0 - away) < 0.1


def test_hsv_agrees_with_the_standard_library():
    hue, saturation, value = np.random.default_rng(0).uniform(size=(3, 100))
    expected = [colorsys.hsv_to_rgb(*each) for each in zip(hue, saturation, value, strict=True)]
    np.testing.assert_allclose(butterflies.hsv(hue, saturation, value), expected, atol=1e-12)


def test_a_circle_has_the_area_of_a_circle():
    grid = (np.arange(64) + 0.5) / 32.0 - 1.0
    x, y = np.broadcast_arrays(grid[None, :], grid[:, None])
    mask = butterflies.ellipse(x, y, np.array([[0.1, -0.2, 0.5, 0.5, 0.3]]), 64)
    assert mask.sum() / 32.0**2 == pytest.approx(np.pi * 0.25, rel=0.01)


def test_images_are_the_pictures_with_channels_last():
    pictures, _ = butterflies.sample_data(0, 3)
    images = butterflies.as_images(pictures)
    assert images.shape == (3, 32, 32, 3)
    np.testing.assert_allclose(images[1, 4, 5] * 2.0 - 1.0, pictures[1, :, 4, 5], atol=1e-6)


def test_an_odd_size_is_refused():
    with pytest.raises(ValueError, match="even"):
        butterflies.sample_data(0, 1, 31)
