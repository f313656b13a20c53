"""Two ways to tame strong guidance: matching a sample's spread, and picking by saliency.

Deliberately per sample throughout: a batch mate never changes an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._shapes import Float
from .blur import blur_planes
from .kernels import reflected_matrix


def rescale_factor(
    target: Float[Tensor, " batch *latent"],
    result: Float[Tensor, " batch *latent"],
    amount: float,
) -> Tensor:
    r"""Return the factor that pulls a sample's standard deviation towards its target's.

    $$1 - r + r\, \operatorname{std}(\text{target}) / \operatorname{std}(\text{result})$$

    Source: arXiv:2305.08891, section 3.4. Differs from it in: where the result does not vary at
    all the factor is 1.

    Convention: statistics over everything but the batch axis.

    Args:
        target: the prediction whose spread is wanted.
        result: the guided result before the correction.
        amount: share ``r`` of the correction; ``0`` gives 1.

    Returns:
        One factor per sample, shaped to multiply a latent.
    """
    wanted, found = (_spread(tensor) for tensor in (target, result))
    ratio = torch.where(found > 0, wanted / found.clamp_min(torch.finfo(found.dtype).tiny), 1.0)
    return 1.0 - amount + amount * ratio


def salient_fusion(
    first: Float[Tensor, "batch channels *cells"],
    second: Float[Tensor, "batch channels *cells"],
) -> Float[Tensor, "batch channels *cells"]:
    r"""Return, for each cell, the one of two differences that stands out more on its own map.

    $$\Omega(x) = \operatorname{softmax}(G_3 * |x|)$$

    Source: saliency-adaptive noise fusion, as pamparamm/sd-perturbed-attention has it
    (guidance_utils.py at 59be2a7, after CodeGoat24/Face-diffuser). Differs from it in: the blur is
    clamped on both axes; a video's frames have a map each.

    Convention: 3 Gaussian taps of sigma 1; softmax over the cells of one channel (and frame).

    Args:
        first: the difference that wins a tie.
        second: the other difference.

    Returns:
        A mixture of both, cell by cell.
    """
    chosen = _saliency(second) > _saliency(first)
    return torch.where(chosen, second, first)


def _spread(tensor: Tensor) -> Tensor:
    spread = tensor.flatten(1).std(dim=1, correction=0)
    return spread.reshape(-1, *[1] * (tensor.ndim - 1))


def _saliency(difference: Tensor) -> Tensor:
    """Softmax of the blurred magnitude over each plane; a 1-D signal is a plane of one row."""
    planes = difference.abs()
    planes = planes if planes.ndim > 3 else planes.unsqueeze(-2)
    blurs = [reflected_matrix(size, 1.0, 3) for size in planes.shape[-2:]]
    scores = blur_planes(planes, blurs[0], blurs[1])
    return torch.softmax(scores.flatten(-2), dim=-1).reshape(difference.shape)
