"""Whatever is sampled: the node is the dense reference, in one call and in whole passes."""

from __future__ import annotations

import functools

import node_helpers
import pytest
import torch
from choice import each, pairs
from host_models import conditioning, noise_like, sample, seg, shared_model, tiny_model
from host_oracle import deviation
from reuse_checks import ROUNDING, both, require_equal, require_reference, with_room_for

SIZE = (8, 12)
REUSE = (True, False)
SIDES = {"conditional": "positive", "unconditional": "negative"}


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
    "one alone that ends": lambda: conditioning(1, start_percent=0.0, end_percent=0.4),
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


def has_uncond(cfg, side, **_):
    return cfg > 1 or side == "conditional"


@pytest.mark.floor
@pytest.mark.parametrize(
    *pairs(
        has_uncond, prompts=PROMPTS, cfg=[7.0, 1.0], reuse=REUSE, batch=[1, 2], side=SIDES,
    )
)  # fmt: skip
def test_prompts_of_every_kind(prompts, cfg, reuse, batch, side):
    require_reference(
        cfg=cfg, batch=batch, steps=3, reuse=reuse, visible=1e-5, node={"branch": side},
        dense={"side": side.removesuffix("itional")}, **{SIDES[side]: PROMPTS[prompts]()},
    )  # fmt: skip


@pytest.mark.parametrize(*pairs(has_uncond, prompts=AREAS, cfg=[7.0, 1.0], side=SIDES))
def test_one_call_on_areas_gives_what_whole_passes_give(prompts, cfg, side):
    options = {"branch": side, "sigma": 1.3}
    on, off = both(cfg=cfg, size=SIZE, options=options, **{SIDES[side]: AREAS[prompts]})
    assert (on.shared > 0, on.reasons, off.shared) == (True, set(), 0)
    require_equal(on, off)


@pytest.mark.parametrize("reuse", REUSE)
def test_an_area_is_smoothed_on_its_own_grid(reuse):
    model = shared_model()
    noise = noise_like((1, 4, *SIZE))

    def effect(positive, noise):
        latent = torch.zeros_like(noise)
        one = {"positive": positive, "noise": noise, "latent": latent, "steps": 1, "cfg": 1.0}
        return sample(seg(model, 1.0, 1.3, reuse=reuse), **one) - sample(model, **one)

    only = effect(conditioning(3, area=(6, 4, 2, 8)), noise)
    # The pooled prompt carries the image's size, so it is said to be the whole image's.
    sized = node_helpers.conditioning_set_values(
        conditioning(3), {"width": SIZE[1] * 8, "height": SIZE[0] * 8}
    )
    expected = effect(sized, noise[..., 2:8, 8:12].clone())
    torch.testing.assert_close(only[..., 2:8, 8:12], expected, rtol=1e-4, atol=1e-4)


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


# How the host cuts the conds in calls


@pytest.mark.parametrize(*each(conds=[1, 2, 3], branch=[*SIDES, "free"]))
def test_conds_cut_in_several_calls_give_what_one_call_gives(monkeypatch, conds, branch):
    settings = {"positive": PROMPTS["several"](), "steps": 3}
    expected = sample(seg(shared_model(), branch=branch), **settings)
    cut = functools.partial(with_room_for, monkeypatch, conds, shared_model())
    on, off = both(cut, options={"branch": branch}, **settings)
    require_equal(on, off)
    assert deviation(on.latents, expected) <= ROUNDING
    if conds == 1:
        assert on.shared == 0
    elif branch == "conditional":
        assert (on.shared > 0, on.reasons) == (True, set())
        # Each perturbed cond passes over the encoder; each ordinary one runs through it.
        assert on.evaluated["input", 0] == 3 * 4
        assert on.evaluated["output", 3] == 3 * 7


# Several nodes, and precision


@pytest.mark.parametrize(*each(cfg=[7.0, 1.0], blocks=["middle", "u0"], second=REUSE))
def test_two_nodes_and_several_prompts_share_one_call_where_both_reuse(cfg, blocks, second):
    def guided(model, reuse):
        first = seg(model, 2.0, blocks=blocks, reuse=reuse)
        return seg(first, 1.0, 1.5, blocks="u1", reuse=reuse and second)

    on, off = both(guided=guided, cfg=cfg, positive=PROMPTS["several"])
    require_equal(on, off)
    assert on.shared > 0
    if second:
        assert on.reasons == set()
        assert on.evaluated["input", 0] == 3 * (3 + (cfg > 1)), "the encoder runs once for a cond"
    else:
        assert on.reasons == {"reuse is off"}


def test_clones_of_a_guided_model_are_guided_alike_and_apart():
    guided = seg(shared_model())
    first = sample(guided.clone())
    assert deviation(sample(seg(guided.clone(), 1.0, 1.0, blocks="u1")), first) > 1e-3
    assert torch.equal(sample(guided), first)


@pytest.mark.parametrize(*each(cfg=[7.0, 1.0], blocks=["middle", "d0", "u1"]))
def test_low_precision_is_reused_too(cfg, blocks):
    on, off = both(
        lambda: tiny_model(dtype=torch.bfloat16), cfg=cfg, options={"blocks": blocks}, batch=2
    )
    assert (on.shared, on.reasons) == (3, set())
    if cfg == 1.0:
        require_equal(on, off, bitwise=True)
    else:  # whatever bfloat16 rounding makes of another batch size
        assert deviation(on.latents, off.latents) < 0.2
