"""The family on UNets against slow references: blocks, tokens, heads."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from choice import each, pairs
from family_oracle import (
    both_swapped,
    entered_by,
    guide,
    permutation_matrix,
    skipped,
    transformer_blocks,
)
from host_models import sample, shared_model
from host_oracle import blur_map, deviation, guided_by_attention, guided_by_hand, halved

from benchmarks import models
from benchmarks.step import on_meta
from seg_core import token_permutation

EXACT = 1e-6  # of latents; the sampler is in float32
SIZE = (8, 6)
REUSE = (True, False)


def compare(ours, theirs, **options):
    """Return how far a node is from its reference, whose guidance is to be visible."""
    mine, reference = (sample(model, **options) for model in (ours, theirs))
    assert torch.isfinite(mine).all()
    assert max(theirs.pushes) > 1e-3, "the guidance of the reference is visible"
    return deviation(mine, reference)


PLACES = {"m0": [("m", 0, 0), ("m", 0, 1)], "d0.1,u1.0": [("d", 0, 1), ("u", 1, 0)]}


@pytest.mark.parametrize(*pairs(blocks=PLACES, cfg=[1.0, 7.0], reuse=REUSE))
def test_blocks_that_are_passed_over(blocks, cfg, reuse):
    model = shared_model()
    modules = transformer_blocks(model, *PLACES[blocks])
    reference = guided_by_hand(model, lambda *_: skipped(modules))
    ours = guide("SLG", model, blocks=blocks, reuse=reuse)
    assert compare(ours, reference, size=SIZE, cfg=cfg) < EXACT


# Attention.


NARROW = {"infinite_blur": False, "blur_sigma": 1.3}
MIDDLE = halved(SIZE, 1)
METHODS = {
    # name: node, its widgets, what it does to attention
    "SLG, attention": ("SLG", {"what": "attention"}, {"zero": True}),
    "SEG, one head": (
        "SEG", {"blocks": "m0:h1"}, {"blur": blur_map(*MIDDLE, math.inf), "heads": [1]},
    ),
    "SEG, one head, finite": (
        "SEG", {"blocks": "m0:h1", **NARROW}, {"blur": blur_map(*MIDDLE, 1.3), "heads": [1]},
    ),
    "SEG, strength": (
        "SEG", {"strength": 0.4}, {"blur": blur_map(*MIDDLE, math.inf), "strength": 0.4},
    ),
    "SEG, strength, two heads": (
        "SEG", {"blocks": "m0:h1,3", "strength": 0.4, **NARROW},
        {"blur": blur_map(*MIDDLE, 1.3), "strength": 0.4, "heads": [1, 3]},
    ),
    "PAG, two heads": (
        "PAG", {"blocks": "m0:h2-3", "strength": 0.6}, {"strength": 0.6, "heads": [2, 3]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(*pairs(method=METHODS, reuse=REUSE))
def test_changed_attention_is_its_slow_reference(method, reuse):
    node, widgets, change = METHODS[method]
    ours = guide(node, shared_model(), reuse=reuse, **widgets)
    reference = guided_by_attention(shared_model(), [change])
    assert compare(ours, reference, size=SIZE) < EXACT


@pytest.mark.parametrize("method", ["SEG", "PAG"])
def test_all_heads_by_name_are_all_heads(method):
    some, whole = (guide(method, shared_model(), blocks=b) for b in ("m0:h0-3", "m0"))
    assert deviation(sample(some), sample(whole)) < EXACT


def test_at_strength_1_the_result_is_that_of_seg_and_at_0_there_is_none(caplog):
    seg = sample(guide("SEG", shared_model()))
    assert torch.equal(seg, sample(guide("SEG", shared_model(), strength=1.0)))
    off = guide("SEG", shared_model(), strength=0.0)
    assert "Smoothed Energy Guidance has no effect: strength is 0." in caplog.messages
    assert "sampler_post_cfg_function" not in off.model_options
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="strength must be between 0 and 1"):
            guide("SEG", shared_model(), strength=wrong)


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
    blocks, places, numbers, level = {
        "sdxl": ("d0", [("d", 0, 0), ("d", 0, 1)], [0, 1], 1),
        "sd15": ("d0,u3", [("d", 0, 0), ("u", 3, 0)], [0, 6], 0),
    }[kind]
    tokens = math.prod(halved(SIZE, level))

    def worse(step, _options, shift=0):
        def matrix(number):
            order = token_permutation(tokens, 3, step, number + shift)
            whole = permutation_matrix(order, list(range(tokens)), tokens)
            return lambda rows: whole.to(rows) @ rows if rows.shape[1] == tokens else None

        return entered_by(transformer_blocks(model, *places), [matrix(n) for n in numbers])

    options = {"size": SIZE, "seed": 3}
    ours = guide("TPG", model, blocks=blocks, reuse=reuse)
    assert compare(ours, guided_by_hand(model, worse), **options) < EXACT
    wrong = guided_by_hand(model, functools.partial(worse, shift=1))
    assert compare(ours, wrong, **options) > 1e-3


@pytest.mark.parametrize(*each(kind=["sdxl", "sd15"], reuse=REUSE, ratio=[0.1, 0.5]))
def test_the_least_similar_tokens_and_channels_are_swapped(kind, reuse, ratio):
    model = shared_model(kind)
    modules = transformer_blocks(model, ("m", 0, 0), ("u", 0, 0))

    def swapped(tokens):
        image = tokens.shape[1] != 7  # the others are the prompt
        return both_swapped(tokens, slice(None), 1, ratio) if image else None

    reference = guided_by_hand(model, lambda *_: entered_by(modules, [swapped] * 2))
    ours = guide("SSG", model, blocks="m0.0,u0.0", ratio=ratio, reuse=reuse)
    assert compare(ours, reference, size=(32, 24)) < EXACT


@pytest.mark.parametrize("reuse", REUSE)
def test_a_ratio_that_is_not_one_pair_is_an_error_that_says_how_many_there_are(reuse):
    with pytest.raises(ValueError, match=r"0.001 of 24 tokens and 64 channels .* at least 1/"):
        sample(guide("SSG", shared_model(), ratio=0.001, blocks="m0", reuse=reuse), size=(8, 12))


def test_auto_is_the_middle_block_and_of_tokens_the_encoder_without_its_first_quarter(caplog):
    """On SDXL the layers of the released code: d6 to d23 of its count, d2.2-9 and d3 of ours."""
    with on_meta():
        sdxl = models.unet(models.KINDS["sdxl"], torch.device("meta"), torch.float16)
    named = {"TPG": "d2.2-9, d3", "SSG": "u0.0-5", "SLG": "m0", "SEG": "m0", "PAG": "m0"}
    for method, blocks in named.items():
        assert where(guide(method, sdxl)) == where(guide(method, sdxl, blocks=blocks)) == blocks
    assert where(guide("TPG", shared_model())) == "d0"
    layer = where(guide("SAG", shared_model()))
    assert layer == where(guide("SAG", shared_model(), blocks=" Auto,,")) == "where m0.0 attends"
    assert where(guide("SSG", shared_model("sd15"))) == "m0"


def where(model):
    function = model.model_options["sampler_post_cfg_function"][-1]
    return function.branch.perturbation.where
