"""The family on UNets against slow references: blocks, tokens, heads, time."""

from __future__ import annotations

import functools
import importlib
import math

import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from choice import each, pairs
from family_oracle import (
    guide,
    guided_by_hand,
    permutation_matrix,
    permuted,
    skipped,
    transformer_blocks,
)
from host_models import PACK, noise_like, sample, shared_model
from host_oracle import blur_map, deviation, halved

from benchmarks import models
from benchmarks.step import on_meta

EXACT = 1e-6  # of latents; the sampler is in float32
SIZE = (8, 6)
REUSE = (True, False)


def compare(ours, theirs, kind="sdxl", **options):
    """Return how far a node is from its reference, whose guidance is to be visible."""
    plain, ours, theirs = (sample(m, **options) for m in (shared_model(kind), ours, theirs))
    assert torch.isfinite(ours).all()
    assert deviation(plain, theirs) > 1e-3, "the guidance of the reference is visible"
    return deviation(ours, theirs)


PLACES = {"m0": [("m", 0, 0), ("m", 0, 1)], "d0.1,u1.0": [("d", 0, 1), ("u", 1, 0)]}


@pytest.mark.parametrize(*pairs(blocks=PLACES, cfg=[1.0, 7.0], reuse=REUSE))
def test_blocks_that_are_passed_over(blocks, cfg, reuse):
    model = shared_model()
    modules = transformer_blocks(model, *PLACES[blocks])
    reference = guided_by_hand(model, lambda _: skipped(modules))
    ours = guide("SLG", model, blocks=blocks, reuse=reuse)
    assert compare(ours, reference, size=SIZE, cfg=cfg) < EXACT


# Attention.


def with_attention(change, kind="sdxl"):
    """Return a model guided away from predictions with other attention in its middle block.

    Args:
        change: takes queries, keys and values with heads apart, and a function that attends with
            given queries; returns the output.
        kind: the tiny model.
    """

    def replace(q, k, v, extra, **_):
        q, k, v = (t.unflatten(-1, (extra["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))

        def attend(query):
            return (query @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v

        return change(q, k, v, attend).transpose(1, 2).flatten(2)

    def guide(args):
        options = comfy.model_patcher.set_model_options_patch_replace(
            args["model_options"].copy(), replace, "attn1", "middle", 0
        )
        (bad,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], options
        )
        return args["denoised"] + args["cond_denoised"] - bad

    guided = shared_model(kind).clone()
    guided.set_model_sampler_post_cfg_function(guide)
    return guided


def blurred_head(sigma, head):
    def change(q, k, v, attend):
        q = q.clone()
        q[:, head] = torch.einsum(
            "ij,bjc->bic", blur_map(*halved(SIZE, 1), sigma).to(q), q[:, head]
        )
        return attend(q)

    return change


def identity_of_heads(q, k, v, attend):
    out = attend(q)
    out[:, 2:4] = torch.lerp(out[:, 2:4], v[:, 2:4], 0.6)
    return out


NARROW = {"infinite_blur": False, "blur_sigma": 1.3}
METHODS = {
    "SLG, attention": ("SLG", {"what": "attention"}, lambda q, *_: torch.zeros_like(q)),
    "SEG, one head": ("SEG", {"blocks": "m0:h1"}, blurred_head(math.inf, 1)),
    "SEG, one head, finite": ("SEG", {"blocks": "m0:h1", **NARROW}, blurred_head(1.3, 1)),
    "PAG, two heads": ("PAG", {"blocks": "m0:h2-3", "strength": 0.6}, identity_of_heads),
}


@pytest.mark.parametrize(*pairs(method=METHODS, reuse=REUSE))
def test_changed_attention_is_its_slow_reference(method, reuse):
    node, widgets, change = METHODS[method]
    ours = guide(node, shared_model(), reuse=reuse, **widgets)
    assert compare(ours, with_attention(change), size=SIZE) < EXACT


@pytest.mark.parametrize("method", ["SEG", "PAG"])
def test_all_heads_by_name_are_all_heads(method):
    some, whole = (guide(method, shared_model(), blocks=b) for b in ("m0:h0-3", "m0"))
    assert deviation(sample(some), sample(whole)) < EXACT


def test_heads_that_do_not_exist_or_make_no_sense_are_errors_that_say_why():
    with pytest.raises(ValueError, match=r"block m0.0 has 4 heads, 0 to 3, .* no head 4"):
        guide("PAG", shared_model(), blocks="m0:h2,4")
    for method in ("SAG", "TPG", "SLG"):
        with pytest.raises(ValueError, match="heads cannot be chosen here"):
            guide(method, shared_model(), blocks="m0:h0")


def test_unknown_parts_are_errors():
    with pytest.raises(ValueError, match="what must be one of block, attention"):
        guide("SLG", shared_model(), what="layer")


# Tokens in another order.


@pytest.mark.parametrize(*each(kind=["sdxl", "sd15"], reuse=REUSE))
def test_tokens_that_enter_in_another_order(kind, reuse):
    model = shared_model(kind)
    core = importlib.import_module(PACK + ".seg_core")
    blocks, places, numbers, level = {
        "sdxl": ("d0", [("d", 0, 0), ("d", 0, 1)], [0, 1], 1),
        "sd15": ("d0,u3", [("d", 0, 0), ("u", 3, 0)], [0, 6], 0),
    }[kind]
    tokens = math.prod(halved(SIZE, level))

    def worse(step, shift=0):
        def matrix(number):
            order = core.token_permutation(tokens, 3, step, number + shift)
            whole = permutation_matrix(order, list(range(tokens)), tokens)
            return lambda rows: whole if rows.shape[1] == tokens else None

        return permuted(transformer_blocks(model, *places), [matrix(n) for n in numbers])

    options = {"kind": kind, "size": SIZE, "seed": 3}
    ours = guide("TPG", model, blocks=blocks, reuse=reuse)
    assert compare(ours, guided_by_hand(model, worse), **options) < EXACT
    wrong = guided_by_hand(model, functools.partial(worse, shift=1))
    assert compare(ours, wrong, **options) > 1e-3


def test_auto_is_the_middle_block_and_of_tokens_the_encoder_without_its_first_quarter(caplog):
    """On SDXL the layers of the released code: d6 to d23 of its count, d2.2-9 and d3 of ours."""
    with on_meta():
        sdxl = models.unet(models.KINDS["sdxl"], torch.device("meta"), torch.float16)
    named = {"TPG": "d2.2-9, d3", "SLG": "m0", "SEG": "m0", "PAG": "m0"}
    for method, blocks in named.items():
        assert where(guide(method, sdxl)) == where(guide(method, sdxl, blocks=blocks)) == blocks
    assert where(guide("TPG", shared_model())) == "d0"


def where(model):
    function = model.model_options["sampler_post_cfg_function"][-1]
    return function.branch.perturbation.where


# Over time.


def over_time(frames, size, sigma, axes):
    """Return what changes the attention of SVD: every second one is over time."""
    calls = []

    def change(q, k, v, attend):
        calls.append(None)
        if len(calls) % 2 == 0:
            blur = blur_map(frames, 1, sigma)
        elif axes == "time":
            return attend(q)
        else:
            blur = blur_map(*halved(size, 1), sigma)
        return attend(torch.einsum("ij,bhjc->bhic", blur.to(q), q))

    return change


def frame_prompt(seed):
    return [[noise_like((1, 1, 64), seed), {"pooled_output": noise_like((1, 64), seed)}]]


CLIP = {"scheduler": "karras", "positive": frame_prompt(1), "negative": frame_prompt(2)}


@pytest.mark.parametrize(
    *pairs(
        axes=["time", "space and time"], sigma=[math.inf, 1.3], reuse=REUSE,
        size=[(8, 6), (4, 4)],  # four frames of four tokens look alike
    )
)  # fmt: skip
def test_svd_smooths_its_attention_over_time_at_each_place(axes, sigma, size, reuse):
    widgets = {} if math.isinf(sigma) else NARROW
    ours = guide("SEG", shared_model("svd"), axes=axes, reuse=reuse, **widgets)
    reference = with_attention(over_time(4, size, sigma, axes), "svd")
    assert compare(ours, reference, "svd", batch=4, size=size, cfg=2.5, **CLIP) < EXACT


def test_where_there_is_no_time_it_says_so(caplog):
    with pytest.raises(ValueError, match="this UNet makes single pictures"):
        guide("SEG", shared_model(), axes="space and time")
    with pytest.raises(ValueError, match="axes must be one of space, time, space and time"):
        guide("SEG", shared_model(), axes="spacetime")
    model = shared_model("svd")
    ours = sample(guide("SEG", model, axes="time"), batch=1, **CLIP)
    assert torch.equal(ours, sample(model, batch=1, **CLIP))
    assert sum("there is one frame" in message for message in caplog.messages) == 1
