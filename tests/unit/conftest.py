"""Settings of hypothesis, and a seeded generator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("unit", deadline=None, derandomize=True, database=None)
settings.load_profile("unit")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240800)
