"""Perturbed-Attention Guidance: equal to core's node where that is defined, and cheaper."""

from __future__ import annotations

import importlib

import pytest
import torch
from choice import pairs
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from host_models import PACK, counted_calls, sample, seg, tiny_model


def pag(model, scale=3.0, start=0.0, end=1.0, **advanced):
    node = importlib.import_module(PACK + ".nodes.pag").SEGuidancePAG
    return node.execute(model, scale, start, end, **advanced)[0]


def core_pag(model, scale=3.0):
    return PerturbedAttentionGuidance.execute(model, scale)[0]


def distance(a, b):
    return float((a - b).abs().max() / b.std())


@pytest.mark.parametrize(*pairs(kind=["sd15", "sdxl"], cfg=[1.0, 7.0], size=[(8, 8), (5, 18)]))
def test_middle_block_equals_cores_node(kind, cfg, size):
    model = tiny_model(kind)
    theirs = sample(core_pag(model), cfg=cfg, size=size)
    assert distance(sample(pag(model), cfg=cfg, size=size), theirs) < 1e-5
    assert distance(sample(model, cfg=cfg, size=size), theirs) > 1e-3


def test_strength_runs_from_off_to_identity_and_differs_between():
    model = tiny_model()
    off, full = sample(model), sample(pag(model))
    nearly_off = sample(pag(model, strength=1e-4))
    nearly_full = sample(pag(model, strength=0.9999))
    half = sample(pag(model, strength=0.5))
    assert distance(nearly_off, off) < 1e-3 < distance(half, off)
    assert distance(nearly_full, full) < 1e-3 < distance(half, full)


def test_strength_zero_is_off_and_says_so_and_the_free_branch_costs_no_pass(caplog):
    model = tiny_model()
    plain = sample(model)
    with counted_calls(model) as calls:
        assert torch.equal(sample(pag(model, strength=0.0)), plain)
        guided = sample(pag(model, branch="free"))
    assert calls == [2, 2, 2, 2]
    assert "strength is 0" in caplog.text
    assert distance(guided, plain) > 1e-3


def test_merged_tokens_are_refused_by_name():
    model = TomePatchModel.execute(tiny_model("sd15"), 0.5)[0]
    with pytest.raises(ValueError, match=r"block d0 has .* HyperTile or ToMe"):
        sample(pag(model, blocks="d0"), size=(16, 16))


@pytest.mark.current_only
@pytest.mark.parametrize("order", ["seg first", "pag first"])
def test_beside_seg_the_guidances_add_and_share_one_call(order, caplog):
    caplog.set_level("INFO")
    model = tiny_model()
    one = {"cfg": 1.0, "steps": 1}
    off = sample(model, **one)
    both = pag(seg(model)) if order == "seg first" else seg(pag(model))
    together = sample(both, **one)
    apart = (sample(seg(model), **one) - off) + (sample(pag(model), **one) - off) + off
    assert distance(together, apart) < 1e-5
    lines = [m for m in caplog.messages if "model evaluations guided" in m][:2]
    assert all("1 in the same model call, 0 in extra passes" in line for line in lines)


def test_beside_cores_own_nodes_every_guidance_stays():
    model = tiny_model()
    one = {"cfg": 7.0, "steps": 1}
    off = sample(model, **one)
    core = SelfAttentionGuidance.execute(core_pag(model, 2.0), 0.5, 2.0)[0]
    alone = sample(core, **one)
    together = sample(pag(core), **one)
    assert distance(together - alone, sample(pag(model), **one) - off) < 1e-4
