"""Wall time of several things, each measured in turn, so that what disturbs one disturbs all."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch


def wall_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, to its end on the device."""
    _finish(device)
    begin = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - begin


def interleaved(
    runs: Mapping[Hashable, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[Any, list[float]]:
    """Return the seconds of each run, one of each per round, in another order every round.

    What is slow the first time must have run before.
    """
    order = list(runs)
    shuffle = random.Random(0).shuffle
    seconds: dict[Any, list[float]] = {name: [] for name in order}
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            seconds[name].append(wall_seconds(runs[name], device))
    return seconds


def spread(seconds: list[float]) -> float:
    """Return half the distance from the fastest to the slowest, relative to the median."""
    return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Return the allocator's peak above what was there before; None where it has no count."""
    if device.type != "cuda":
        return None
    _finish(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    _finish(device)
    return torch.cuda.max_memory_allocated(device) - before


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
