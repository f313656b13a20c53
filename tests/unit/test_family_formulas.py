"""Formulas of the methods beside SEG that are newer than it, against loops written out."""

from __future__ import annotations

import math

import pytest
import torch

from seg_core import (
    draw_blocks,
    effective_cfg,
    held_difference,
    softened_attention,
    swap_least_similar,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swapped(vectors: list[torch.Tensor], ratio: float) -> list[torch.Tensor]:
    """Swap the least similar pairs of one sample, place by place."""
    size = len(vectors)
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
    unit = [v / v.norm() for v in vectors]
    pairs.sort(key=lambda pair: float(unit[pair[0]] @ unit[pair[1]]))
    chosen = pairs[: int(size * ratio)]
    places = list(range(size))
    for i, j in chosen:
        places[i] = j
    for i, j in chosen:
        places[j] = i
    return [vectors[place] for place in places]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_the_least_similar_tokens_and_then_channels_are_swapped(ratio: float) -> None:
    tokens = noise(3, 20, 12)
    expected = []
    for sample in tokens:
        rows = torch.stack(swapped(list(sample), ratio))
        expected.append(torch.stack(swapped(list(rows.T), ratio)).T)
    found = swap_least_similar(tokens, ratio)
    assert torch.equal(found, torch.stack(expected))
    assert not torch.equal(found, tokens)
    assert torch.equal(found[1:2], swap_least_similar(tokens[1:2], ratio)), "samples are apart"


def test_too_few_tokens_for_a_pair_stay() -> None:
    tokens = noise(2, 9, 9)
    assert torch.equal(swap_least_similar(tokens), tokens)
    one = noise(2, 1, 1)
    assert torch.equal(swap_least_similar(one, 1.0), one)
    two = noise(1, 2, 2)
    assert torch.equal(swap_least_similar(two, 1.0), two.flip(1, 2)), "there is one pair each"


def test_a_map_of_all_pairs_need_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = noise(1, 50, 30)
    whole = swap_least_similar(tokens, 0.3)
    monkeypatch.setattr("seg_core.perturbations._COSINES", 170)
    assert torch.equal(swap_least_similar(tokens, 0.3), whole)


def test_swapping_half_precision_keeps_values() -> None:
    tokens = noise(1, 32, 20).half()
    found = swap_least_similar(tokens)
    assert found.dtype == torch.float16
    assert torch.equal(found, swap_least_similar(tokens.float()).half())


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_smoothing_is_softened_between_two_outputs(strength: float) -> None:
    out, smoothed = noise(2, 3), noise(2, 3, seed=1)
    expected = (1 - strength) * out + strength * smoothed
    torch.testing.assert_close(softened_attention(out, smoothed, strength), expected)


def test_drawn_blocks_are_a_function_of_seed_and_step_alone() -> None:
    state = torch.get_rng_state()
    drawn = [draw_blocks(30, 3, 7, step) for step in range(200)]
    assert torch.equal(torch.get_rng_state(), state), "it takes no random number from others"
    assert drawn[5] == draw_blocks(30, 3, 7, 5)
    assert drawn != [draw_blocks(30, 3, 8, step) for step in range(200)]
    assert all(len(set(one)) == 3 and list(one) == sorted(one) for one in drawn)
    counts = torch.tensor([number for one in drawn for number in one]).bincount(minlength=30)
    assert counts.min() > 5, "each block is drawn at times"
    assert draw_blocks(4, 4, 0, 0) == (0, 1, 2, 3)


def test_a_held_difference_is_that_of_the_same_noise() -> None:
    """By hand: for eps, v and flow models, the difference of what a fixed noise error makes."""
    x, error = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    then, now = torch.tensor([5.0]).double(), torch.tensor([1.25]).double()

    def eps(sigma: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
        return x - sigma * (0.3 * x + wrong)

    def flow(sigma: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
        return x - sigma * (0.7 * x + wrong)

    def v(sigma: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
        root = (sigma**2 + 1).sqrt()
        velocity = 0.1 * x + wrong * root
        return x / (sigma**2 + 1) - velocity * sigma / root

    for model in (eps, flow, v):
        differences = [model(sigma, 0 * error) - model(sigma, error) for sigma in (then, now)]
        held = held_difference(differences[0], then, now)
        torch.testing.assert_close(held, differences[1], rtol=0, atol=1e-12)


def test_noise_levels_may_differ_in_a_batch() -> None:
    held = held_difference(torch.ones(2, 1, 1), torch.tensor([2.0, 4.0]), torch.tensor([1.0, 3.0]))
    assert held.flatten().tolist() == [0.5, 0.75]


def test_where_there_was_no_noise_none_is_held() -> None:
    held = held_difference(torch.zeros(1, 2, 2), torch.zeros(1), torch.ones(1))
    assert held.eq(0).all()


def test_effective_cfg_tells_strength_from_what_cfg_cannot_give() -> None:
    uncond, direction, other = (
        noise(1, 4, 5, 5),
        noise(1, 4, 5, 5, seed=1),
        noise(1, 4, 5, 5, seed=2),
    )
    other = other - (other * direction).sum() / (direction * direction).sum() * direction
    cond = uncond + direction
    plain = uncond + 7 * direction
    stronger = plain + 2 * direction
    cfg, beside = effective_cfg(plain, stronger, cond, uncond).tolist()
    assert cfg == pytest.approx(9)
    assert beside == pytest.approx(0, abs=1e-7)
    cfg, beside = effective_cfg(plain, plain + other, cond, uncond).tolist()
    assert cfg == pytest.approx(7)
    assert beside == pytest.approx(1)
    both = plain + 3 * direction / direction.norm() + 4 * other / other.norm()
    cfg, beside = effective_cfg(plain, both, cond, uncond).tolist()
    assert cfg == pytest.approx(7 + 3 / float(direction.norm()))
    assert beside == pytest.approx(0.8)
    assert all(math.isnan(n) for n in effective_cfg(plain, plain, cond, cond).tolist())
