"""Video UNets: attention over space is smoothed frame by frame, over time where `axes` says so."""

from __future__ import annotations

import math

import pytest
import torch
from choice import each, pairs
from family_oracle import guide
from host_models import noise_like, sample, shared_model
from host_oracle import blur_map, deviation, deviation_of_node, guided_by_attention, halved
from reuse_checks import require_reference
from stand_ins import context_windows

# Latent size and frames; the middle grid has half the size. Frames may equal the grid's tokens.
CLIPS = {
    "3 frames of 4x3 tokens": ((8, 6), 3),
    "4 frames of 2x2 tokens": ((4, 4), 4),
    "6 frames of 2x3 tokens": ((4, 6), 6),
    "1 frame": ((6, 4), 1),
    "2 frames of 1x2 tokens": ((2, 4), 2),
}
REUSE = (True, False)


def clip_prompts():
    """Return the two prompts of a clip, as options of `sample`."""
    positive, negative = (
        [[noise_like((1, 1, 64), seed), {"pooled_output": noise_like((1, 64), seed)}]]
        for seed in (1, 2)
    )
    return {"positive": positive, "negative": negative}


def clip(model, *, frames, **options):
    return sample(model, batch=frames, scheduler="karras", **clip_prompts(), **options)


@pytest.mark.parametrize(*pairs(name=CLIPS, sigma=[math.inf, 1.3], reuse=REUSE))
def test_every_frame_is_what_the_dense_reference_of_space_alone_gives(name, sigma, reuse):
    size, frames = CLIPS[name]
    require_reference(
        shared_model("svd"), sigma=sigma, size=size, frames=frames, run=clip, cfg=2.5, reuse=reuse,
        dense={"video": True},
    )  # fmt: skip


def test_free_branch_on_a_clip_is_what_the_dense_reference_gives():
    found = deviation_of_node(
        shared_model("svd"), size=(8, 6), frames=3, run=clip, cfg=2.5, node={"branch": "free"},
        dense={"video": True, "side": "free"},
    )  # fmt: skip
    assert found <= 1e-6


@pytest.mark.parametrize(*each(sigma=[math.inf, 1.3], order=["before", "after"], cfg=[2.5, 1.0]))
def test_context_windows_over_a_clip_give_what_the_dense_reference_gives(sigma, order, cfg):
    require_reference(
        shared_model("svd"), sigma=sigma, size=(4, 6), frames=7, run=clip, cfg=cfg,
        dense={"video": True}, **{order: context_windows},
    )  # fmt: skip


@pytest.mark.parametrize(
    *pairs(
        axes=["space", "time", "space and time"], sigma=[math.inf, 1.3], reuse=REUSE,
        size=[(8, 6), (4, 4)],  # four frames of four tokens look alike
    )
)  # fmt: skip
def test_attention_is_smoothed_over_the_axes_that_are_chosen_and_no_others(
    axes, sigma, size, reuse
):
    def difference_from(axes):
        blur = {"space": blur_map(*halved(size, 1), sigma), "time": blur_map(4, 1, sigma)}
        changes = [
            {"blur": blur[axis]} if axis in axes else {"strength": 0.0}
            for axis in ("space", "time")
        ]
        reference = guided_by_attention(shared_model("svd"), changes)
        return deviation(mine, clip(reference, frames=4, size=size, cfg=2.5))

    widgets = {"infinite_blur": math.isinf(sigma), "blur_sigma": 1.3, "axes": axes}
    node = guide("SEG", shared_model("svd"), reuse=reuse, **widgets)
    mine = clip(node, frames=4, size=size, cfg=2.5)
    assert difference_from(axes) < 1e-6
    assert difference_from("time" if axes == "space" else "space") > 1e-4


def test_where_there_is_no_time_it_says_so(caplog):
    with pytest.raises(ValueError, match="this UNet makes single pictures"):
        guide("SEG", shared_model(), axes="space and time")
    with pytest.raises(ValueError, match="axes must be one of space, time, space and time"):
        guide("SEG", shared_model(), axes="spacetime")
    model = shared_model("svd")
    ours = clip(guide("SEG", model, axes="time"), frames=1)
    assert torch.equal(ours, clip(model, frames=1))
    assert sum("there is one frame" in message for message in caplog.messages) == 1
