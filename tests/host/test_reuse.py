"""Reuse on against off: the same latents, whatever is sampled and however it is batched."""

from __future__ import annotations

import math
import re

import comfy.model_base
import pytest
import torch
from host_models import conditioning, noise_like, seg, tiny_model
from reuse_checks import (
    ROUNDING,
    MemoryShortage,
    both,
    difference,
    exact_model,
    outcome,
    part,
    require_effect,
    require_equal,
    require_shared,
)


def mask(size=(8, 8)):
    half = torch.zeros(1, *size)
    half[:, :, : size[1] // 2] = 1.0
    return half


def area(seed, height, width, top, left, **extra):
    return conditioning(seed, area=(height, width, top, left), strength=0.7, **extra)


PROMPTS = {
    "one": (lambda: conditioning(1), lambda: conditioning(2)),
    "several": (lambda: conditioning(1) + conditioning(3), lambda: conditioning(2)),
    "several on both sides": (
        lambda: conditioning(1) + conditioning(3) + conditioning(4),
        lambda: conditioning(2) + conditioning(5),
    ),
    "other length": (lambda: conditioning(1, tokens=14), lambda: conditioning(2)),
    "areas": (
        lambda: conditioning(1) + area(3, 4, 8, 0, 0) + area(4, 4, 4, 4, 2),
        lambda: conditioning(2),
    ),
    "equal areas in one batch": (
        lambda: area(3, 4, 4, 0, 0) + area(4, 4, 4, 4, 4) + conditioning(1),
        lambda: conditioning(2),
    ),
    "percentage area": (
        lambda: conditioning(1) + conditioning(3, area=("percentage", 0.5, 1.0, 0.5, 0.0)),
        lambda: conditioning(2),
    ),
    "mask": (
        lambda: conditioning(1) + conditioning(3, mask=mask(), mask_strength=0.8),
        lambda: conditioning(2),
    ),
    "mask bounds": (
        lambda: conditioning(1) + conditioning(3, mask=mask(), set_area_to_bounds=True),
        lambda: conditioning(2),
    ),
    "timestep ranges": (
        lambda: (
            conditioning(1, start_percent=0.0, end_percent=0.4)
            + conditioning(3, start_percent=0.4, end_percent=1.0)
            + conditioning(4)
        ),
        lambda: conditioning(2),
    ),
    "default cond": (
        lambda: conditioning(1, mask=mask()) + conditioning(3, default=True),
        lambda: conditioning(2),
    ),
}
BLOCKS = ["d0.0", "input", "m0.1", "middle", "d0,m0", "u0", "u1.1", "output", "m0,u1"]
BLOCKS_SD15 = ["d0", "d1", "middle", "u0", "u1", "u3", "d1,m0", "middle,output", "d0,u3"]


@pytest.mark.parametrize(
    ("name", "cfg"),
    [*((name, 7.0) for name in PROMPTS), *((name, 1.0) for name in ("several", "areas", "mask"))],
)
def test_reuse_changes_nothing_for_any_prompting(name, cfg):
    positive, negative = PROMPTS[name]
    settings = {"cfg": cfg, "positive": positive, "negative": negative}
    on, off = both(**settings)
    require_shared(on, off)
    require_equal(on, off, bitwise=cfg == 1.0)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("sigma", "cfg"), [(math.inf, 7.0), (2.0, 7.0), (2.0, 1.0)])
def test_reuse_changes_nothing_for_any_batch(batch, sigma, cfg):
    settings = {"cfg": cfg, "batch": batch, "size": (8, 12)}
    on, off = both(options={"sigma": sigma}, **settings)
    require_shared(on, off, passes=3)
    require_equal(on, off, bitwise=cfg == 1.0)
    require_effect(than=on, **settings)


@pytest.mark.parametrize(
    ("kind", "blocks", "cfg"),
    [("sdxl", blocks, 7.0) for blocks in BLOCKS]
    + [("sd15", blocks, 7.0) for blocks in BLOCKS_SD15]
    + [("sdxl", blocks, 1.0) for blocks in ("input", "m0.1", "output")]
    + [("sd15", blocks, 1.0) for blocks in ("d1", "middle", "u3")],
)
def test_reuse_begins_wherever_the_first_block_lies(kind, blocks, cfg):
    settings = {"cfg": cfg, "size": (8, 10), "batch": 2}
    on, off = both(lambda: exact_model(kind), options={"blocks": blocks}, **settings)
    require_shared(on, off, passes=3)
    require_equal(on, off, bitwise=cfg == 1.0)


@pytest.mark.parametrize(
    ("size", "blocks"),
    [((7, 9), "d0"), ((7, 9), "middle"), ((5, 16), "middle"), ((13, 6), "u1")],
)
def test_odd_sizes(size, blocks):
    on, off = both(options={"blocks": blocks, "sigma": 1.5}, size=size)
    require_shared(on, off, passes=3)
    require_equal(on, off)


@pytest.mark.parametrize("side", ["conditional", "unconditional"])
@pytest.mark.parametrize("prompts", ["one", "several on both sides", "areas"])
def test_either_side_is_reused(side, prompts):
    positive, negative = PROMPTS[prompts]
    on, off = both(options={"branch": side}, positive=positive, negative=negative)
    require_shared(on, off)
    require_equal(on, off)


@pytest.mark.parametrize("prompts", ["one", "several"])
def test_the_free_branch_has_nothing_to_reuse(prompts):
    positive, negative = PROMPTS[prompts]
    on, off = both(options={"branch": "free"}, positive=positive, negative=negative)
    assert on.shared == off.shared == 0
    assert not on.full
    require_equal(on, off, bitwise=True)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("prompts", ["one", "several on both sides"])
def test_reuse_changes_nothing_however_the_conds_are_cut_in_chunks(monkeypatch, chunks, prompts):
    memory = MemoryShortage(monkeypatch, chunks=chunks)
    positive, negative = PROMPTS[prompts]
    on, off = both(lambda: memory.reach(exact_model()), positive=positive, negative=negative)
    require_shared(on, off)
    require_equal(on, off)
    # Each perturbed cond passes over the encoder; each ordinary one runs through it.
    ordinary = 3 * (len(positive()) + len(negative()))
    assert on.evaluated["input", 0] == ordinary
    assert on.evaluated["output", 3] == ordinary + 3 * len(positive())


@pytest.mark.filterwarnings("ignore:Should have:UserWarning:torchsde")
@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", "heun", "dpmpp_sde", "dpmpp_2m_sde", "uni_pc"]
)
def test_reuse_changes_nothing_in_any_sampler(sampler):
    on, off = both(sampler=sampler)
    require_shared(on, off)
    require_equal(on, off)


def test_samplers_of_two_evaluations_a_step_share_in_both():
    on, off = both(sampler="heun")
    require_shared(on, off, passes=5)  # the last of three steps is one evaluation


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_inpainting(cfg):
    noise_mask = torch.zeros(1, 1, 8, 8)
    noise_mask[..., 2:6, 1:7] = 1.0
    settings = {"latent": noise_like((1, 4, 8, 8), 9), "noise_mask": noise_mask, "cfg": cfg}
    on, off = both(**settings)
    require_shared(on, off, passes=3)
    require_equal(on, off, bitwise=cfg == 1.0)


def test_inpainting_models_that_see_the_mask():
    extra = {
        "concat_latent_image": noise_like((1, 4, 8, 8), 3),
        "concat_mask": (noise_like((1, 1, 64, 64), 4) > 0).float(),
    }
    build = lambda: exact_model("sdxl", in_channels=9)  # noqa: E731
    on, off = both(
        build,
        positive=lambda: conditioning(1, **extra),
        negative=lambda: conditioning(2, **extra),
        noise_mask=torch.ones(1, 1, 8, 8),
    )
    require_shared(on, off, passes=3)
    require_equal(on, off)


@pytest.mark.parametrize(("cfg", "blocks"), [(7.0, "d0"), (7.0, "middle"), (1.0, "u1")])
def test_models_that_predict_v(cfg, blocks):
    build = lambda: exact_model("sdxl", model_type=comfy.model_base.ModelType.V_PREDICTION)  # noqa: E731
    on, off = both(build, cfg=cfg, options={"blocks": blocks})
    require_shared(on, off, passes=3)
    require_equal(on, off, bitwise=cfg == 1.0)


@pytest.mark.parametrize(("cfg", "blocks"), [(7.0, "d0"), (7.0, "middle"), (1.0, "u0")])
def test_video(cfg, blocks):
    frames = 3

    def video():
        patcher = exact_model("svd", model_type=comfy.model_base.ModelType.V_PREDICTION)
        patcher.model.model_sampling.set_sigmas(torch.linspace(0.03, 15.0, 1000))
        return patcher

    def prompt(seed):
        extra = {
            "concat_latent_image": noise_like((frames, 4, 8, 8), seed),
            "augmentation_level": 0.0,
        }
        sizes = {"motion_bucket_id": 127, "fps": 6, "width": 64, "height": 64}
        embedding = noise_like((1, 1, 64), 50 + seed)
        return [[embedding, {"pooled_output": noise_like((1, 768), seed), **extra, **sizes}]]

    on, off = both(
        video,
        cfg=cfg,
        options={"blocks": blocks},
        batch=frames,
        positive=lambda: prompt(1),
        negative=lambda: prompt(2),
    )
    require_shared(on, off, passes=3)
    require_equal(on, off, bitwise=cfg == 1.0)


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.5, 1.0), (0.3, 0.7)])
def test_a_window_shares_inside_and_does_nothing_outside(window):
    on, off = both(options={"start": window[0], "end": window[1]}, steps=6)
    require_shared(on, off)
    assert 0 < on.shared < 6
    require_equal(on, off)


def test_reuse_passes_over_exactly_what_lies_before_the_first_block():
    rows = {}
    for blocks in ("d0", "middle", "u0", "u1"):
        on, off = both(options={"blocks": blocks}, cfg=1.0)
        rows[blocks] = {key: n for key, n in on.evaluated.items() if n != off.evaluated[key]}
        assert all(n == 3 for n in rows[blocks].values()), "three plain passes"
    names = [("input", i) for i in range(4)]
    # In each block at a fork, the layer before its transformer (here the first) is shared too.
    assert set(rows["d0"]) == set(names)
    assert set(rows["middle"]) == {*names, ("middle", 0)}
    assert set(rows["u0"]) == {*names, ("middle", 0), ("output", 0)}
    assert set(rows["u1"]) == {*names, ("middle", 0), ("output", 0), ("output", 1)}


@pytest.mark.parametrize("order", [("middle", "u0"), ("u0", "middle"), ("d0", "u1"), ("m0", "m0")])
@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_two_nodes_on_a_model_share_one_record(order, cfg):
    def guided(model, reuse):
        first = seg(model, 2.0, blocks=order[0], reuse=reuse)
        return seg(first, 1.0, 1.5, blocks=order[1], reuse=reuse)

    on, off = both(guided=guided, cfg=cfg, positive=PROMPTS["several"][0])
    require_shared(on, off)
    require_equal(on, off, bitwise=cfg == 1.0)
    conds = 2 + (cfg > 1)
    assert on.evaluated["input", 0] == 3 * conds, "the encoder runs for the ordinary conds alone"
    assert on.shared >= 6


def test_two_nodes_on_both_sides_of_cfg_share_one_record():
    def guided(model, reuse):
        first = seg(model, 2.0, branch="unconditional", reuse=reuse)
        return seg(first, 1.0, 1.5, blocks="u1", reuse=reuse)

    on, off = both(guided=guided)
    require_shared(on, off, passes=6)
    require_equal(on, off)
    assert on.evaluated["input", 0] == 6


def test_a_node_that_reuses_goes_with_one_that_does_not():
    def guided(model, reuse):
        first = seg(model, 2.0, reuse=reuse)
        return seg(first, 1.0, 1.5, blocks="u1", reuse=False)

    on, off = both(guided=guided)
    assert on.shared == 3
    assert on.full == {"reuse is off": 3}
    require_equal(on, off)


@pytest.mark.parametrize(("cfg", "blocks"), [(7.0, "middle"), (1.0, "d0"), (1.0, "u1")])
def test_low_precision_is_reused_too(cfg, blocks):
    on, off = both(
        lambda: tiny_model(dtype=torch.bfloat16), cfg=cfg, options={"blocks": blocks}, batch=2
    )
    require_shared(on, off, passes=3)
    if cfg == 1.0:
        require_equal(on, off, bitwise=True)
    else:  # whatever bfloat16 rounding makes of another batch size
        assert difference(on.latents, off.latents) < 0.2


# What the comparison would notice.


def _wrong(rows, tensor, block=None, axis=0):
    """Hand on something that is almost right."""
    wide = part("calls.rows").Rows.right(rows, tensor, block, axis)
    if wide is not tensor:
        wide[-1].view(-1)[0] += wide.std()
    return wide


def _wrong_rows(rows, tensor, block=None, axis=0):
    """Hand on the rows of the other cond."""
    wide = part("calls.rows").Rows.right(rows, tensor, block, axis)
    if wide is not tensor and rows.plain == 2:
        wide[2] = wide[1 - rows.joins[0].chunk]
    return wide


@pytest.mark.parametrize(
    ("name", "planted", "blocks"),
    [
        ("widened", _wrong, "d0"),
        ("widened", _wrong, "middle"),
        ("widened", _wrong, "u1"),
        ("widened", _wrong_rows, "middle"),
        ("_joined", lambda rows, block: sum(j.fork <= block - 1 for j in rows.joins), "m0"),
    ],
)
def test_the_comparison_notices_a_planted_error(monkeypatch, name, planted, blocks):
    rows = part("calls.rows").Rows
    monkeypatch.setattr(rows, "right", rows.widened, raising=False)
    monkeypatch.setattr(rows, name, planted)
    on, off = both(options={"blocks": blocks})
    assert on.shared == 3 or "its blocks were not reached" in on.reasons
    if on.shared:
        assert difference(on.latents, off.latents) > 3 * ROUNDING


# What other nodes are told of a call that has more rows.


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [("sdxl", "middle"), ("sdxl", "u1"), *(("sd15", b) for b in ("d1", "middle", "u0", "u2"))],
)
def test_patches_are_told_the_conds_of_the_rows_that_they_see(kind, blocks):
    """And all else that blocks are told is what they are told without guidance."""
    watched = ("transformer_index", "activations_shape", "block_index", "block")

    def watching(seen):
        def look(rows, options):
            sides, uuids = options["cond_or_uncond"], options["uuids"]
            assert len(sides) == len(set(uuids)) == rows
            told = tuple(str(options.get(name)) for name in watched)
            seen.append((rows, sides[:2], tuple(re.sub(r"^\[\d+", "", text) for text in told)))

        def between(h, options):
            look(len(h), options)
            return h

        def before_output(h, hsp, options):
            look(len(h), options)
            assert len(h) == len(hsp)
            return h, hsp

        def attention(q, k, v, options):
            look(len(q), options)
            return q, k, v

        def around(model):
            model.set_model_input_block_patch(between)
            model.set_model_output_block_patch(before_output)
            model.set_model_attn2_patch(attention)
            return model

        return around

    plain, guided = [], []
    outcome(watching(plain)(exact_model(kind)), steps=1, size=(8, 10))
    model = watching(guided)(seg(exact_model(kind), blocks=blocks))
    assert outcome(model, steps=1, size=(8, 10)).shared == 1
    assert [rest for _, *rest in guided] == [rest for _, *rest in plain]
    assert {rows for rows, *_ in plain} == {2}
    assert {rows for rows, *_ in guided} == {2, 3} or blocks == "d1"
