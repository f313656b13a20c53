"""What other guidance of the family does to attention and to tokens, beside the blur of SEG."""

from __future__ import annotations

import torch
from torch import Tensor

from ._shapes import Float, Int

_SEED_BITS = 2**63 - 1


def identity_attention(
    out: Float[Tensor, "*rows dim"], value: Float[Tensor, "*rows dim"], strength: float = 1.0
) -> Float[Tensor, "*rows dim"]:
    r"""Return attention whose map is drawn towards the identity: each token sees itself.

    $$O = (1 - s)\,A V + s\,V$$

    Source: PAG, arXiv:2403.17377, for strength 1; SoftPAG, arXiv:2506.10978, between. Differs from
    them in: nothing.

    Args:
        out: the output of attention, $A V$.
        value: the tokens' own values.
        strength: ``s``; ``0`` changes nothing.

    Returns:
        The mixture, in the dtype of ``out``.
    """
    return torch.lerp(out, value.to(out.dtype), strength)


def token_permutation(tokens: int, seed: int, step: int, layer: int) -> Int[Tensor, " tokens"]:
    """Return the order in which a layer's tokens enter it; the same for the same numbers.

    Source: Token Perturbation Guidance, arXiv:2506.10036, as in
    TaatiTeam/Token-Perturbation-Guidance: one random order per layer and step, for all images of a
    batch. Differs from it in: drawn from the sampler's seed, on the CPU, so that a run can be
    repeated anywhere and no other random number is moved.

    Args:
        tokens: number of tokens.
        seed: of the sampler.
        step: number of the model evaluation.
        layer: number of the layer.

    Returns:
        The place from which each token comes, int64, on the CPU.
    """
    mixed = 0
    for number in (seed, step, layer):  # a step of splitmix64: near numbers give far seeds
        mixed = (mixed + number + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 27
    generator = torch.Generator().manual_seed(mixed & _SEED_BITS)
    return torch.randperm(tokens, generator=generator)


def shuffle_tokens(
    tokens: Float[Tensor, "batch tokens dim"], order: Int[Tensor, " tokens"]
) -> Float[Tensor, "batch tokens dim"]:
    r"""Return tokens in another order, $\tilde X = \Pi X$ with a permutation matrix $\Pi$.

    Source: Token Perturbation Guidance, arXiv:2506.10036. Differs from it in: nothing; the layer's
    output is not put back in order.

    Args:
        tokens: the tokens that enter a layer.
        order: the place from which each comes.

    Returns:
        The same tokens, elsewhere.
    """
    return tokens.index_select(1, order.to(tokens.device))
