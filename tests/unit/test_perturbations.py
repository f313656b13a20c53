"""What the relatives of SEG do to attention and to tokens, against formulas written out."""

from __future__ import annotations

import pytest
import torch

from seg_core import (
    AXES,
    TokenGrid,
    blur_queries,
    blur_slopes,
    column_mass,
    frame_shares,
    gaussian_matrix,
    identity_attention,
    mean_queries,
    repeat_rows,
    shuffle_tokens,
    token_permutation,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_map_is_drawn_to_the_identity(strength: float) -> None:
    weights, value = noise(5, 5).softmax(-1), noise(5, 4, seed=1)
    drawn = (1 - strength) * weights + strength * torch.eye(5)
    found = identity_attention(weights @ value, value, strength)
    torch.testing.assert_close(found, drawn @ value)


def test_an_order_is_a_permutation_and_a_function_of_its_numbers_alone() -> None:
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


def test_shuffling_is_a_permutation_matrix() -> None:
    tokens, order = noise(2, 6, 3), token_permutation(6, 1, 1, 1)
    matrix = torch.eye(6, dtype=torch.float64)[order]
    torch.testing.assert_close(shuffle_tokens(tokens, order), matrix @ tokens)
    assert not torch.equal(shuffle_tokens(tokens, order), tokens)


def dense(grid: TokenGrid, sigma: float, kernel: str, axes: str) -> torch.Tensor:
    sizes = ((grid.frames, "time"), (grid.height, "space"), (grid.width, "space"))
    whole = torch.ones(1, 1, dtype=torch.float64)
    for size, axis in sizes:
        width = sigma if axis in axes else 0.0
        whole = torch.kron(whole, gaussian_matrix(size, width, kernel=kernel))
    return whole


GRIDS = [TokenGrid(3, 2, 4), TokenGrid(1, 3, 3), TokenGrid(5, 1, 1), TokenGrid(1, 1, 1)]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("sigma", [0.0, 0.8, 3.0, float("inf")])
@pytest.mark.parametrize("kernel", ["reference", "full"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blur_over_time_is_a_third_matrix(
    grid: TokenGrid, kernel: str, sigma: float, axes: str
) -> None:
    query = noise(2, grid.tokens, 3)
    found = blur_queries(query, grid, sigma, kernel=kernel, axes=axes)
    whole = dense(grid, sigma, kernel, axes)
    torch.testing.assert_close(found, whole @ query, atol=1e-12, rtol=0)
    slopes = blur_slopes(grid, sigma, kernel=kernel, axes=axes)
    torch.testing.assert_close(slopes, whole.square().sum(dim=1), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("axes", "count"), [("space", 3), ("time", 8), ("space and time", 1)])
def test_means_stand_for_all_along_their_axes(axes: str, count: int) -> None:
    grid, query = TokenGrid(3, 2, 4), noise(2, 24, 3)
    means = mean_queries(query, grid, axes=axes)
    assert means.shape == (2, count, 3)
    expected = dense(grid, float("inf"), "full", axes) @ query
    torch.testing.assert_close(repeat_rows(means, grid, axes=axes), expected)
    for refused in (lambda: blur_queries(query, grid, 1.0, axes="depth"),
                    lambda: mean_queries(query, grid, axes="depth")):  # fmt: skip
        with pytest.raises(ValueError, match="axes must be one of space, time, space and time"):
            refused()


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 9), (2, 1, 1, 9), (2, 3, 1, 9), (1, 1, 6, 9)])
@pytest.mark.parametrize("boolean", [True, False])
def test_mass_under_a_mask_and_a_scale(
    boolean: bool, shape: tuple[int, ...], chunk: int | None
) -> None:
    query, key = noise(2, 6, 12), noise(2, 9, 12, seed=1)
    mask = noise(*shape, seed=2)
    mask = (mask > -1) | (torch.arange(9) == 0) if boolean else mask
    found = column_mass(query, key, 3, scale=0.7, mask=mask, chunk=chunk)
    q, k = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (query, key))
    logits = 0.7 * q @ k.mT
    logits = logits.masked_fill(~mask, -torch.inf) if boolean else logits + mask
    torch.testing.assert_close(found, logits.softmax(-1).sum(dim=2).mean(dim=1))


def test_shares_are_one_on_average_in_each_frame() -> None:
    mass = noise(2, 12).abs()
    shares = frame_shares(mass, (3, 2, 2))
    torch.testing.assert_close(shares.reshape(2, 3, 4).mean(2), torch.ones(2, 3).double())
    ratio = (shares / mass).reshape(2, 3, 4)
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    assert torch.equal(frame_shares(torch.zeros(1, 4), (2, 2)), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="must have 12 tokens"):
        frame_shares(mass[:, :11], (3, 2, 2))
