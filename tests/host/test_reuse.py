"""Whatever is sampled: the node is the dense reference, in one call and in whole passes."""

from __future__ import annotations

import node_helpers
import nodes
import pytest
import torch
from choice import each, pairs
from host_models import (
    conditioning,
    core_node,
    counted_calls,
    noise_like,
    sample,
    seg,
    shared_model,
    tiny_model,
)
from host_oracle import deviation
from reuse_checks import (
    MemoryShortage,
    both,
    difference,
    outcome,
    require_equal,
    require_reference,
)

SIZE = (8, 12)
REUSE = (True, False)


def area(seed, rows, columns, top, left, **extra):
    """A conditioning for a part of the image, in latent cells."""
    return conditioning(seed, area=(rows, columns, top, left), strength=0.7, **extra)


def mask():
    cells = torch.zeros(1, *SIZE)
    cells[:, 2:7, 3:] = 1.0
    return cells


PROMPTS = {
    "one": lambda: conditioning(1),
    "several": lambda: conditioning(1) + conditioning(3) + conditioning(4),
    "other lengths": lambda: conditioning(1) + conditioning(3, tokens=14),
    "a mask": lambda: conditioning(1) + conditioning(3, mask=mask(), mask_strength=0.8),
    "only a mask": lambda: conditioning(3, mask=mask()),
    "timestep ranges": lambda: (
        conditioning(1, start_percent=0.0, end_percent=0.4)
        + conditioning(3, start_percent=0.4, end_percent=1.0)
        + conditioning(4)
    ),
    "one that ends": lambda: conditioning(1) + conditioning(3, start_percent=0.0, end_percent=0.3),
    "a default": lambda: conditioning(1, mask=mask()) + conditioning(3, default=True),
}
AREAS = {  # each is an image of its own to the network, so the reference's one grid does not do
    "areas": lambda: conditioning(1) + area(3, 4, 8, 0, 0) + area(4, 4, 4, 4, 2),
    "equal areas in one batch": lambda: area(3, 4, 4, 0, 0) + area(4, 4, 4, 4, 4) + conditioning(1),
    "bounds of a mask": lambda: (
        conditioning(1) + conditioning(3, mask=mask(), set_area_to_bounds=True)
    ),
    "an area in percent": lambda: (
        conditioning(1) + conditioning(3, area=("percentage", 0.5, 1.0, 0.5, 0.0))
    ),
}


@pytest.mark.floor
@pytest.mark.parametrize(*pairs(prompts=PROMPTS, cfg=[7.0, 1.0], reuse=REUSE, batch=[1, 2]))
def test_prompts_of_every_kind(prompts, cfg, reuse, batch):
    require_reference(
        positive=PROMPTS[prompts](), cfg=cfg, batch=batch, steps=3, reuse=reuse, visible=1e-5
    )


@pytest.mark.parametrize(*each(prompts=PROMPTS, reuse=REUSE))
def test_negative_prompts_of_every_kind(prompts, reuse):
    require_reference(
        negative=PROMPTS[prompts](), steps=3, reuse=reuse, visible=1e-5,
        node={"branch": "unconditional"}, dense={"side": "uncond"},
    )  # fmt: skip


@pytest.mark.parametrize(
    *pairs(
        lambda cfg, side, **_: cfg > 1 or side == "conditional",
        prompts=AREAS, cfg=[7.0, 1.0], side=["conditional", "unconditional"],
    )
)  # fmt: skip
def test_one_call_on_areas_gives_what_whole_passes_give(prompts, cfg, side):
    where = "positive" if side == "conditional" else "negative"
    options = {"branch": side, "sigma": 1.3}
    on, off = both(cfg=cfg, size=SIZE, options=options, **{where: AREAS[prompts]})
    assert (on.shared > 0, on.reasons, off.shared) == (True, set(), 0)
    require_equal(on, off)


@pytest.mark.parametrize("reuse", REUSE)
def test_an_area_is_smoothed_on_its_own_grid(reuse):
    model = shared_model()
    noise = noise_like((1, 4, *SIZE))

    def effect(positive, noise):
        plain, guided = (
            sample(m, positive=positive, noise=noise, latent=torch.zeros_like(noise), steps=1,
                   cfg=1.0)
            for m in (model, seg(model, 1.0, 1.3, reuse=reuse))
        )  # fmt: skip
        return guided - plain

    only = effect(conditioning(3, area=(6, 4, 2, 8)), noise)
    # The pooled prompt carries the image's size, so it is said to be the whole image's.
    sized = node_helpers.conditioning_set_values(
        conditioning(3), {"width": SIZE[1] * 8, "height": SIZE[0] * 8}
    )
    expected = effect(sized, noise[..., 2:8, 8:12].clone())
    torch.testing.assert_close(only[..., 2:8, 8:12], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["positive", "negative"])
def test_a_prompt_that_is_inactive_in_the_end_changes_nothing_of_the_extra_pass(where):
    never = conditioning(1, start_percent=0.0, end_percent=0.4)
    found = sample(seg(shared_model()), steps=4, **{where: never})
    assert torch.isfinite(found).all()
    require_reference(steps=4, **{where: never})


# Latents


@pytest.mark.parametrize(*each(reuse=REUSE, cfg=[7.0, 1.0]))
def test_inpainting_is_guided_and_leaves_the_rest_of_the_latent_alone(reuse, cfg):
    latent = noise_like((1, 4, *SIZE), 5)
    inside = torch.zeros(1, 1, *SIZE)
    inside[..., 3:7, 2:9] = 1.0
    settings = {"latent": latent, "noise_mask": inside, "denoise": 0.8, "steps": 3, "cfg": cfg}
    require_reference(reuse=reuse, **settings)
    found = sample(seg(shared_model(), reuse=reuse), size=SIZE, **settings)
    outside = (inside == 0).expand_as(found)
    torch.testing.assert_close(found[outside], latent[outside], rtol=1e-4, atol=1e-4)


def test_inpainting_nodes_of_the_host_are_guided():
    latent = {"samples": noise_like((1, 4, *SIZE), 5)}
    inside = torch.zeros(1, SIZE[0] * 8, SIZE[1] * 8)
    inside[:, 24:56, 16:72] = 1.0
    latent = core_node("nodes", "SetLatentNoiseMask", latent, inside)

    def run(model, size):
        with torch.inference_mode():
            return nodes.KSampler().sample(
                model, 3, 2, 4.0, "euler", "normal", conditioning(1), conditioning(2), latent, 0.7
            )[0]["samples"]

    require_reference(run=run)


def test_inpainting_models_that_see_the_mask():
    extra = {
        "concat_latent_image": noise_like((1, 4, 8, 8), 3),
        "concat_mask": (noise_like((1, 1, 64, 64), 4) > 0).float(),
    }
    on, off = both(
        lambda: tiny_model(dtype=torch.float64, in_channels=9),
        positive=lambda: conditioning(1, **extra),
        negative=lambda: conditioning(2, **extra),
        noise_mask=torch.ones(1, 1, 8, 8),
    )
    assert (on.shared, on.reasons) == (3, set())
    require_equal(on, off)


def test_every_image_of_a_batch_is_what_it_is_alone():
    model = seg(shared_model(), sigma=1.3)
    noise = noise_like((3, 4, *SIZE), 8)
    together = sample(model, noise=noise, latent=torch.zeros_like(noise))
    for i in range(3):
        alone = sample(model, noise=noise[i : i + 1], latent=torch.zeros(1, 4, *SIZE))
        assert deviation(together[i : i + 1], alone) <= 1e-6


# How the host cuts the conds in calls


@pytest.mark.parametrize("chunks", [2, 3])
def test_conds_cut_in_calls_of_some_conds(monkeypatch, chunks):
    positive = PROMPTS["several"]()
    memory = MemoryShortage(monkeypatch, chunks=chunks)
    on, off = both(lambda: memory.reach(shared_model().clone()), positive=positive)
    assert (on.shared > 0, on.reasons) == (True, set())
    require_equal(on, off)
    # Each perturbed cond passes over the encoder; each ordinary one runs through it.
    assert on.evaluated["input", 0] == 3 * 4
    assert on.evaluated["output", 3] == 3 * 7


@pytest.mark.parametrize(*each(branch=["conditional", "unconditional", "free"], most=[0, 1e30]))
def test_calls_of_one_cond_each_give_the_same_result(monkeypatch, branch, most):
    model = shared_model()
    guided = seg(model, sigma=1.3, branch=branch)
    options = {"batch": 2, "positive": PROMPTS["several"]()}
    expected = sample(guided, **options)
    monkeypatch.setattr(
        model.model, "memory_required", lambda shape, **_: most if shape[0] <= 2 else 1e30
    )
    with counted_calls(model) as calls:
        found = sample(guided, **options)
    assert set(calls) == {2}
    assert deviation(found, expected) <= 1e-6


# Several nodes, and precision


def test_a_node_that_reuses_goes_with_one_that_does_not():
    def guided(model, reuse):
        return seg(seg(model, 2.0, reuse=reuse), 1.0, 1.5, blocks="u1", reuse=False)

    on, off = both(guided=guided)
    assert (on.shared, on.because("reuse is off"), on.full.total()) == (3, 3, 3)
    require_equal(on, off)


@pytest.mark.parametrize(*each(cfg=[7.0, 1.0], blocks=["middle", "u0"]))
def test_two_nodes_and_several_prompts_share_one_call(cfg, blocks):
    def guided(model, reuse):
        return seg(seg(model, 2.0, blocks=blocks, reuse=reuse), 1.0, 1.5, blocks="u1", reuse=reuse)

    on, off = both(guided=guided, cfg=cfg, positive=PROMPTS["several"])
    assert on.reasons == set()
    assert on.evaluated["input", 0] == 3 * (3 + (cfg > 1)), "the encoder runs once for each cond"
    require_equal(on, off)


def test_clones_of_a_guided_model_are_guided_alike_and_apart():
    guided = seg(shared_model())
    first = outcome(guided.clone())
    outcome(seg(guided.clone(), 1.0, 1.0, blocks="u1"))
    again = outcome(guided)
    assert torch.equal(first.latents, again.latents)
    assert first.shared == again.shared == 3
    plain = outcome(shared_model())
    assert plain.shared == 0
    assert difference(plain.latents, first.latents) > 1e-3


@pytest.mark.parametrize(*each(cfg=[7.0, 1.0], blocks=["middle", "d0", "u1"]))
def test_low_precision_is_reused_too(cfg, blocks):
    on, off = both(
        lambda: tiny_model(dtype=torch.bfloat16), cfg=cfg, options={"blocks": blocks}, batch=2
    )
    assert (on.shared, on.reasons) == (3, set())
    if cfg == 1.0:
        require_equal(on, off, bitwise=True)
    else:  # whatever bfloat16 rounding makes of another batch size
        assert difference(on.latents, off.latents) < 0.2
