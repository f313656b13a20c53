"""What other guidance of the family does to attention and to tokens, beside the blur of SEG."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._shapes import Float, Int
from .blur import working_dtype

_SEED_BITS = 2**63 - 1
_COSINES = 2**24


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


def softened_attention(
    out: Float[Tensor, "*rows dim"], smoothed: Float[Tensor, "*rows dim"], strength: float
) -> Float[Tensor, "*rows dim"]:
    r"""Return the output of attention drawn towards that of smoothed queries.

    $$O = (1 - u)\,A V + u\,\tilde A V$$

    Source: SoftSEG of HeadHunter, arXiv:2506.10978v4, appendix C.2, for the mean query. Differs
    from it in: any blur.

    Args:
        out: the output of the layer's own attention, $A V$.
        smoothed: the output of attention with smoothed queries.
        strength: ``u``; ``0`` changes nothing, ``1`` is SEG.

    Returns:
        The mixture, in the dtype of ``out``.
    """
    return torch.lerp(out, smoothed.to(out.dtype), strength)


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
    return torch.randperm(tokens, generator=_generator(seed, step, layer))


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


def swap_least_similar(
    tokens: Float[Tensor, "batch tokens dim"], ratio: float = 0.1
) -> Float[Tensor, "batch tokens dim"]:
    r"""Return tokens of which the least similar have changed places, and then channels likewise.

    Similar is what has a high cosine. Of all pairs $i < j$, the $\lfloor r n \rfloor$ with the
    lowest cosine are swapped, each sample by itself.

    Source: Self-Swap Guidance (SSG), arXiv:2604.08048, as in VISION-SJTU/SSG at c718f79, which the
    paper's figures come from. The paper calls the result a permutation. In the code a token that is
    in several pairs takes the place of its last partner, where it stands second if it ever does, so
    that tokens can be lost and others repeated; the code is followed. Differs from it in: the last
    partner is the same on every device, and cosines are computed in at least float32.

    Args:
        tokens: the tokens that enter a block.
        ratio: pairs that are swapped, as a share of the number of tokens, and of channels.

    Returns:
        As many tokens.
    """
    swapped = _pairs_swapped(tokens, ratio)
    return _pairs_swapped(swapped.mT, ratio).mT


def draw_blocks(pool: int, count: int, seed: int, step: int) -> tuple[int, ...]:
    """Return which of a pool of blocks are drawn in a step; the same for the same numbers.

    Source: S2-Guidance, arXiv:2508.12880: blocks drawn anew in each step. Differs from it in: drawn
    from the sampler's seed, so that a run can be repeated anywhere.

    Args:
        pool: number of blocks to draw from.
        count: number of blocks to draw.
        seed: of the sampler.
        step: number of the model evaluation.

    Returns:
        Numbers of blocks, rising.
    """
    order = torch.randperm(pool, generator=_generator(seed, step, 0))
    return tuple(sorted(int(number) for number in order[:count]))


def _pairs_swapped(vectors: Tensor, ratio: float) -> Tensor:
    """Return vectors `(batch, n, dim)` of which the least similar pairs have changed places."""
    size = vectors.shape[1]
    count = min(int(size * ratio), size * (size - 1) // 2)
    if count == 0:
        return vectors
    # One sample at a time: cosines of all pairs are many.
    return torch.stack([sample[_places(sample, count)] for sample in vectors])


def _places(vectors: Float[Tensor, "n dim"], count: int) -> Int[Tensor, " n"]:
    """Return from where each vector comes when `count` pairs are swapped, one after the other."""
    first, second = _least_similar(normalize(vectors.to(working_dtype(vectors)), dim=1), count)
    size = len(vectors)
    turn = torch.arange(count, device=vectors.device)
    none = torch.full((size,), -1, device=vectors.device)
    as_first = none.scatter_reduce(0, first, turn, "amax")
    as_second = none.scatter_reduce(0, second, turn, "amax")
    own = torch.arange(size, device=vectors.device)
    source = torch.where(as_first < 0, own, second[as_first])
    return torch.where(as_second < 0, source, first[as_second])


def _least_similar(unit: Float[Tensor, "n dim"], count: int) -> tuple[Tensor, Tensor]:
    """Return both vectors' numbers of the pairs with the lowest cosines, from the lowest on."""
    size = len(unit)
    numbers = torch.arange(size, device=unit.device)
    cosines, pairs = unit.new_empty(0), numbers.new_empty(0)
    lines = max(_COSINES // size, 1)  # a map of all pairs may be too large
    for start in range(0, size, lines):
        here = unit[start : start + lines] @ unit.T
        here = here.masked_fill(numbers <= numbers[start : start + lines, None], torch.inf)
        cosines = torch.cat([cosines, here.flatten()])
        found = torch.arange(here.numel(), device=unit.device) + start * size
        pairs = torch.cat([pairs, found])
        cosines, kept = cosines.topk(min(count, len(cosines)), largest=False)
        pairs = pairs[kept]
    return pairs // size, pairs % size


def _generator(*numbers: int) -> torch.Generator:
    mixed = 0
    for number in numbers:  # a step of splitmix64: near numbers give far seeds
        mixed = (mixed + number + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 27
    return torch.Generator().manual_seed(mixed & _SEED_BITS)
