"""The family on diffusion transformers against slow references of joint attention and blocks."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from choice import each
from dit_models import ALL, CELLS, KINDS, TINY, VARIANTS, sampled, shape_of, tiny_dit
from dit_oracle import (
    CORE,
    KEYS_TOO,
    ONLY_FLOAT32,
    PIXELS,
    block_modules,
    dense_guidance,
    exact_model,
    found_rows,
    grid_size,
    selector,
)
from family_oracle import both_swapped, entered_by, guide, permutation_matrix, skipped
from host_oracle import blur_map, deviation, guided_by_hand

from seg_core import token_permutation

VIDEO = [kind for kind in KINDS if TINY[kind].frames and kind not in ("qwen", "krea2", "joyimage")]
ONE_HEAD = {"sd3"}
ROWS_LAST = {"cosmos1"}  # the rows of its batch are the fourth axis of its tokens
SCALE = 1.0


def bound(kind):
    """Return the largest deviation of latents that rounding explains."""
    return 1e-4 if kind in ONLY_FLOAT32 else 1e-6


@functools.cache
def rows_of(kind, cells=CELLS, refs=False):
    """Return the image's rows in the first block's queries, and how many queries there are."""
    cond = TINY[kind].refs if refs else None
    return found_rows(tiny_dit(kind), kind, shape_of(kind, cells), cond=cond)


def compare(kind, ours, theirs, *, cells=CELLS, batch=1, **options):
    """Return how far a node is from its reference, whose guidance is to be visible."""
    steps = 2 if kind == "cogvideox" else 1  # it predicts next to nothing in its first step
    options = {"cfg": 1.0, "steps": steps} | options
    shape = shape_of(kind, cells, batch=batch)
    mine, reference = (sampled(model, kind, shape, **options) for model in (ours, theirs))
    assert torch.isfinite(mine).all()
    assert max(theirs.pushes) > 5e-3, "the guidance of the reference is visible"
    return deviation(mine, reference)


# References: each takes a kind and numbers of blocks and returns a guided model.


def dense(blur, refs=False, side="cond", **change):
    """By whole maps of joint logits; `blur` is a function of the grid, None for the identity."""

    def reference(kind, numbers, cells=CELLS):
        # The host takes HunyuanVideo's reference for one image only; the rows count from the end.
        rows, length = rows_of(kind, cells, refs and kind != "hunyuan_video")
        map_ = blur and blur(*grid_size(kind, shape_of(kind, cells)))
        return dense_guidance(
            exact_model(kind), kind, rows, length, numbers, scale=SCALE, side=side, blur=map_,
            **change,
        )  # fmt: skip

    return reference


def passed_over(side="cond"):
    """By blocks whose results are their arguments."""

    def reference(kind, numbers):
        modules = [block_modules(exact_model(kind))[n] for n in numbers]
        return guided_by_hand(exact_model(kind), lambda *_: skipped(modules), SCALE, side)

    return reference


def shuffled(kind, numbers, wrong=0):
    """By permutation matrices before the blocks, another one for each step and block."""
    model = exact_model(kind)
    modules = [block_modules(model)[n] for n in numbers]
    cells = math.prod(grid_size(kind, shape_of(kind))[1:])
    rows, length = (None, None) if kind in ROWS_LAST else rows_of(kind)

    def matrix(order):
        def whole(tokens):
            place = image_rows(tokens, rows, length)
            if place is None:
                return None
            return permutation_matrix(order, place, tokens.shape[1]).to(tokens) @ tokens

        return whole

    def reordered(step, _options):
        orders = [token_permutation(cells, 0, step, number + wrong) for number in numbers]
        if kind not in ROWS_LAST:
            return entered_by(modules, [matrix(order) for order in orders])
        (module,), (order,) = modules, orders
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: (
                (args[0].flatten(1, 2)[:, order].reshape(args[0].shape), *args[1:]), kwargs
            ),
            with_kwargs=True,
        )  # fmt: skip

    return guided_by_hand(model, reordered, SCALE)


def image_rows(tokens, rows, length):
    """Return where the image is among the tokens of an argument; None if it is not there."""
    places = {len(rows): list(range(len(rows))), length: rows}
    return places.get(tokens.shape[1])


def swapped(kind, numbers):
    """By swaps of the least similar pairs before the blocks, one after the other."""
    modules = [block_modules(exact_model(kind))[n] for n in numbers]
    frames = grid_size(kind, shape_of(kind))[0]
    rows, length = rows_of(kind)

    def change(tokens):
        place = image_rows(tokens, rows, length)
        return None if place is None else both_swapped(tokens, place, frames, 0.3)

    def worse(*_):
        return entered_by(modules, [change] * len(modules))

    return guided_by_hand(exact_model(kind), worse, SCALE)


def in_space(sigma):
    return lambda frames, height, width: blur_map(height, width, sigma, frames=frames)


def over_time(sigma, space):
    def blur(frames, height, width):
        each = blur_map(height, width, sigma) if space else torch.eye(height * width)
        return torch.kron(blur_map(frames, 1, sigma), each.double())

    return blur


INFINITE, FINITE = in_space(math.inf), in_space(1.3)
NARROW = {"infinite_blur": False, "blur_sigma": 1.3}
BOTH_SIDES = {"cfg": 1.5, "batch": 2}
METHODS = {
    # name: node, its widgets, its reference, how it is sampled
    "SEG": ("SEG", {}, dense(INFINITE), {}),
    "SEG, finite": ("SEG", NARROW, dense(FINITE), {}),
    "SEG, uncond": (
        "SEG", {"branch": "unconditional", **NARROW}, dense(FINITE, side="uncond"), BOTH_SIDES,
    ),
    "SEG, free": ("SEG", {"branch": "free"}, dense(INFINITE, side="free"), BOTH_SIDES),
    "SEG, one head": ("SEG", {"heads": ":h1"}, dense(INFINITE, heads=[1]), {}),
    "SEG, strength": ("SEG", {"strength": 0.4}, dense(INFINITE, strength=0.4), {}),
    "SEG, strength, one head": (
        "SEG", {"heads": ":h1", "strength": 0.4, **NARROW},
        dense(FINITE, strength=0.4, heads=[1]), {},
    ),
    "SEG, time": ("SEG", {"axes": "time"}, dense(over_time(math.inf, space=False)), {}),
    "SEG, space and time": (
        "SEG", {"axes": "space and time", **NARROW}, dense(over_time(1.3, space=True)), {},
    ),
    "PAG": ("PAG", {}, dense(None), {"batch": 2}),
    "PAG, strength": ("PAG", {"strength": 0.3}, dense(None, strength=0.3), {}),
    "PAG, one head": ("PAG", {"heads": ":h0"}, dense(None, heads=[0]), {}),
    "SLG": ("SLG", {}, passed_over(), {}),
    "SLG, free": ("SLG", {"branch": "free"}, passed_over("free"), BOTH_SIDES),
    "SLG, attention": ("SLG", {"what": "attention"}, dense(None, zero=True), {}),
    "TPG": ("TPG", {}, shuffled, {"steps": 2}),
    "SSG": ("SSG", {"ratio": 0.3}, swapped, {}),
}  # fmt: skip


def numbers_of(kind, method):
    """Return which blocks a method changes: by tokens the first and the last list's."""
    if method == "SSG":  # a second block may tie: a swap can repeat tokens
        return numbers_of(kind, "TPG")[:1]
    if method != "TPG":
        return [1, 2]
    if kind in ROWS_LAST:
        return [1]
    return [0, 1] if kind in PIXELS else [1, len(block_modules(exact_model(kind))) - 1]


def exists(kind, method):
    if "time" in method:
        return kind in VIDEO
    if "free" in method:
        return kind in CORE
    if "head" in method:
        return kind not in ONE_HEAD
    if method == "SSG" and kind in ROWS_LAST:
        return False
    return kind not in KEYS_TOO or method not in ("SLG", "SLG, free", "TPG", "SSG")


def ours(kind, method, numbers):
    node, widgets, *_ = METHODS[method]
    heads = widgets.get("heads", "")
    blocks = [name + heads for name in selector(exact_model(kind), kind, numbers).split(",")]
    widgets = {name: value for name, value in widgets.items() if name != "heads"}
    return guide(node, exact_model(kind), SCALE, blocks=",".join(blocks), **widgets)


SIZES = {"landscape": CELLS, "portrait": (5, 2), "odd": (2.5, 3.5)}


def takes(kind, size):
    """Tell whether a family takes a size, and another one than its relatives."""
    if kind in VARIANTS:
        return size == "landscape"
    return size != "odd" or (TINY[kind].odd and TINY[kind].unit > 1)


@pytest.mark.parametrize(*each(takes, kind=ALL, size=SIZES))
def test_the_image_s_queries_and_no_others_are_smoothed_on_their_own_grid(kind, size):
    method = "SEG" if size == "portrait" else "SEG, finite"
    theirs = METHODS[method][2](kind, [1, 2], SIZES[size])
    assert compare(kind, ours(kind, method, [1, 2]), theirs, cells=SIZES[size]) < bound(kind)


@pytest.mark.parametrize("kind", [kind for kind in ALL if TINY[kind].refs])
def test_reference_images_stay_as_they_are(kind):
    reference = dense(FINITE, refs=True)(kind, [1, 2])
    found = compare(kind, ours(kind, "SEG, finite", [1, 2]), reference, cond=TINY[kind].refs)
    assert found < bound(kind)


@pytest.mark.parametrize(
    *each(exists, lambda kind, **_: kind in ("flux", "wan"), kind=KINDS, method=METHODS)
)
def test_every_method_is_its_slow_reference_in_every_family(kind, method):
    _, _, reference, options = METHODS[method]
    numbers = numbers_of(kind, method)
    found = compare(kind, ours(kind, method, numbers), reference(kind, numbers), **options)
    assert found < bound(kind)
