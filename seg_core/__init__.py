"""Smoothed Energy Guidance in PyTorch alone: formulas, no host.

Source: Susung Hong, "Smoothed Energy Guidance", arXiv:2408.00760.
"""

from __future__ import annotations

from .blur import blur_queries as blur_queries
from .blur import is_identity as is_identity
from .blur import mean_queries as mean_queries
from .grid import TokenGrid as TokenGrid
from .grid import as_grid as as_grid
from .grid import halved_grid as halved_grid
from .grid import require_tokens as require_tokens
from .kernels import KERNELS as KERNELS
from .kernels import gaussian_matrix as gaussian_matrix
from .kernels import require_kernel as require_kernel
from .matrices import BlurMatrices as BlurMatrices
