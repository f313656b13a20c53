"""What the relatives of SEG do to attention, tokens and blocks, against loops written out."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from seg_core.perturbations import (
    draw_blocks,
    identity_attention,
    shuffle_tokens,
    softened_attention,
    swap_least_similar,
    token_permutation,
)

# Attention.


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_strength_draws_the_map_to_the_identity_and_the_output_to_the_smoothed_one(draw, strength):
    weights, value, smoothed = draw(5, 5).softmax(-1), draw(5, 4), draw(5, 4)
    drawn = (1 - strength) * weights + strength * torch.eye(5, dtype=torch.float64)
    found = identity_attention(weights @ value, value, strength)
    torch.testing.assert_close(found, drawn @ value)
    expected = (1 - strength) * value + strength * smoothed
    torch.testing.assert_close(softened_attention(value, smoothed, strength), expected)


# Tokens.


def test_an_order_is_a_permutation_and_a_function_of_its_numbers_alone():
    state = torch.get_rng_state()
    first = token_permutation(100, 7, 3, 2)
    assert torch.equal(torch.get_rng_state(), state), "it takes no random number from others"
    torch.rand(5)
    assert torch.equal(first, token_permutation(100, 7, 3, 2))
    assert token_permutation(1, 0, 0, 0).tolist() == [0]
    assert sorted(first.tolist()) == list(range(100))
    others = [(8, 3, 2), (7, 4, 2), (7, 3, 1), (7, 2, 3), (3, 7, 2), (7 + 2**63, 3, 2), (-7, 3, 2)]
    orders = {tuple(token_permutation(100, *numbers).tolist()) for numbers in others}
    assert len(orders | {tuple(first.tolist())}) == len(others) + 1


def test_shuffling_is_a_permutation_matrix(draw):
    tokens = draw(2, 6, 3).float()
    order = token_permutation(6, 1, 1, 1)
    assert torch.equal(shuffle_tokens(tokens, order), torch.eye(6)[order] @ tokens)
    assert not torch.equal(shuffle_tokens(tokens, order), tokens)


def swapped(vectors: list[torch.Tensor], ratio: float) -> list[torch.Tensor]:
    """Swap the least similar pairs of one sample, place by place."""
    size = len(vectors)
    unit = [v / v.norm() for v in vectors]
    pairs = sorted(combinations(range(size), 2), key=lambda ij: float(unit[ij[0]] @ unit[ij[1]]))
    chosen = pairs[: int(size * ratio)]
    places = list(range(size))
    for i, j in chosen:
        places[i] = j
    for i, j in chosen:
        places[j] = i
    return [vectors[place] for place in places]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_the_least_similar_tokens_and_then_channels_are_swapped(draw, ratio):
    tokens = draw(3, 20, 12)
    expected = []
    for sample in tokens:
        rows = torch.stack(swapped(list(sample), ratio))
        expected.append(torch.stack(swapped(list(rows.T), ratio)).T)
    found = swap_least_similar(tokens, ratio)
    assert torch.equal(found, torch.stack(expected))
    assert not torch.equal(found, tokens)
    assert torch.equal(found[1:2], swap_least_similar(tokens[1:2], ratio)), "samples are apart"


def test_too_few_tokens_for_a_pair_stay(draw):
    tokens = draw(2, 9, 9)
    assert torch.equal(swap_least_similar(tokens), tokens)
    one = draw(2, 1, 1)
    assert torch.equal(swap_least_similar(one, 1.0), one)
    two = draw(1, 2, 2)
    assert torch.equal(swap_least_similar(two, 1.0), two.flip(1, 2)), "there is one pair each"


def test_a_map_of_all_pairs_need_not_fit_in_memory(draw, monkeypatch):
    tokens = draw(1, 50, 30)
    whole = swap_least_similar(tokens, 0.3)
    monkeypatch.setattr("seg_core.perturbations._COSINES", 170)
    assert torch.equal(swap_least_similar(tokens, 0.3), whole)


def test_swapping_half_precision_keeps_values(draw):
    tokens = draw(1, 32, 20).half()
    found = swap_least_similar(tokens)
    assert found.dtype == torch.float16
    assert torch.equal(found, swap_least_similar(tokens.float()).half())


# Blocks.


def test_drawn_blocks_are_a_function_of_seed_and_step_alone():
    state = torch.get_rng_state()
    drawn = [draw_blocks(30, 3, 7, step) for step in range(200)]
    assert torch.equal(torch.get_rng_state(), state), "it takes no random number from others"
    assert drawn[5] == draw_blocks(30, 3, 7, 5)
    assert drawn != [draw_blocks(30, 3, 8, step) for step in range(200)]
    assert all(len(set(one)) == 3 and list(one) == sorted(one) for one in drawn)
    counts = torch.tensor([number for one in drawn for number in one]).bincount(minlength=30)
    assert counts.min() > 5, "each block is drawn at times"
    assert draw_blocks(4, 4, 0, 0) == (0, 1, 2, 3)
