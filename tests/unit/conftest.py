"""Settings of hypothesis, and seeded random tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import settings

settings.register_profile("unit", deadline=None, derandomize=True, database=None)
settings.load_profile("unit")


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """From a shape to normal random numbers in float64."""
    seeded = torch.Generator().manual_seed(20240800)
    return partial(torch.randn, generator=seeded, dtype=torch.float64)
