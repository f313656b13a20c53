"""Samplers and kinds of prediction: guided, finite and the same for the same seed."""

from __future__ import annotations

import comfy.model_base
import pytest
import torch
from choice import each
from host_models import conditioning, sample, seg, tiny_model
from host_oracle import dense_seg, deviation
from reuse_checks import require_reference

# torchsde, of the host, compares a float with its own rounded copy.
pytestmark = pytest.mark.filterwarnings("ignore:Should have t[ab]")

SAMPLERS = ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "lcm", "euler_cfg_pp", "uni_pc"]
MORE = ["euler_ancestral", "dpmpp_2m_sde", "res_multistep"]
KINDS = {
    "eps": comfy.model_base.ModelType.EPS,
    "v-prediction": comfy.model_base.ModelType.V_PREDICTION,
    "flow": comfy.model_base.ModelType.FLOW,
    "edm": comfy.model_base.ModelType.EDM,
}
MODELS = {}


def model_of(kind):
    if kind not in MODELS:
        MODELS[kind] = tiny_model("sd15", model_type=KINDS[kind], dtype=torch.float64)
    return MODELS[kind]


@pytest.mark.parametrize(*each(sampler=SAMPLERS, kind=["eps", "v-prediction", "flow"]))
def test_guided_run_is_finite_and_repeatable_and_differs_from_the_plain_one(sampler, kind):
    model = model_of(kind)
    options = {"sampler": sampler, "scheduler": "simple", "steps": 3, "size": (8, 6), "cfg": 2.0}
    guided = sample(seg(model), **options)
    assert torch.isfinite(guided).all()
    assert torch.equal(guided, sample(seg(model), **options))
    assert deviation(sample(model, **options), guided) > 1e-3


@pytest.mark.floor
@pytest.mark.parametrize(
    *each(
        sampler=["euler", "dpmpp_2m", "heun", "euler_cfg_pp"], kind=KINDS, cfg=[2.0, 1.0],
        blocks=["middle", "d0"],
    )
)  # fmt: skip
def test_every_kind_of_prediction_gives_what_the_dense_reference_gives(kind, sampler, cfg, blocks):
    dense = {"blocks": [("input", 1)], "level": 0} if blocks == "d0" else {}
    require_reference(
        model_of(kind), size=(8, 6), sampler=sampler, scheduler="simple", cfg=cfg,
        node={"blocks": blocks}, dense=dense,
    )  # fmt: skip


@pytest.mark.parametrize("sampler", ["dpmpp_sde", "lcm", "uni_pc", *MORE])
def test_sampler_with_noise_or_memory_follows_the_dense_reference(sampler):
    options = {"sampler": sampler, "steps": 3, "size": (6, 8), "cfg": 1.5}
    reference = sample(dense_seg(model_of("eps"), sigma=1.3, size=(6, 8)), **options)
    assert deviation(sample(seg(model_of("eps"), sigma=1.3), **options), reference) <= 1e-4


def test_partial_denoising_of_a_latent_is_guided():
    latent = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(2))
    require_reference(
        model_of("eps"), size=(8, 6), latent=latent, denoise=0.5, positive=conditioning(4)
    )
