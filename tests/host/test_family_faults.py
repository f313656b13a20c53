"""The slow references of transformers find planted errors, and masks reach attention."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from choice import each
from dit_oracle import CORE
from test_family import (
    FINITE,
    METHODS,
    bound,
    compare,
    dense,
    in_space,
    ours,
    passed_over,
    shuffled,
)

PLANTS = {
    # error: method, a reference with the error, its blocks
    "transposed": ("SEG, finite", dense(lambda t, h, w: FINITE(t, w, h)), [1, 2]),
    "another width": ("SEG, finite", dense(in_space(1.29)), [1, 2]),
    "another block": ("SEG, finite", dense(FINITE), [0]),
    "another block passed over": ("SLG", passed_over(), [1, 3]),
    "another order of tokens": ("TPG", functools.partial(shuffled, wrong=1), [1, 2]),
}


@pytest.mark.parametrize(*each(kind=CORE, plant=PLANTS))
def test_the_comparison_notices_a_planted_error(kind, plant):
    method, wrong, numbers = PLANTS[plant]
    assert compare(kind, ours(kind, method, [1, 2]), wrong(kind, numbers)) > 1e-4


# Masks, which reach attention by the host's own way.


@pytest.mark.parametrize(*each(kind=["sd3", "wan"], method=["SEG", "SEG, finite", "PAG"]))
def test_a_mask_for_each_query_is_honoured(kind, method, monkeypatch):
    path = {"sd3": "comfy.ldm.modules.diffusionmodules.mmdit", "wan": "comfy.ldm.wan.model"}[kind]
    module = importlib.import_module(path)
    original = module.optimized_attention
    node = ours(kind, method, [1, 2])
    reference = METHODS[method][2](kind, [1, 2])

    def masked(q, k, v, heads, **kwargs):
        axis = 2 if kwargs.get("skip_reshape") else 1
        shape = (1, 1, q.shape[axis], k.shape[axis])
        generator = torch.Generator().manual_seed(shape[3])
        return original(
            q, k, v, heads, mask=torch.randn(shape, generator=generator).to(q), **kwargs
        )

    monkeypatch.setattr(module, "optimized_attention", masked)
    assert compare(kind, node, reference, batch=2) < bound(kind)
