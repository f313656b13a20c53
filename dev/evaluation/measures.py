"""Measures of sets of pictures: against reference data, against themselves, against *off*.

Pictures are arrays ``(N, height, width, 3)`` in [0, 1]; features are ``(N, features)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian of a set of reference features, prepared for many comparisons.

    Attributes:
        mean: ``(features,)``.
        root: symmetric square root of the covariance.
        trace: trace of the covariance, the variance of the data in all features together.
    """

    mean: np.ndarray
    root: np.ndarray
    trace: float

    @classmethod
    def of(cls, points: np.ndarray) -> Gaussian:
        """Fit mean and covariance to reference features."""
        points = _at_least_two(points)
        covariance = np.atleast_2d(np.cov(points, rowvar=False))
        values, vectors = np.linalg.eigh(covariance)
        root = (vectors * np.sqrt(values.clip(0.0))) @ vectors.T
        return cls(points.mean(axis=0), root, float(np.trace(covariance)))


def frechet(points: np.ndarray, reference: Gaussian) -> float:
    r"""Return the Frechet distance between the Gaussians of two sets of features.

    $$|\mu - \mu_r|^2 + \mathrm{tr}\left(C + C_r - 2 (C_r^{1/2} C C_r^{1/2})^{1/2}\right)$$

    Source: Heusel et al., arXiv:1706.08500, equation 6.

    Args:
        points: features of the pictures to judge.
        reference: the Gaussian of the data.
    """
    points = _at_least_two(points)
    centred = points - points.mean(axis=0)
    spread = centred @ reference.root / np.sqrt(len(points) - 1)
    # With X the scaled points, C = X'X, so the trace of the root is the sum of the singular
    # values of X C_r^(1/2); its smaller Gram matrix has their squares.
    gram = spread @ spread.T if len(points) < spread.shape[1] else spread.T @ spread
    overlap = np.sqrt(np.linalg.eigvalsh(gram).clip(0.0)).sum()
    offset = points.mean(axis=0) - reference.mean
    own = (centred**2).sum() / (len(points) - 1)
    return float(offset @ offset + own + reference.trace - 2.0 * overlap)


def _at_least_two(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(f"a Gaussian needs at least two points (N, features), got {points.shape}")
    return points


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; `change` is the paired difference from *off*."""

    value: float
    error: float
    change: float
    change_error: float


def bootstrap(
    sets: Mapping[str, np.ndarray],
    measure: Callable[[np.ndarray], float],
    off: str,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Measure every set, with standard errors from resampling the seeds of all sets alike.

    The same seeds are drawn for every set, so what the sets have in common cancels in the
    difference from *off*.

    Args:
        sets: for each setting an array whose first axis is the seed, the same in all.
        measure: from such an array to a number.
        off: name of the set that the others are compared with.
        resamples: how many times the seeds are drawn with replacement.
        seed: of the resampling.
    """
    counts = {len(each) for each in sets.values()}
    if len(counts) != 1:
        raise ValueError(f"paired sets must have the same seeds, got {sorted(counts)} of them")
    count = counts.pop()
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, count, (resamples, count))
    drawn = {name: np.array([measure(each[d]) for d in draws]) for name, each in sets.items()}
    values = {name: measure(each) for name, each in sets.items()}
    return {
        name: Estimate(
            values[name],
            float(drawn[name].std(ddof=1)),
            values[name] - values[off],
            float((drawn[name] - drawn[off]).std(ddof=1)),
        )
        for name in sets
    }


def mirror_parts(images: np.ndarray) -> np.ndarray:
    """Return ``(N, 2)``: what the halves disagree by, and what unrelated pixels would.

    Both are variances, so ``ratio`` of them is the mirror error: 0 if each picture is
    its own mirror image, 1 if a pixel tells nothing about the one across.
    """
    images = np.asarray(images, dtype=np.float64)
    apart = ((images - images[:, :, ::-1]) ** 2).mean(axis=(1, 2, 3)) / 2.0
    own = images.reshape(len(images), -1, images.shape[-1]).var(axis=1).mean(axis=-1)
    return np.stack([apart, own], axis=1)


def ratio(parts: np.ndarray) -> float:
    """Return the ratio of the means of two columns."""
    first, second = parts.mean(axis=0)
    return float(first / max(second, 1e-12))


def contrast(images: np.ndarray) -> np.ndarray:
    """Return each picture's contrast: the standard deviation of its luma."""
    return (np.asarray(images, dtype=np.float64) @ LUMA).std(axis=(1, 2))


def with_contrast(images: np.ndarray, wanted: float) -> np.ndarray:
    """Return pictures stretched about their own means, by one factor, to a mean contrast.

    A control: what a gain comes to that a photo editor could have had from the same pictures.
    """
    factor = wanted / float(contrast(images).mean())
    middle = images.mean(axis=(1, 2, 3), keepdims=True)
    return (middle + factor * (images - middle)).clip(0.0, 1.0).astype(np.float32)


def saturation(images: np.ndarray) -> np.ndarray:
    """Return each picture's mean difference between its strongest and weakest channel."""
    images = np.asarray(images, dtype=np.float64)
    return (images.max(axis=-1) - images.min(axis=-1)).mean(axis=(1, 2))


def moved(images: np.ndarray, off: np.ndarray) -> float:
    """Return the RMS difference from *off*, as a share of the contrast (std) of *off*."""
    changed, plain = (np.asarray(each, dtype=np.float64) for each in (images, off))
    return float(np.sqrt(((changed - plain) ** 2).mean()) / max(plain.std(), 1e-12))
