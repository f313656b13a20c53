"""The unit tests' own folder on the import path, for `oracles`, and a seeded generator."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.append(HERE)

settings.register_profile("unit", deadline=None, derandomize=True, database=None)
settings.load_profile("unit")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240800)
