"""Smoothed Energy Guidance in PyTorch alone: formulas, no host.

Source: Susung Hong, "Smoothed Energy Guidance", arXiv:2408.00760.
"""

from __future__ import annotations

from .grid import TokenGrid as TokenGrid
from .grid import as_grid as as_grid
from .grid import halved_grid as halved_grid
from .grid import require_tokens as require_tokens
