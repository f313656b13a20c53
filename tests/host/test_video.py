"""Video UNets: attention over space is smoothed frame by frame, attention over time is not."""

from __future__ import annotations

import importlib
import inspect
import math

import pytest
import torch
from choice import each, pairs
from host_models import noise_like, sample, seg, shared_model
from host_oracle import dense_seg, deviation
from reuse_checks import require_reference

# Latent size and frames; the middle grid has half the size. Frames may equal the grid's tokens.
CLIPS = {
    "3 frames of 4x3 tokens": ((8, 6), 3),
    "4 frames of 2x2 tokens": ((4, 4), 4),
    "6 frames of 2x3 tokens": ((4, 6), 6),
    "1 frame": ((6, 4), 1),
    "2 frames of 1x2 tokens": ((2, 4), 2),
}


def clip(model, *, size, frames, **options):
    return sample(model, size=size, batch=frames, scheduler="karras", **options)


@pytest.mark.parametrize(*pairs(name=CLIPS, sigma=[math.inf, 1.3], reuse=[True, False]))
def test_every_frame_is_what_the_dense_reference_of_space_alone_gives(name, sigma, reuse):
    size, frames = CLIPS[name]
    require_reference(
        shared_model("svd"), sigma=sigma, size=size, frames=frames, run=clip, cfg=2.5, reuse=reuse,
        dense={"video": True}, positive=prompt(1), negative=prompt(2),
    )  # fmt: skip


def test_the_comparison_notices_attention_smoothed_over_time():
    size, frames = (4, 4), 4  # where the two cannot be told apart by their sizes
    options = {"size": size, "frames": frames, "positive": prompt(1), "negative": prompt(2)}
    ours = clip(seg(shared_model("svd")), **options)
    wrong = dense_seg(shared_model("svd"), size=size, video=True, plant="time")
    assert deviation(ours, clip(wrong, **options)) > 1e-4


def prompt(seed):
    embedding = noise_like((1, 1, 64), seed)
    return [[embedding, {"pooled_output": noise_like((1, 64), seed)}]]


def test_attention_over_time_sees_the_queries_it_would_see_without_the_node():
    """Both attentions are watched where the host hands them their projected queries."""
    rows = {}

    def watched(model, name):
        model = model.clone()

        def replace(query, key, value, extra_options):
            rows.setdefault(name, []).append(query.clone())
            return value if query.shape[1] == value.shape[1] else value[:, : query.shape[1]]

        model.set_model_attn1_replace(replace, "middle", 0)
        return model

    options = {"size": (8, 6), "frames": 3, "cfg": 1.0, "steps": 1}
    options |= {"positive": prompt(1), "negative": prompt(2)}
    clip(watched(seg(shared_model("svd"), reuse=False), "guided"), **options)
    space, time, smoothed, time_again = rows["guided"]
    assert space.shape == smoothed.shape == (3, 12, 64)
    assert time.shape == time_again.shape == (12, 3, 64)
    mean = space.mean(1, keepdim=True).expand_as(space)
    torch.testing.assert_close(smoothed, mean, rtol=1e-6, atol=1e-9)
    # Attention was replaced by its values, so what comes after it is the same in both passes.
    torch.testing.assert_close(time_again, time, rtol=0, atol=0)


@pytest.mark.parametrize(*each(sigma=[math.inf, 1.3], order=["before", "after"], cfg=[2.5, 1.0]))
def test_context_windows_over_a_clip_give_what_the_dense_reference_gives(sigma, order, cfg):
    def windows(model):
        # Newer versions add a frame to each window, which SVD's frame count does not know of.
        module = importlib.import_module("comfy_extras.nodes_context_windows")
        node = module.ContextWindowsManualNode
        known = inspect.signature(node.execute).parameters
        extra = {"causal_window_fix": False} if "causal_window_fix" in known else {}
        settings = (4, 2, "standard_static", 1, False, "pyramid", 0, False)
        return node.execute(model, *settings, **extra)[0]

    require_reference(
        shared_model("svd"), sigma=sigma, size=(4, 6), frames=7, run=clip, cfg=cfg,
        dense={"video": True}, positive=prompt(1), negative=prompt(2), **{order: windows},
    )  # fmt: skip


def test_free_branch_on_a_clip_smooths_the_unconditional_rows_alone():
    seen = []
    options = {"size": (8, 6), "frames": 3, "cfg": 2.5, "steps": 1, "positive": prompt(1)}
    options |= {"negative": prompt(2)}
    model = shared_model("svd")

    def watched(model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda a: seen.append(a) or a["denoised"])
        return model

    clip(watched(model), **options)
    clip(watched(seg(model, branch="free")), **options)
    plain, free = seen
    torch.testing.assert_close(free["cond_denoised"], plain["cond_denoised"], rtol=1e-6, atol=1e-6)
    assert deviation(free["uncond_denoised"], plain["uncond_denoised"]) > 1e-4
