"""Transformers of the host's true classes beside code that is right for the plain batch alone."""

from __future__ import annotations

import functools

import pytest
import torch
from choice import each
from dit_models import prompt, sample_dit, tiny_dit
from dit_oracle import float64_rotary, shape_of
from host_models import noise_like
from no_op import NOTHING, hardly, nothing, pushed
from reuse_checks import difference
from surroundings_dit import (
    block_of_one_row,
    block_over_rows,
    infinite_talk,
    override_over_rows,
    uso_style_reference,
)

DITS = {
    "attention drawn to all rows": ("flux", override_over_rows, [(4.0, 1), (1.0, 2), (4.0, 3)]),
    "a block that mixes all rows": ("flux", block_over_rows, [(4.0, 1), (1.0, 2), (4.0, 3)]),
    "a block of one row": ("flux", block_of_one_row, [(1.0, 1)]),
    "USO style reference": ("flux", uso_style_reference, [(1.0, 1)]),
    "InfiniteTalk": ("wan", infinite_talk(2), [(1.0, 1)]),
}
DIT_CASES = [(name, *case) for name, (_, _, cases) in DITS.items() for case in cases]


def dit_run(kind, cfg, batch, **settings):
    """Return what samples from a model of a transformer."""
    shape = shape_of(kind, (3, 4), batch=batch)

    def run(model):
        with float64_rotary():
            return sample_dit(model, kind, shape, cfg=cfg, **settings)

    return run


@functools.cache
def shared_dit(kind):
    return tiny_dit(kind, dtype=torch.float64)


@functools.cache
def dit_alone(name, cfg, batch):
    kind, around, _ = DITS[name]
    run = dit_run(kind, cfg, batch)
    alone = run(around(shared_dit(kind)))
    acts = difference(alone, run(shared_dit(kind)))
    assert acts > 1e-3
    return alone


@pytest.mark.parametrize(
    *each(None, lambda case, reuse: reuse, case=DIT_CASES, reuse=(True, False)), ids=str
)
def test_a_transformer_beside_code_for_the_plain_batch_is_pushed_nowhere(case, reuse):
    name, cfg, batch = case
    kind, around, _ = DITS[name]
    run, alone = dit_run(kind, cfg, batch), dit_alone(name, cfg, batch)
    for model in (nothing(shared_dit(kind), reuse), hardly(shared_dit(kind), reuse=reuse)):
        by = pushed(run, around(model), alone)
        assert by <= NOTHING


def masked_prompt(shape):
    """Return a mask of HunyuanVideo's prompt: the last two of its tokens are padding."""
    del shape
    return (torch.arange(7) < 5).long()[None]


def first_frame(shape):
    """Return the latents of an image-to-video run whose first frame is given, and its mask."""
    latent = torch.zeros(shape)
    latent[:, :, :1] = noise_like((1, shape[1], 1, *shape[-2:]), 4)
    mask = torch.ones(1, 1, *shape[2:])
    mask[:, :, :1] = 0.0
    return {"latent": latent, "noise_mask": mask}


@pytest.mark.parametrize(
    *each(is_video=(False, True), reuse=(True, False)),
)
def test_a_masked_prompt_and_a_given_first_frame_of_hunyuan_video(is_video, reuse):
    settings = {"cond": {"attention_mask": masked_prompt}}
    if is_video:
        shape = shape_of("hunyuan_video", (3, 4))
        masked = {"guiding_frame_index": 0, "attention_mask": masked_prompt}
        settings["positive"] = prompt("hunyuan_video", shape, 1, **masked)
        settings |= first_frame(shape)
    run = dit_run("hunyuan_video", 4.0 if is_video else 1.0, 1, **settings)
    alone = run(shared_dit("hunyuan_video"))
    by = pushed(run, nothing(shared_dit("hunyuan_video"), reuse), alone)
    assert by <= NOTHING
