"""What the mask of Self-Attention Guidance holds in memory, against core's whole map."""

from __future__ import annotations

import pytest
import torch
from comfy_extras.nodes_sag import attention_basic_with_sim

from benchmarks.counting import PeakBytes
from seg_core import column_mass

HEADS, DIM = 10, 640


def peak(function, tokens):
    q, k, v = (torch.empty(1, tokens, DIM, device="meta") for _ in range(3))
    with PeakBytes() as memory:
        function(q, k, v)
    return memory.peak


@pytest.mark.parametrize("tokens", [4096, 16384])
def test_the_mask_takes_at_most_a_twentieth_of_cores_map(tokens):
    ours = peak(lambda q, k, _v: column_mass(q, k, HEADS), tokens)
    core = peak(lambda q, k, v: attention_basic_with_sim(q, k, v, HEADS), tokens)
    assert core >= HEADS * tokens**2 * 4, "the count sees core's map"
    assert ours <= 0.05 * core


def test_the_count_sees_a_map_that_is_not_cut_into_chunks():
    whole = peak(lambda q, k, _v: column_mass(q, k, HEADS, chunk=4096), 4096)
    assert whole >= HEADS * 4096**2 * 4
