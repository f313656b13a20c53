"""Perturbed-Attention Guidance: equal to core's node where that is defined; its strength."""

from __future__ import annotations

import functools

import pytest
import torch
from choice import each, pairs
from family_oracle import guide
from host_models import counted_calls, sample, seg, shared_model
from host_oracle import deviation
from stand_ins import shipped

pag = functools.partial(guide, "PAG", scale=3.0)


@pytest.mark.parametrize(*pairs(kind=["sd15", "sdxl"], cfg=[1.0, 7.0], size=[(8, 8), (5, 18)]))
def test_middle_block_equals_cores_node(kind, cfg, size):
    model = shared_model(kind)
    core = shipped("pag", "PerturbedAttentionGuidance", 3.0)
    theirs = sample(core(model), cfg=cfg, size=size)
    assert deviation(sample(pag(model), cfg=cfg, size=size), theirs) < 1e-5
    assert deviation(sample(model, cfg=cfg, size=size), theirs) > 1e-3


def test_strength_zero_is_off_and_says_so_and_the_free_branch_costs_no_pass(caplog):
    model = shared_model()
    plain = sample(model)
    with counted_calls(model) as calls:
        assert torch.equal(sample(pag(model, strength=0.0)), plain)
        guided = sample(pag(model, branch="free"))
    assert calls == [2, 2, 2, 2]
    assert "strength is 0" in caplog.text
    assert deviation(guided, plain) > 1e-3


def test_merged_tokens_are_refused_by_name():
    model = shipped("tomesd", "TomePatchModel", 0.5)(shared_model("sd15"))
    with pytest.raises(ValueError, match=r"block d0 has .* HyperTile or ToMe"):
        sample(pag(model, blocks="d0"), size=(16, 16))


# Beside other guidance.


core_pag = shipped("pag", "PerturbedAttentionGuidance", 2.0)
core_sag = shipped("sag", "SelfAttentionGuidance", 0.5, 2.0)
GUIDANCE = {
    "SEG": seg,
    "another SEG": functools.partial(seg, scale=1.5, sigma=1.3, blocks="u0"),
    "PAG": functools.partial(guide, "PAG"),
    "SAG": functools.partial(guide, "SAG", scale=0.5),
    "ComfyUI's PAG and SAG": lambda model: core_sag(core_pag(model)),
}


@pytest.mark.parametrize(
    *each(
        lambda first, second, cfg, **_: first != second and (cfg > 1 or second in ("SEG", "PAG")),
        first=GUIDANCE, second=["SEG", "PAG", "SAG"], cfg=[7.0, 1.0], kind=["sd15", "sdxl"],
    )
)  # fmt: skip
def test_the_effects_of_several_guidance_nodes_add_up(first, second, cfg, kind):
    def latents(*names):
        model = shared_model(kind)
        for name in names:
            model = GUIDANCE[name](model)
        return sample(model, steps=1, cfg=cfg, size=(16, 16))

    plain, one, other = latents(), latents(first), latents(second)
    for both in (latents(first, second), latents(second, first)):
        assert deviation(both - one + plain, other) < 1e-5
    assert deviation(plain, one) > 1e-4
    assert deviation(plain, other) > 1e-3
