"""The query blur alone, against the depthwise convolution of the released code."""

from __future__ import annotations

import functools
import importlib
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import host
from benchmarks.timing import interleaved

_IN_A_ROW = 5
_ROUNDS = 9


def reference_blur(query: torch.Tensor, height: int, width: int, sigma: float) -> torch.Tensor:
    """Blur as the released code does: a 2-D kernel, reflected borders, one conv for each channel.

    Source: `gaussian_blur_2d` of SusungHong/SEG-SDXL at cf8256d, written anew; its kernel is
    ceil(6 sigma) wide, made odd, and clamped to the map.
    """
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    size = min(size, height - (height % 2 - 1))
    half = (size - 1) / 2
    axis = torch.linspace(-half, half, size, device=query.device)
    line = torch.exp(-0.5 * (axis / sigma) ** 2)
    line = (line / line.sum()).to(query.dtype)
    channels = query.shape[2]
    planes = query.transpose(1, 2).unflatten(2, (height, width))
    kernel = (line[:, None] * line[None, :]).expand(channels, 1, size, size)
    padded = torch.nn.functional.pad(planes, [size // 2] * 4, mode="reflect")
    blurred = torch.nn.functional.conv2d(padded, kernel, groups=channels)
    return blurred.flatten(2).transpose(1, 2)


def measure(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the median seconds of ours and of the reference.

    They blur the queries of SDXL's middle block at 1024x1024, of one image.
    """
    host.pack()
    core = importlib.import_module(f"{host.PACK}.seg_core")
    height = width = 32
    query = torch.randn(1, height * width, 1280, device=device).to(dtype)
    matrices = core.BlurMatrices()
    runs = {
        "ours": lambda: core.blur_queries(query, (height, width), 10.0, matrices=matrices),
        "reference": lambda: reference_blur(query, height, width, 10.0),
    }
    with torch.inference_mode():
        for run in runs.values():
            run()
        # Several in a row: the first after the other one finds all caches cold.
        rows = {name: functools.partial(_several, run) for name, run in runs.items()}
        times = interleaved(rows, _ROUNDS, device)
    ours, reference = (statistics.median(times[name]) / _IN_A_ROW for name in runs)
    return ours, reference


def _several(run: Callable[[], Any]) -> None:
    for _ in range(_IN_A_ROW):
        run()
