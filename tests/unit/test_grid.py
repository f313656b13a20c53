"""Token grids: what fits, what is refused, and what halving does."""

from __future__ import annotations

import pytest
import torch

from seg_core.grid import TokenGrid, as_grid, halved_grid


def test_a_grid_is_made_of_two_sizes_or_of_frames_and_two_sizes():
    grid = as_grid((3, 5, 7))
    assert (grid.frames, grid.height, grid.width, grid.cells, grid.tokens) == (3, 5, 7, 35, 105)
    assert as_grid(grid) is grid
    assert as_grid((5, 7)) == TokenGrid(1, 5, 7)
    assert as_grid(torch.Size((5, 7))) == TokenGrid(1, 5, 7)


@pytest.mark.parametrize("sizes", [(), (5,), (2, 3, 5, 7), (0, 7), (5, -7), (5.0, 7), ("5", 7)])
def test_anything_else_is_refused(sizes):
    with pytest.raises(ValueError, match="grid"):
        as_grid(sizes)


def test_halving_agrees_with_a_strided_convolution():
    shape = torch.zeros(1, 1, 37, 53)
    for levels in range(5):
        assert halved_grid(37, 53, levels) == tuple(shape.shape[2:])
        shape = torch.nn.functional.conv2d(shape, torch.zeros(1, 1, 3, 3), stride=2, padding=1)
    with pytest.raises(ValueError, match="downsamplings"):
        halved_grid(5, 7, -1)
