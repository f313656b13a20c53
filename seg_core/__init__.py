"""Smoothed Energy Guidance in PyTorch alone: formulas, no host.

Source: Susung Hong, "Smoothed Energy Guidance", arXiv:2408.00760.
"""

from __future__ import annotations

from .attention import attention_output as attention_output
from .attention import attention_weights as attention_weights
from .attention import smoothed_attention as smoothed_attention
from .blocks import Block as Block
from .blocks import Target as Target
from .blocks import all_targets as all_targets
from .blocks import describe as describe
from .blocks import describe_targets as describe_targets
from .blocks import require_heads as require_heads
from .blocks import select as select
from .blocks import select_heads as select_heads
from .blocks import select_random as select_random
from .blur import blur_queries as blur_queries
from .blur import is_identity as is_identity
from .blur import mean_queries as mean_queries
from .blur import repeat_rows as repeat_rows
from .energy import attention_energy as attention_energy
from .energy import blur_slopes as blur_slopes
from .energy import energy_curvature as energy_curvature
from .energy import logit_variance as logit_variance
from .energy import mean_logsumexp as mean_logsumexp
from .energy import row_curvature as row_curvature
from .energy import smoothed_logits as smoothed_logits
from .grid import AXES as AXES
from .grid import TokenGrid as TokenGrid
from .grid import as_grid as as_grid
from .grid import halved_grid as halved_grid
from .grid import require_axes as require_axes
from .grid import require_tokens as require_tokens
from .guidance import RESCALE_MODES as RESCALE_MODES
from .guidance import Window as Window
from .guidance import apply_guidance as apply_guidance
from .guidance import blend as blend
from .guidance import effective_cfg as effective_cfg
from .guidance import held_difference as held_difference
from .kernels import KERNELS as KERNELS
from .kernels import gaussian_matrix as gaussian_matrix
from .kernels import require_kernel as require_kernel
from .matrices import BlurMatrices as BlurMatrices
from .perturbations import draw_blocks as draw_blocks
from .perturbations import identity_attention as identity_attention
from .perturbations import shuffle_tokens as shuffle_tokens
from .perturbations import softened_attention as softened_attention
from .perturbations import swap_least_similar as swap_least_similar
from .perturbations import token_permutation as token_permutation
from .saliency import blur_latent as blur_latent
from .saliency import column_mass as column_mass
from .saliency import degrade as degrade
from .saliency import frame_shares as frame_shares
from .saliency import saliency_mask as saliency_mask
from .saliency import spread_mass as spread_mass
