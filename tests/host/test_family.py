"""The family on diffusion transformers against slow references of joint attention and blocks."""

from __future__ import annotations

import functools
import importlib
import math

import pytest
import torch
from choice import each
from dit_models import ALL, KINDS, TINY, VARIANTS, sample_dit, tiny_dit
from dit_oracle import (
    KEYS_TOO,
    PIXELS,
    DenseGuidance,
    block_modules,
    blur_of,
    float64_rotary,
    found_rows,
    grid_size,
    selector,
    shape_of,
)
from family_oracle import guide, guided_by_hand, permutation_matrix, permuted, skipped
from host_models import PACK
from host_oracle import blur_map, deviation

CORE = [kind for kind in KINDS if kind in ("flux", "sd3", "qwen", "lumina2", "wan")]
VIDEO = [kind for kind in KINDS if TINY[kind].frames and kind not in ("qwen", "krea2", "joyimage")]
ONLY_FLOAT32 = {"cosmos1", "hidream_o1"}
ONE_HEAD = {"sd3"}
ROWS_LAST = {"cosmos1"}  # the rows of its batch are the fourth axis of its tokens
SCALE = 1.0
CELLS = (3, 4)
core = importlib.import_module(PACK + ".seg_core")


@pytest.fixture(autouse=True)
def _float64():
    with float64_rotary():
        yield


@functools.cache
def model_of(kind):
    """Return a tiny model that tests share; clone it, never change it."""
    return tiny_dit(kind, dtype=torch.float32 if kind in ONLY_FLOAT32 else torch.float64)


def bound(kind):
    """Return the largest deviation of latents that rounding explains."""
    return 1e-4 if kind in ONLY_FLOAT32 else 1e-6


@functools.cache
def rows_of(kind, refs=False):
    """Return the image's rows in the first block's queries, and how many queries there are."""
    cond = TINY[kind].refs if refs else None
    return found_rows(tiny_dit(kind), kind, shape_of(kind, CELLS), cond=cond)


def sampled(model, kind, *, cfg=1.0, batch=1, steps=None, **options):
    # The sampler is in float32, and so are Wan's patches.
    steps = (1 if kind.startswith("wan") else 2) if steps is None else steps
    return sample_dit(model, kind, shape_of(kind, CELLS, batch=batch), cfg=cfg, steps=steps,
                      **options)  # fmt: skip


def compare(kind, ours, theirs, **options):
    """Return how far a node is from its reference, whose guidance is to be visible."""
    plain, ours, theirs = (sampled(m, kind, **options) for m in (model_of(kind), ours, theirs))
    assert torch.isfinite(ours).all()
    assert deviation(plain, theirs) > 1e-2, "the guidance of the reference is visible"
    return deviation(ours, theirs)


# References: each takes a kind and numbers of blocks and returns a guided model.


def dense(blur, refs=False, **changes):
    """By whole maps of joint logits; `blur` is a function of the grid, None for the identity."""

    def reference(kind, numbers):
        # The host takes HunyuanVideo's reference for one image only; the rows count from the end.
        rows, length = rows_of(kind, refs and kind != "hunyuan_video")
        map_ = blur and blur(grid_size(kind, shape_of(kind, CELLS)))
        return DenseGuidance(
            model_of(kind), kind, rows, length, map_, numbers, scale=SCALE, **changes
        ).guided()

    return reference


def passed_over(side="cond"):
    """By blocks whose results are their arguments."""

    def reference(kind, numbers):
        modules = [block_modules(model_of(kind), kind)[n] for n in numbers]
        return guided_by_hand(model_of(kind), lambda _: skipped(modules), SCALE, side)

    return reference


def shuffled(kind, numbers, wrong=0):
    """By permutation matrices before the blocks, another one for each step and block."""
    model = model_of(kind)
    modules = [block_modules(model, kind)[n] for n in numbers]
    cells = math.prod(grid_size(kind, shape_of(kind, CELLS))[1:])
    rows, length = (None, None) if kind in ROWS_LAST else rows_of(kind)

    def matrix(order):
        def whole(tokens):
            if tokens.shape[1] == length:
                return permutation_matrix(order, rows, length)
            if tokens.shape[1] == len(rows):
                return permutation_matrix(order, list(range(len(rows))), len(rows))
            return None

        return whole

    def reordered(step):
        orders = [core.token_permutation(cells, 0, step, number + wrong) for number in numbers]
        if kind not in ROWS_LAST:
            return permuted(modules, [matrix(order) for order in orders])
        (module,), (order,) = modules, orders
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: (
                (args[0].flatten(1, 2)[:, order].reshape(args[0].shape), *args[1:]), kwargs
            ),
            with_kwargs=True,
        )  # fmt: skip

    return guided_by_hand(model, reordered, SCALE)


def over_time(sigma, space):
    def blur(grid):
        frames, height, width = grid
        each = blur_map(height, width, sigma) if space else torch.eye(height * width)
        return torch.kron(blur_map(frames, 1, sigma), each.double())

    return blur


INFINITE = functools.partial(blur_of, sigma=math.inf)
FINITE = functools.partial(blur_of, sigma=1.3)
NARROW = {"infinite_blur": False, "blur_sigma": 1.3}
METHODS = {
    # name: node, its widgets, its reference, how it is sampled
    "SEG": ("SEG", {}, dense(INFINITE), {}),
    "SEG, finite": ("SEG", NARROW, dense(FINITE), {}),
    "SEG, uncond": (
        "SEG", {"branch": "unconditional", **NARROW}, dense(FINITE, side="uncond"),
        {"cfg": 1.5, "batch": 2},
    ),
    "SEG, free": (
        "SEG", {"branch": "free"}, dense(INFINITE, side="free"),
        {"cfg": 1.5, "batch": 2, "steps": 1},
    ),
    "SEG, one head": ("SEG", {"heads": ":h1"}, dense(INFINITE, heads=[1]), {}),
    "SEG, time": ("SEG", {"axes": "time"}, dense(over_time(math.inf, space=False)), {}),
    "SEG, space and time": (
        "SEG", {"axes": "space and time", **NARROW}, dense(over_time(1.3, space=True)), {},
    ),
    "PAG": ("PAG", {}, dense(None), {"batch": 2}),
    "PAG, strength": ("PAG", {"strength": 0.3}, dense(None, strength=0.3), {}),
    "PAG, one head": ("PAG", {"heads": ":h0"}, dense(None, heads=[0]), {}),
    "SLG": ("SLG", {}, passed_over(), {}),
    "SLG, free": (
        "SLG", {"branch": "free"}, passed_over("free"), {"cfg": 1.5, "batch": 2, "steps": 1},
    ),
    "SLG, attention": ("SLG", {"what": "attention"}, dense(None, zero=True), {}),
    "TPG": ("TPG", {}, shuffled, {}),
}  # fmt: skip


def numbers_of(kind, method):
    """Return which blocks a method changes: by tokens the first and the last list's."""
    if method != "TPG":
        return [1, 2]
    if kind in ROWS_LAST:
        return [1]
    return [0, 1] if kind in PIXELS else [1, len(block_modules(model_of(kind), kind)) - 1]


def exists(kind, method):
    if kind in VARIANTS:
        return method == "SEG, finite"  # as the family's other kind in all else
    if "time" in method:
        return kind in VIDEO
    if "free" in method:
        return kind in CORE
    if "head" in method:
        return kind not in ONE_HEAD
    return kind not in KEYS_TOO or method not in ("SLG", "SLG, free", "TPG")


def ours(kind, method, numbers, **more):
    node, widgets, _, _ = METHODS[method]
    widgets = dict(widgets)
    names = selector(model_of(kind), kind, numbers).split(",")
    blocks = ",".join(name + widgets.get("heads", "") for name in names)
    widgets.pop("heads", None)
    return guide(node, model_of(kind), SCALE, blocks=blocks, **widgets, **more)


@pytest.mark.parametrize(
    *each(exists, lambda kind, **_: kind in ("flux", "wan"), kind=ALL, method=METHODS)
)
def test_every_method_is_its_slow_reference_in_every_family(kind, method):
    _, _, reference, options = METHODS[method]
    numbers = numbers_of(kind, method)
    found = compare(kind, ours(kind, method, numbers), reference(kind, numbers), **options)
    assert found < bound(kind)


@pytest.mark.parametrize("kind", [kind for kind in ALL if TINY[kind].refs])
def test_reference_images_stay_as_they_are(kind):
    reference = dense(INFINITE, refs=True)(kind, [1, 2])
    found = compare(kind, ours(kind, "SEG", [1, 2]), reference, cond=TINY[kind].refs)
    assert found < bound(kind)


PLANTS = {
    "transposed": lambda kind: dense(lambda g: blur_of((g[0], g[2], g[1]), 1.3))(kind, [1, 2]),
    "another width": lambda kind: dense(lambda g: blur_of(g, 1.29))(kind, [1, 2]),
    "another block": lambda kind: dense(FINITE)(kind, [0]),
    "another block passed over": lambda kind: passed_over()(kind, [1, 3]),
    "another order of tokens": lambda kind: shuffled(kind, [1, 2], wrong=1),
}


@pytest.mark.parametrize(*each(kind=CORE, plant=PLANTS))
def test_the_comparison_notices_a_planted_error(kind, plant):
    method = {"passed": "SLG", "order": "TPG"}
    method = next((m for word, m in method.items() if word in plant), "SEG, finite")
    assert compare(kind, ours(kind, method, [1, 2]), PLANTS[plant](kind)) > 1e-4


# Masks, which reach attention by the host's own way.


@pytest.mark.parametrize(*each(kind=["sd3", "wan"], method=["SEG", "SEG, finite", "PAG"]))
def test_a_mask_for_each_query_is_honoured(kind, method, monkeypatch):
    path = {"sd3": "comfy.ldm.modules.diffusionmodules.mmdit", "wan": "comfy.ldm.wan.model"}[kind]
    module = importlib.import_module(path)
    original = module.optimized_attention
    node = ours(kind, method, [1, 2])
    reference = METHODS[method][2](kind, [1, 2])

    def masked(q, k, v, heads, **kwargs):
        axis = 2 if kwargs.get("skip_reshape") else 1
        shape = (1, 1, q.shape[axis], k.shape[axis])
        generator = torch.Generator().manual_seed(shape[3])
        return original(
            q, k, v, heads, mask=torch.randn(shape, generator=generator).to(q), **kwargs
        )

    monkeypatch.setattr(module, "optimized_attention", masked)
    assert compare(kind, node, reference, batch=2, cfg=1.0) < bound(kind)
