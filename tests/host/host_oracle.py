"""A slow, obvious Smoothed Energy Guidance beside the node's: explicit maps, a full extra pass.

Independent of the code under test: the formulas here import nothing of it. The smoothed attention
is ComfyUI's `attn1` replacement with the whole tokens-by-tokens map; the guidance is a hook of its
own.
"""

from __future__ import annotations

import functools
import math

import comfy.model_patcher
import comfy.samplers
import numpy as np
import torch
from host_models import noise_like, sample, seg


@functools.cache
def blur_map(height, width, sigma, kernel="reference"):
    """Return the 2-D Gaussian blur of a grid as one dense matrix, token by token."""
    tokens = height * width
    if math.isinf(sigma):
        return torch.full((tokens, tokens), 1.0 / tokens, dtype=torch.float64)
    rows, columns = np.divmod(np.arange(tokens), width)
    blur = np.zeros((tokens, tokens))
    reach = [_reach(size, sigma, kernel) for size in (height, width)]
    for down in range(-reach[0], reach[0] + 1):
        for right in range(-reach[1], reach[1] + 1):
            row = [_mirror(r + down, height, kernel) for r in range(height)]
            column = [_mirror(c + right, width, kernel) for c in range(width)]
            seen = np.array(row)[rows] * width + np.array(column)[columns]
            blur[np.arange(tokens), seen] += math.exp(-(down**2 + right**2) / (2 * sigma**2))
    return torch.from_numpy(blur / blur.sum(axis=1, keepdims=True))


def _reach(size, sigma, kernel):
    if kernel == "full":
        return math.ceil(9 * sigma)
    taps = math.ceil(6 * sigma)
    taps += taps % 2 == 0
    largest = size if size % 2 else size + 1
    return min(taps, largest) // 2


def _mirror(cell, size, kernel):
    """Walk back from beyond the border, at the border cell's centre or at its outer edge."""
    if size == 1:
        return 0
    while not 0 <= cell < size:
        if kernel == "full":
            cell = -1 - cell if cell < 0 else 2 * size - 1 - cell
        else:
            cell = -cell if cell < 0 else 2 * (size - 1) - cell
    return cell


def dense_attention(query, key, value, heads, blur, mask=None):
    """Return attention in which each head's whole map of logits was blurred over the queries."""
    query, key, value = (
        t.reshape(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (query, key, value)
    )
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(query.shape[-1])
    logits = torch.einsum("qt,bhtk->bhqk", blur.to(logits), logits)
    if mask is not None:
        logits = logits + mask
    out = torch.einsum("bhqk,bhkd->bhqd", torch.softmax(logits, dim=-1), value)
    return out.transpose(1, 2).flatten(2)


def halved(size, level):
    """Return the grid of a level of the tiny networks: stride-2 convolutions round up."""
    for _ in range(level):
        size = tuple((n + 1) // 2 for n in size)
    return size


def dense_seg(
    model, scale=3.0, sigma=math.inf, kernel="reference", *, size, level=1,
    blocks=(("middle", 0),), side="cond", video=False, plant=None,
):  # fmt: skip
    """Return a clone that is guided the slow way.

    Args:
        model: the model to guide.
        scale: guidance weight.
        sigma: blur width in cells.
        kernel: border and reach, as the node's widget.
        size: latent height and width.
        level: how often the network has halved it at the blocks.
        blocks: where to smooth, as ComfyUI counts blocks.
        side: ``"cond"`` or ``"uncond"``.
        video: every second self-attention is over time and not to be smoothed.
        plant: an error to plant: ``"transposed"``, ``"time"``.
    """
    height, width = halved(size, level)
    blur = blur_map(*((width, height) if plant == "transposed" else (height, width)), sigma, kernel)

    def guide(args):
        calls = 0

        def attention(query, key, value, extra_options, mask=None):
            nonlocal calls
            calls += 1
            over_time = video and (calls % 2 == 0) != (plant == "time")
            map_ = torch.eye(query.shape[1]) if over_time else blur
            return dense_attention(query, key, value, extra_options["n_heads"], map_, mask)

        options = args["model_options"].copy()
        for block in blocks:
            options = comfy.model_patcher.set_model_options_patch_replace(
                options, attention, "attn1", *block
            )
        conds = args[side]
        (smoothed,) = comfy.samplers.calc_cond_batch(
            args["model"], [conds], args["input"], args["sigma"], options
        )
        evaluated = args[side + "_denoised"]
        if args["model_options"].get("sampler_pre_cfg_function"):  # altered since
            (evaluated,) = comfy.samplers.calc_cond_batch(
                args["model"], [conds], args["input"], args["sigma"], args["model_options"]
            )
        result = args["denoised"] + scale * (evaluated - smoothed)
        guided.pushes.append(deviation(result, args["denoised"]))
        return result

    guided = model.clone()
    guided.pushes = []  # how far each step was moved
    guided.set_model_sampler_post_cfg_function(guide)
    return guided


def clip_prompts():
    """Return the two prompts of a clip, as options of `sample`."""
    positive, negative = (
        [[noise_like((1, 1, 64), seed), {"pooled_output": noise_like((1, 64), seed)}]]
        for seed in (1, 2)
    )
    return {"positive": positive, "negative": negative}


def deviation(ours, theirs):
    """Return the largest difference, relative to the spread of the reference."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).abs().max() / theirs.std())


def deviation_of_node(
    model, *, scale=3.0, sigma=math.inf, kernel="reference", size=(8, 8),
    before=lambda m: m, after=lambda m: m, run=sample, node=None, dense=None, visible=1e-3,
    **options,
):  # fmt: skip
    """Sample with the node and with the dense reference, and return how far they are apart.

    Args:
        model: the model to guide.
        scale: guidance weight.
        sigma: blur width in cells.
        kernel: border and reach.
        size: latent height and width.
        before: what other nodes do to the model before guidance is added.
        after: what other nodes do to it afterwards.
        run: called with the guided model, ``size`` and ``options``; returns latents.
        node: more widgets of the node.
        dense: more arguments of the reference.
        visible: least effect of the guidance for which the comparison means something.
        options: of the run.
    """
    prepared = before(model)
    ours = run(
        after(seg(prepared, scale, sigma, kernel=kernel, **(node or {}))), size=size, **options
    )
    reference = dense_seg(prepared, scale, sigma, kernel, size=size, **(dense or {}))
    theirs = run(after(reference), size=size, **options)
    assert torch.isfinite(ours).all()
    assert max(reference.pushes) > visible, "the guidance of the reference is visible"
    return deviation(ours, theirs)
