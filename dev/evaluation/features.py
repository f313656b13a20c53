"""Features of pictures, in which sets of pictures are compared.

`RandomFeatures` needs nothing but PyTorch: an untrained, seeded convolution network. It orders
versions of one subject; it knows nothing of objects. `InceptionFeatures` are those of the
Frechet inception distance (FID), by the package torch-fidelity, if a person has installed it.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

WIDTHS = (32, 64, 128, 128)
CELLS = 2
COMPONENTS = 48
SEED = 20240800760
CHUNK = 32
WEIGHTS_NOTE = (
    "Inception v3 weights weights-inception-2015-12-05-6726825d.pth (those of the original FID), "
    "which torch-fidelity fetches from its own releases on GitHub at the first use"
)


class RandomFeatures:
    """Statistics of a random convolution network, standardised and reduced on reference data.

    Args:
        reference: pictures of the data, ``(N, height, width, 3)`` in [0, 1].
    """

    note = "seeded random convolution features"

    def __init__(self, reference: Iterable[np.ndarray]) -> None:
        self._layers = _random_layers()
        raw = self._raw(reference)
        self._mean, self._std = raw.mean(axis=0), raw.std(axis=0) + 1e-8
        standard = (raw - self._mean) / self._std
        # The right singular vectors, from the smaller Gram matrix; the largest come last.
        kept = min(COMPONENTS, len(raw) - 1, raw.shape[1])
        if len(raw) < raw.shape[1]:
            values, left = np.linalg.eigh(standard @ standard.T)
            axes = standard.T @ (left[:, -kept:] / np.sqrt(values[-kept:].clip(1e-12)))
        else:
            axes = np.linalg.eigh(standard.T @ standard)[1][:, -kept:]
        self._axes = axes
        self.reference = standard @ axes

    def __call__(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return the features of pictures, ``(N, components)``."""
        return (self._raw(images) - self._mean) / self._std @ self._axes

    def _raw(self, images: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([self._chunk(chunk) for chunk in chunks(images)])

    def _chunk(self, images: np.ndarray) -> np.ndarray:
        import torch
        from torch.nn.functional import adaptive_avg_pool2d, conv2d, leaky_relu

        x = torch.from_numpy(images).float().movedim(-1, 1) * 2.0 - 1.0
        found = []
        for index, weight in enumerate(self._layers):
            x = leaky_relu(conv2d(x, weight, padding=1, stride=1 if index == 0 else 2), 0.2)
            mean = adaptive_avg_pool2d(x, CELLS)
            spread = (adaptive_avg_pool2d(x**2, CELLS) - mean**2).clamp(min=1e-8).sqrt()
            found += [mean.flatten(1), spread.flatten(1)]
        return torch.cat(found, dim=1).double().numpy()


def _random_layers() -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    layers, inputs = [], 3
    for width in WIDTHS:
        weight = torch.randn(width, inputs, 3, 3, generator=generator)
        layers.append(weight * (2.0 / (9 * inputs)) ** 0.5)
        inputs = width
    return layers


class InceptionFeatures:
    """The 2048 features of the Frechet inception distance, by torch-fidelity.

    Args:
        reference: pictures of the data.
    """

    note = "Inception features (FID) by torch-fidelity"

    def __init__(self, reference: Iterable[np.ndarray]) -> None:
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._network = network.eval().to(self._device)
        self.reference = self(reference)

    def __call__(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return the features of pictures, ``(N, 2048)``."""
        import torch

        found = []
        for chunk in chunks(images):
            pixels = torch.from_numpy((chunk * 255.0).round().astype(np.uint8)).movedim(-1, 1)
            with torch.no_grad():
                (features,) = self._network(pixels.to(self._device))
            found.append(features.double().cpu().numpy())
        return np.concatenate(found)


def has_inception() -> bool:
    """Tell whether torch-fidelity is installed."""
    return importlib.util.find_spec("torch_fidelity") is not None


def chunks(images: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    """Yield stacks of a few pictures, in order; all have one size."""
    rest = iter(images)
    while stack := list(itertools.islice(rest, CHUNK)):
        yield np.stack(stack)
