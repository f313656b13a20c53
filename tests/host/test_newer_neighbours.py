"""Beside what newer versions of ComfyUI brought; skipped on those that lack it."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from choice import each
from comfy.ldm.modules import attention
from comfy.ldm.wan import model as wan
from comfy_extras import nodes_lt
from dit_models import KINDS, sampled, tiny_dit
from dit_oracle import OVERRIDE, block_modules, exact_model, selector
from family_oracle import guide
from host_models import seg
from host_oracle import deviation
from no_op import NOTHING, hardly, nothing
from reuse_checks import reported
from stand_ins import shipped

STG, MODALITY = "LTXVSpatioTemporalGuidance", "LTXVModalityGuidance"
NODES = {
    STG: shipped("lt", STG, 1.5, "1, 2", 0.0, 1.0),
    MODALITY: shipped("lt", MODALITY, 2.5, 0.0, 1.0),
}
newer = pytest.mark.skipif(not hasattr(nodes_lt, STG), reason="this ComfyUI has no such nodes")


@newer
@pytest.mark.parametrize("guidance", [nothing, hardly])
@pytest.mark.parametrize("name", NODES)
def test_ltx_2_is_pushed_nowhere_beside_comfyui_s_own_guidance_in_either_order(name, guidance):
    model, put = exact_model("ltx2"), NODES[name]
    alone, unaffected, before, after = (
        sampled(m, "ltx2") for m in (put(model), model, put(guidance(model)), guidance(put(model)))
    )
    assert deviation(alone, unaffected) > 1e-3
    assert deviation(before, alone) <= NOTHING
    assert deviation(after, alone) <= NOTHING


@newer
def test_pag_is_the_spatiotemporal_guidance_of_comfyui_without_its_second_call():
    model = exact_model("ltx2_silent")
    theirs = sampled(NODES[STG](model), "ltx2_silent")
    ours = sampled(guide("PAG", model, 1.5, blocks="1, 2"), "ltx2_silent")
    assert deviation(ours, theirs) <= NOTHING


@pytest.mark.skipif(
    not hasattr(attention, "AttentionTensorContainer"), reason="this ComfyUI has no containers"
)
@pytest.mark.parametrize("sigma", [math.inf, 0.7])
def test_attention_that_hands_over_containers_is_smoothed_as_any_other(sigma, monkeypatch):
    attend, contained = wan.optimized_attention, []

    def in_containers(q, k, v, *args, **kwargs):
        contained.append(len(q))
        held = (attention.AttentionTensorContainer(tensor) for tensor in (q, k, v))
        return attend(*held, *args, **kwargs)

    model = seg(exact_model("wan"), sigma=sigma)
    expected = sampled(model, "wan")
    monkeypatch.setattr(wan, "optimized_attention", in_containers)
    assert torch.equal(sampled(model, "wan"), expected)
    assert contained


ATTENTION = {
    "flux": ("comfy.ldm.flux.math", "optimized_attention"),
    "lumina2": ("comfy.ldm.lumina.model", "optimized_attention_masked"),
    "wan": ("comfy.ldm.wan.model", "optimized_attention"),
}


@pytest.mark.parametrize(*each(kind=ATTENTION, reuse=[True, False]))
def test_blocks_that_are_not_changed_keep_the_attention_that_the_model_prefers(
    kind, reuse, monkeypatch
):
    """As int8 checkpoints have one of their own: ComfyUI drops it wherever an override is set."""
    module, name = ATTENTION[kind]
    module = importlib.import_module(module)
    attend, inside, seen = getattr(module, name), [False], set()

    def noting(*args, **kwargs):
        seen.add((inside[0], OVERRIDE in (kwargs.get("transformer_options") or {})))
        return attend(*args, **kwargs)

    model = tiny_dit(kind)
    changed = block_modules(model)[1]
    changed.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    changed.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    monkeypatch.setattr(module, name, noting)
    guided = seg(model, blocks=selector(model, kind, [1]), reuse=reuse)
    sampled(guided, kind)
    without = {(False, False)} if reuse else {(False, False), (True, False)}
    assert seen == {*without, (True, True)}, "inside the changed block, and with an override"


@pytest.mark.skipif("qwen21" not in KINDS, reason="this ComfyUI has no such network")
@pytest.mark.parametrize(*each(method=["SEG", "PAG", "TPG", "SSG"], cfg=[1.0, 4.0]))
def test_a_kept_prompt_of_qwen_image_2_1_changes_calls_and_not_the_result(method, cfg):
    guided = guide(method, exact_model("qwen21"), blocks="1-2")
    kept = guided.clone()
    kept.model_options["transformer_options"].pop("qwen_image21_cache")
    with reported() as counts:
        found = sampled(kept, "qwen21", cfg=cfg)
    assert counts.shared == 0
    assert counts.because("keeps the keys of the prompt") == counts.full.total() == 2
    with reported() as counts:
        expected = sampled(guided, "qwen21", cfg=cfg)
    assert counts.shared == 2
    assert deviation(found, expected) <= NOTHING
    assert deviation(found, sampled(exact_model("qwen21"), "qwen21", cfg=cfg)) > 1e-3
