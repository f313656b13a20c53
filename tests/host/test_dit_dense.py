"""The nodes on diffusion transformers against whole, explicitly changed maps of joint attention."""

from __future__ import annotations

import functools
import importlib
import math

import pytest
import torch
from dit_models import TINY, available, sample_dit, tiny_dit
from dit_oracle import (
    DenseGuidance,
    blur_of,
    float64_rotary,
    found_rows,
    grid_size,
    selector,
    shape_of,
)
from host_models import PACK, seg
from host_oracle import deviation

KINDS = [kind for kind in TINY if available(kind) and kind != "anima"]  # slow; as cosmos2
CORE = [kind for kind in KINDS if kind in ("flux", "sd3", "qwen", "lumina2", "wan")]
BLOCKS = [1, 2]
SCALE = 1.0
ONLY_FLOAT32 = {"cosmos1"}
SIDES = {"cond": "conditional", "uncond": "unconditional", "free": "free"}


@pytest.fixture(autouse=True)
def _float64():
    with float64_rotary():
        yield


def bound(kind):
    """Return the largest deviation that rounding explains."""
    return 1e-4 if kind in ONLY_FLOAT32 else 1e-6


@functools.cache
def rows_of(kind, shape, refs=False):
    """Return the image's rows in the first block's queries, and how many queries there are."""
    return found_rows(tiny_dit(kind), kind, shape, cond=TINY[kind].refs if refs else None)


def perturbed_attention(model, strength, **advanced):
    """Return a model with the SEGuidancePAG node applied."""
    node = importlib.import_module(PACK + ".nodes.pag").SEGuidancePAG
    return node.execute(model, SCALE, 0.0, 1.0, strength=strength, **advanced)[0]


def compare(kind, *, sigma=None, strength=1.0, refs=False, side="cond", batch=1, plant=None):
    """Return how far the node is from the dense reference.

    Args:
        kind: the tiny model.
        sigma: blur width; None for Perturbed-Attention Guidance.
        strength: of the latter.
        refs: with reference images.
        side: which prediction is perturbed.
        batch: number of images.
        plant: an error to plant into the reference.
    """
    shape = shape_of(kind, (3, 4))
    # The host takes HunyuanVideo's reference for one image only; the rows count from the end.
    rows, length = rows_of(kind, shape, refs and kind != "hunyuan_video")
    model = tiny_dit(kind, dtype=torch.float32 if kind in ONLY_FLOAT32 else torch.float64)
    height_and_width = grid_size(kind, shape)
    if plant == "transposed":
        height_and_width = (height_and_width[0], *height_and_width[:0:-1])
    blur = None if sigma is None else blur_of(height_and_width, sigma)
    if plant == "shifted":
        rows = rows[1:] + rows[:1]
    dense = DenseGuidance(
        model, kind, rows, length, blur, [0] if plant == "block" else BLOCKS,
        side=side, strength=strength, scale=SCALE,
    )  # fmt: skip
    options = {"blocks": selector(model, kind, BLOCKS), "branch": SIDES[side]}
    if sigma is None:
        ours = perturbed_attention(model, strength, **options)
    else:
        ours = seg(model, SCALE, sigma, **options)
    shape = (batch, *shape[1:])
    cond = TINY[kind].refs if refs else None
    # The sampler is in float32, and so are Wan's patches: gentle settings, and one step of Wan.
    run = functools.partial(
        sample_dit,
        kind=kind,
        shape=shape,
        cond=cond,
        steps=1 if kind.startswith("wan") or side == "free" else 2,
        cfg=1.0 if side == "cond" else 1.5,
    )
    ours, theirs, plain = run(ours), run(dense.guided()), run(model)
    assert torch.isfinite(ours).all()
    assert deviation(plain, theirs) > 1e-2, "the guidance of the reference is visible"
    return deviation(ours, theirs)


@pytest.mark.parametrize("sigma", [math.inf, 1.3])
@pytest.mark.parametrize("kind", KINDS)
def test_smoothed_queries_are_smoothed_logits(kind, sigma):
    assert compare(kind, sigma=sigma) < bound(kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if TINY[kind].refs])
def test_with_reference_images(kind):
    assert compare(kind, sigma=math.inf, refs=True) < bound(kind)


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_identity_attention_of_the_images_rows(kind, strength):
    if strength != 1 and kind not in CORE:
        pytest.skip("one strength is enough here")
    assert compare(kind, strength=strength) < bound(kind)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", CORE)
def test_each_side_with_a_batch_of_two(kind, side):
    assert compare(kind, sigma=1.3, side=side, batch=2) < bound(kind)


@pytest.mark.parametrize("plant", ["transposed", "shifted", "block"])
@pytest.mark.parametrize("kind", CORE)
def test_the_comparison_notices_a_planted_error(kind, plant):
    assert compare(kind, sigma=1.3, plant=plant) > 1e-4
