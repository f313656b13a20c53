"""The blur matrices of one sampling run, built once per shape.

Deliberately not a module-level cache: the run owns the object and drops it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TypeAlias

import torch
from torch import Tensor

from ._shapes import Float
from .kernels import gaussian_matrix

_Key: TypeAlias = tuple[int, float, str, torch.dtype, str]


class BlurMatrices:
    """A bounded store of blur matrices, safe to share between threads.

    The least recently used matrix goes first.

    Args:
        limit: most matrices kept.

    Raises:
        ValueError: if ``limit`` is below 1.
    """

    def __init__(self, limit: int = 64) -> None:
        if limit < 1:
            raise ValueError(f"the limit of a matrix store must be at least 1, got {limit}")
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, Tensor] = OrderedDict()

    def get(
        self,
        size: int,
        sigma: float,
        kernel: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Float[Tensor, "size size"]:
        """Return a blur matrix, built on first use; not to be written to.

        Args:
            size: number of cells along the axis.
            sigma: blur width in cells.
            kernel: see `gaussian_matrix`.
            dtype: dtype of the result; it is rounded once, from float64.
            device: device of the result.

        Returns:
            The same tensor for the same arguments, while it is kept.

        Raises:
            ValueError: as `gaussian_matrix`.
        """
        key = (size, float(sigma), kernel, dtype, str(device))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        matrix = gaussian_matrix(size, sigma, kernel=kernel).to(device=device, dtype=dtype)
        with self._lock:
            matrix = self._kept.setdefault(key, matrix)
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        return matrix

    def clear(self) -> None:
        """Forget all matrices."""
        with self._lock:
            self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)
