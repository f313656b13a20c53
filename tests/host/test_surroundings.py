"""Whatever samples on ComfyUI alone samples with our nodes, whichever code is in the network."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import surroundings as code
import torch
from choice import each
from dit_models import available, prompt, sampled, shape_of
from dit_oracle import exact_model
from family_oracle import guide, transformer_blocks
from host_models import noise_like, sample, shared_model
from host_oracle import deviation
from neighbours import KINDS
from no_op import ACTS, NOTHING, hardly, nothing, refused_or_latents

NAG = KINDS["attention made of both sides"]
CODES = {  # name: network, code, and the plain calls for which it is right, by cfg and batch
    "keys of each half's first": (
        "sdxl", code.first_of_each_half, [(7.0, 1), (7.0, 2), (7.0, 3), (1.0, 2)],
    ),
    "keys drawn to all rows": ("sdxl", code.mean_of_all_rows, [(7.0, 1), (1.0, 2), (7.0, 3)]),
    "halves pushed apart": ("sdxl", code.halves_apart, [(7.0, 1), (7.0, 3), (1.0, 2)]),
    "at most two labels": ("sdxl", code.asserts_labels(1, 2), [(7.0, 1), (7.0, 2)]),
    "one label": ("sdxl", code.asserts_labels(1), [(1.0, 1), (1.0, 2)]),
    "exactly two labels": ("sdxl", code.asserts_labels(2), [(7.0, 1)]),
    "one row": ("sdxl", code.asserts_rows(1), [(1.0, 1)]),
    "two rows": ("sdxl", code.asserts_rows(2), [(7.0, 1), (1.0, 2)]),
    "the first row of each label": (
        "sdxl", code.first_row_of_each_label, [(7.0, 1), (7.0, 2), (1.0, 2)],
    ),
    "the first two rows": ("sdxl", code.first_rows(2), [(7.0, 1), (1.0, 2)]),
    "the first row": ("sdxl", code.first_rows(1), [(1.0, 1)]),
    "attention over all rows": (
        "flux", code.override_over_rows, [(4.0, 1), (1.0, 2), (4.0, 3)],
    ),
    "a block of one row": ("flux", code.block_of_one_row, [(1.0, 1)]),
    "a style of one row": ("flux", code.style_of_one_row, [(1.0, 1)]),
    "a sound of one row": ("wan", code.sound_of_one_row, [(1.0, 1)]),
    "attention made of both sides": ("flux", NAG, [(4.0, 2), (1.0, 2)]),
    "the same in Chroma": ("chroma", NAG, [(4.0, 2)]),
    "the same in Krea 2": ("krea2", NAG, [(4.0, 2)]),
}  # fmt: skip
CODES = {name: row for name, row in CODES.items() if row[0] == "sdxl" or available(row[0])}
# Code that cannot even run without the other side of cfg may be refused by name.
MAY_BE_REFUSED = {("exactly two labels", 7.0), ("two rows", 7.0)}
CASES = [(name, *case) for name, (_, _, cases) in CODES.items() for case in cases]
FIRST_CASES = [(name, *cases[0]) for name, (_, _, cases) in CODES.items()]


@functools.cache
def alone(name, cfg, batch):
    """Return the latents beside some code, without guidance; the code must act."""
    kind, around, _ = CODES[name]
    latents, unaffected = (
        sampled(model, kind, cfg=cfg, batch=batch)
        for model in (around(exact_model(kind)), exact_model(kind))
    )
    assert deviation(latents, unaffected) > ACTS
    return latents


def one_call_or_the_first(case, reuse):
    """Tell whether the ordinary run takes a case: whole passes beside a third of the codes."""
    return reuse or case in FIRST_CASES[::3]


@pytest.mark.parametrize(
    *each(None, one_call_or_the_first, case=CASES, reuse=(True, False)), ids=str
)
def test_code_that_is_right_for_the_plain_batch_alone_is_pushed_nowhere(case, reuse):
    name, cfg, batch = case
    kind, around, _ = CODES[name]
    run, model = functools.partial(sampled, kind=kind, cfg=cfg, batch=batch), exact_model(kind)
    for guided in (around(nothing(model, reuse)), hardly(around(model), reuse=reuse)):
        found = refused_or_latents(run, guided)
        if found is None:
            assert (name, cfg) in MAY_BE_REFUSED
        else:
            assert deviation(found, alone(*case)) <= NOTHING


METHODS = {
    "SEG": ("SEG", {}),
    "PAG": ("PAG", {}),
    "heads": ("PAG", {"blocks": "m0:h1"}),
    "attention": ("SLG", {"what": "attention"}),
    "TPG": ("TPG", {"blocks": "d0,m0"}),
    "SLG": ("SLG", {"blocks": "d0,m0"}),
}
IN_THE_BLOCK = {
    "windows": code.windowed,
    "longer keys": code.longer_keys,
    "keys of each half's first": code.first_of_each_half,
    "the first row of each label": code.first_row_of_each_label,
}


@pytest.mark.parametrize(
    *each(
        None, lambda around, cfg, **_: around == "windows" and cfg > 1,
        method=METHODS, around=IN_THE_BLOCK, cfg=(7.0, 1.0),
    )
)  # fmt: skip
def test_code_in_a_changed_block_gives_an_exact_result_or_a_refusal(method, around, cfg):
    name, widgets = METHODS[method]
    no_op = {"scale": 3.0, "strength": 1e-12} if name == "PAG" else {"scale": 1e-6}
    run = functools.partial(sampled, kind="sdxl", cfg=cfg, batch=2)
    beside = IN_THE_BLOCK[around](shared_model())
    unguided, found = run(beside), []
    for reuse in (True, False):
        still = guide(name, beside, reuse=reuse, **{**widgets, **no_op})
        still = refused_or_latents(run, still)
        found.append(refused_or_latents(run, guide(name, beside, 3.0, reuse=reuse, **widgets)))
        assert (still is None) == (found[-1] is None)
        assert still is None or deviation(still, unguided) <= NOTHING
    one, whole = found
    assert (one is None) == (whole is None)
    if one is not None:
        assert deviation(one, whole) <= NOTHING
        assert deviation(one, unguided) > ACTS


# Prompts that a transformer treats in a way of its own.


def first_frame(shape):
    """Return the latents of an image-to-video run whose first frame is given, and its mask."""
    latent = torch.zeros(shape)
    latent[:, :, :1] = noise_like((1, shape[1], 1, *shape[-2:]), 4)
    mask = torch.ones(1, 1, *shape[2:])
    mask[:, :, :1] = 0.0
    return {"latent": latent, "noise_mask": mask}


@pytest.mark.parametrize(*each(is_video=(False, True), reuse=(True, False)))
def test_a_masked_prompt_and_a_given_first_frame_of_hunyuan_video(is_video, reuse):
    kind, padded = "hunyuan_video", torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    settings = {"cfg": 4.0 if is_video else 1.0, "cond": {"attention_mask": padded}}
    if is_video:
        shape = shape_of(kind)
        positive = prompt(kind, shape, 1, guiding_frame_index=0, attention_mask=padded)
        settings |= {"positive": positive, **first_frame(shape)}
    model = exact_model(kind)
    still, unguided = (sampled(m, kind, **settings) for m in (nothing(model, reuse), model))
    assert deviation(still, unguided) <= NOTHING


# Functions in the place of a block's own, which name its arguments otherwise.


FUNCTIONS = {
    "no names": lambda forward: lambda *args, **kwargs: forward(*args, **kwargs),
    "another name": lambda forward: lambda hidden, **others: forward(hidden, **others),
}


@pytest.mark.parametrize(*each(method=["SEG", "TPG", "SLG", "SSG"], function=FUNCTIONS))
def test_a_function_in_a_block_s_place_may_call_its_arguments_anything(method, function):
    guided = guide(method, shared_model(), blocks="m0")
    (block,) = transformer_blocks(guided, ("m", 0, 0))
    expected = sample(guided)
    with mock.patch.object(block, "forward", FUNCTIONS[function](block.forward)):
        assert deviation(sample(guided), expected) <= NOTHING
