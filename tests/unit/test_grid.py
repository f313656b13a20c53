"""Token grids: what fits, what is refused, and what halving does."""

from __future__ import annotations

import pytest
import torch

from seg_core.grid import TokenGrid, as_grid, halved_grid, require_tokens


def test_two_sizes_are_one_frame():
    assert as_grid((5, 7)) == TokenGrid(1, 5, 7)


def test_three_sizes_start_with_frames():
    grid = as_grid((3, 5, 7))
    assert (grid.frames, grid.height, grid.width) == (3, 5, 7)
    assert (grid.cells, grid.tokens) == (35, 105)


def test_a_grid_and_a_tensor_shape_are_accepted():
    grid = TokenGrid(3, 5, 7)
    assert as_grid(grid) is grid
    assert as_grid(torch.Size((5, 7))) == TokenGrid(1, 5, 7)


@pytest.mark.parametrize("sizes", [(), (5,), (2, 3, 5, 7), (0, 7), (5, -7), (5.0, 7), ("5", 7)])
def test_anything_else_is_refused(sizes):
    with pytest.raises(ValueError, match="grid"):
        as_grid(sizes)


def test_a_wrong_token_count_names_both_counts():
    require_tokens(35, (5, 7))
    with pytest.raises(ValueError, match=r"35 tokens, got 36"):
        require_tokens(36, (5, 7))


@pytest.mark.parametrize(
    ("levels", "expected"), [(0, (75, 104)), (1, (38, 52)), (2, (19, 26)), (3, (10, 13))]
)
def test_halving_rounds_up_at_every_level(levels, expected):
    assert halved_grid(75, 104, levels) == expected


def test_halving_agrees_with_a_strided_convolution():
    shape = torch.zeros(1, 1, 37, 53)
    for levels in range(5):
        assert halved_grid(37, 53, levels) == tuple(shape.shape[2:])
        shape = torch.nn.functional.conv2d(shape, torch.zeros(1, 1, 3, 3), stride=2, padding=1)


def test_negative_levels_are_refused():
    with pytest.raises(ValueError, match="downsamplings"):
        halved_grid(5, 7, -1)
