"""Samplers and kinds of prediction: guided, finite and the same for the same seed."""

from __future__ import annotations

import comfy.model_base
import pytest
import torch
from host_models import conditioning, sample, seg, shared_model, tiny_model
from host_oracle import dense_seg, deviation, deviation_of_node

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


@pytest.mark.parametrize("kind", ["eps", "v-prediction", "flow"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guided_run_is_finite_and_repeatable_and_differs_from_the_plain_one(sampler, kind):
    model = model_of(kind)
    options = {"sampler": sampler, "scheduler": "simple", "steps": 3, "size": (8, 6), "cfg": 2.0}
    guided = sample(seg(model), **options)
    assert torch.isfinite(guided).all()
    assert torch.equal(guided, sample(seg(model), **options))
    assert deviation(sample(model, **options), guided) > 1e-3


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_cfg_pp"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prediction_gives_what_the_dense_reference_gives(kind, sampler):
    found = deviation_of_node(
        model_of(kind), sigma=1.3, size=(8, 6), sampler=sampler, scheduler="simple", cfg=2.0
    )
    assert found <= 1e-6


@pytest.mark.parametrize("sampler", ["dpmpp_sde", "lcm", "uni_pc", *MORE])
def test_sampler_with_noise_or_memory_follows_the_dense_reference(sampler):
    options = {"sampler": sampler, "steps": 3, "size": (6, 8), "cfg": 1.5}
    reference = sample(dense_seg(model_of("eps"), sigma=1.3, size=(6, 8)), **options)
    assert deviation(sample(seg(model_of("eps"), sigma=1.3), **options), reference) <= 1e-4


def test_partial_denoising_of_a_latent_is_guided():
    latent = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(2))
    found = deviation_of_node(
        model_of("eps"), sigma=1.3, size=(8, 6), latent=latent, denoise=0.5, steps=2,
        positive=conditioning(4),
    )  # fmt: skip
    assert found <= 1e-6


def test_sdxl_is_guided_by_every_sampler_as_by_the_dense_reference():
    for sampler in ("euler", "dpmpp_2m"):
        assert deviation_of_node(shared_model(), sigma=1.3, sampler=sampler) <= 1e-6
