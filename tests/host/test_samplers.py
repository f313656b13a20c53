"""Samplers and kinds of prediction: each follows the dense reference, the same for a seed."""

from __future__ import annotations

import functools

import comfy.model_base
import pytest
import torch
from choice import each
from host_models import sample, seg, tiny_model
from host_oracle import dense_seg, deviation
from reuse_checks import require_reference

# torchsde, of the host, compares a float with its own rounded copy.
pytestmark = pytest.mark.filterwarnings("ignore:Should have t[ab]")

EXACT = ["euler", "heun", "dpmpp_2m", "euler_cfg_pp"]
WITH_NOISE_OR_MEMORY = [
    "dpmpp_sde", "lcm", "uni_pc", "euler_ancestral", "dpmpp_2m_sde", "res_multistep",
]  # fmt: skip
KINDS = {
    "eps": comfy.model_base.ModelType.EPS,
    "v-prediction": comfy.model_base.ModelType.V_PREDICTION,
    "flow": comfy.model_base.ModelType.FLOW,
    "edm": comfy.model_base.ModelType.EDM,
}


@functools.cache
def model_of(kind):
    return tiny_model("sd15", model_type=KINDS[kind], dtype=torch.float64)


@pytest.mark.floor
@pytest.mark.parametrize(*each(kind=KINDS, sampler=EXACT, cfg=[2.0, 1.0], blocks=["middle", "d0"]))
def test_every_kind_of_prediction_gives_what_the_dense_reference_gives(kind, sampler, cfg, blocks):
    dense = {"blocks": [("input", 1)], "level": 0} if blocks == "d0" else {}
    require_reference(
        model_of(kind), size=(8, 6), sampler=sampler, scheduler="simple", cfg=cfg,
        node={"blocks": blocks}, dense=dense,
    )  # fmt: skip


@pytest.mark.parametrize("sampler", WITH_NOISE_OR_MEMORY)
def test_sampler_with_noise_or_memory_follows_the_dense_reference_and_repeats_itself(sampler):
    model, run = model_of("eps"), {"sampler": sampler, "steps": 3, "size": (6, 8), "cfg": 1.5}
    found = sample(seg(model, sigma=1.3), **run)
    assert torch.equal(found, sample(seg(model, sigma=1.3), **run))
    reference = sample(dense_seg(model, sigma=1.3, size=(6, 8)), **run)
    assert deviation(found, reference) <= 1e-4 < deviation(sample(model, **run), reference)
