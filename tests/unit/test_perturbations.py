"""What the relatives of SEG do to attention and to tokens, against formulas written out."""

from __future__ import annotations

import pytest
import torch

from seg_core.perturbations import identity_attention, shuffle_tokens, token_permutation


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_map_is_drawn_to_the_identity(generator, strength):
    weights = torch.rand(5, 5, generator=generator).softmax(-1)
    value = torch.randn(5, 4, generator=generator)
    drawn = (1 - strength) * weights + strength * torch.eye(5)
    found = identity_attention(weights @ value, value, strength)
    torch.testing.assert_close(found, drawn @ value)


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


def test_shuffling_is_a_permutation_matrix(generator):
    tokens = torch.randn(2, 6, 3, generator=generator)
    order = token_permutation(6, 1, 1, 1)
    assert torch.equal(shuffle_tokens(tokens, order), torch.eye(6)[order] @ tokens)
    assert not torch.equal(shuffle_tokens(tokens, order), tokens)
