"""Judge pictures of the demo model: are they digits, and the digits asked for?

Usage: ``python dev/demo_model/evaluate.py images.npz``

The file holds ``images``, in [0, 1], ``(N, H, W)`` with or without a channel axis, and
optionally ``labels``, the digit asked for or -1 for none. Everything runs on scikit-learn
without ComfyUI. ``evaluate(images, labels)`` does the same from Python.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import train

SIZE = train.CONFIG["image_size"]
HELD_OUT = 0.25
COMPONENTS = 32


@lru_cache(maxsize=1)
def reference() -> dict[str, Any]:
    """Fit the judges on the data set.

    Returns:
        A dict: ``classifier`` (an SVC fitted on three quarters of the digits),
        ``held_out_accuracy`` (on the rest), ``margin`` (its median margin on the rest),
        ``images`` (all digits, flat, in [0, 1]), and ``pca`` fitted on all digits.
    """
    from sklearn.decomposition import PCA
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    images, labels = train.load_digits_images(SIZE)
    images = (images.reshape(len(images), -1) + 1.0) * 0.5
    split = train_test_split(images, labels, test_size=HELD_OUT, random_state=0, stratify=labels)
    classifier = SVC(C=10.0, gamma="scale").fit(split[0], split[2])
    return {
        "classifier": classifier,
        "held_out_accuracy": float(classifier.score(split[1], split[3])),
        "margin": float(np.median(margins(classifier, split[1]))),
        "images": images,
        "pca": PCA(COMPONENTS, random_state=0).fit(images),
    }


def margins(classifier: Any, flat: np.ndarray) -> np.ndarray:
    """Return how far the best class's score lies above the second best, per picture.

    Args:
        classifier: A fitted classifier with a ``decision_function``.
        flat: Pictures ``(N, pixels)`` in [0, 1].
    """
    scores = np.sort(classifier.decision_function(flat), axis=1)
    return scores[:, -1] - scores[:, -2]


def flatten(images: np.ndarray) -> np.ndarray:
    """Bring pictures to ``(N, SIZE * SIZE)``.

    Args:
        images: Array in [0, 1]: ``(N, H, W)``, ``(N, 1, H, W)`` or ``(N, H, W, C)``. Larger
            pictures, of a whole multiple of the size, are averaged down.

    Returns:
        A float64 array.
    """
    images = np.asarray(images, dtype=np.float64)
    if images.ndim == 4:
        images = images[:, 0] if images.shape[1] == 1 else images.mean(axis=-1)
    if images.ndim != 3 or images.shape[1] != images.shape[2] or images.shape[1] % SIZE:
        raise ValueError(f"pictures must be square multiples of {SIZE}: {images.shape}")
    factor = images.shape[1] // SIZE
    images = images.reshape(len(images), SIZE, factor, SIZE, factor).mean(axis=(2, 4))
    return images.reshape(len(images), -1).clip(0.0, 1.0)


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Frechet distance between Gaussians fitted to two sets of points.

    Args:
        first: Array ``(N, d)``.
        second: Array ``(M, d)``.
    """
    difference = first.mean(axis=0) - second.mean(axis=0)
    covariances = [np.cov(points, rowvar=False) for points in (first, second)]
    # The trace of the root of a product of covariances, through a symmetric root.
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(0.0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0.0)
    traces = sum(np.trace(covariance) for covariance in covariances)
    return float(difference @ difference + traces - 2.0 * np.sqrt(inner).sum())


def evaluate(images: np.ndarray, labels: np.ndarray | None = None) -> dict[str, Any]:
    """Measure a set of generated pictures.

    Args:
        images: See ``flatten``.
        labels: The digit asked for, per picture, or -1; None for no labels.

    Returns:
        A dict of plain numbers: ``count``; ``accuracy`` over the labelled pictures (None
        without any) as the classifier sees them; ``held_out_accuracy``, the same
        classifier's on real digits it has not seen; ``margin`` and ``real_margin``, the
        median of its margins on these and on real digits; ``nearest_rms``, the median
        distance to the nearest real digit; ``frechet``, the Frechet distance to the real
        digits in 32 principal components (None under 64 pictures); ``classes``, how many
        pictures it takes for each digit.
    """
    from sklearn.neighbors import NearestNeighbors

    judge = reference()
    flat = flatten(images)
    predicted = judge["classifier"].predict(flat)
    accuracy = None
    if labels is not None:
        labels = np.asarray(labels)
        asked = labels >= 0
        if asked.any():
            accuracy = float((predicted[asked] == labels[asked]).mean())
    distances, _ = NearestNeighbors(n_neighbors=1).fit(judge["images"]).kneighbors(flat)
    distance = None
    if len(flat) >= 2 * COMPONENTS:
        distance = frechet(judge["pca"].transform(flat), judge["pca"].transform(judge["images"]))
    return {
        "count": len(flat),
        "accuracy": accuracy,
        "held_out_accuracy": judge["held_out_accuracy"],
        "margin": float(np.median(margins(judge["classifier"], flat))),
        "real_margin": judge["margin"],
        "nearest_rms": float(np.median(distances) / SIZE),
        "frechet": distance,
        "classes": np.bincount(predicted, minlength=10).tolist(),
    }


def main() -> None:
    """Judge files from the command line."""
    parser = argparse.ArgumentParser(description="Judge pictures of the demo model.")
    parser.add_argument("files", nargs="+", type=Path, help=".npz files with images and labels")
    for path in parser.parse_args().files:
        with np.load(path) as data:
            result = evaluate(data["images"], data.get("labels"))
        rounded = {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in result.items()
        }
        sys.stdout.write(f"{path.name} {json.dumps(rounded)}\n")


if __name__ == "__main__":
    main()
