"""Slow, obvious references beside the nodes: whole attention maps, and a whole extra pass.

Independent of the code under test: the formulas here import nothing of it, the changed attention
is put in by ComfyUI's own means, and the guidance is a post-CFG function of its own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math

import comfy.model_patcher
import comfy.samplers
import torch
from host_models import sample, seg
from unit.oracles import dense_blur


@functools.cache
def blur_map(height, width, sigma, kernel="reference", *, frames=1):
    """Return the blur of a grid, each frame on its own, as one dense matrix."""
    return dense_blur((frames, height, width), sigma, kernel)


def deviation(ours, theirs):
    """Return the largest difference, relative to the spread of the reference."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).abs().max() / theirs.std())


# Attention by whole maps; tensors are (batch, heads, tokens, dim).


def heads_apart(tensor, heads):
    """Return (batch, tokens, heads * dim) or (batch, tokens, heads, dim) in this order."""
    return tensor.reshape(*tensor.shape[:2], heads, -1).transpose(1, 2)


def by_head(tensors, heads, kwargs):
    """Return what an attention function is given in this order, whichever way it comes."""
    return tensors if kwargs.get("skip_reshape") else [heads_apart(t, heads) for t in tensors]


def attention_logits(query, key):
    """Return the whole map of logits; fewer heads of keys serve several heads of queries."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query @ key.mT / math.sqrt(query.shape[-1])


def masked(logits, mask):
    """Return logits under a mask of numbers or of truth values, None for no mask."""
    if mask is None:
        return logits
    mask = mask.reshape(-1, *[1] * (4 - mask.ndim), *mask.shape[1:])
    return logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask


def changed_attention(
    query, key, value, rows=slice(None), *, blur=None, strength=1.0, zero=False, heads=None,
    mask=None,
):  # fmt: skip
    """Return attention that is changed for some rows of queries.

    Args:
        query: queries.
        key: keys, of as many heads or fewer; the last ones belong to the queries.
        value: values, likewise.
        rows: which queries are changed.
        blur: the dense blur of their logits; None draws their part of the map to the identity.
        strength: how far the map is drawn to that; 0 changes nothing.
        zero: their part of the output is 0 instead.
        heads: which heads are changed; None for all.
        mask: of the logits, after the blur.
    """
    heads = range(query.shape[1]) if heads is None else heads
    logits = attention_logits(query, key)
    weights = masked(logits, mask).softmax(-1)
    if blur is not None:
        for head in heads:
            logits[:, head, rows] = blur.to(logits) @ logits[:, head, rows]
        weights = torch.lerp(weights, masked(logits, mask).softmax(-1), strength)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    out = weights @ value
    own = value[:, :, -query.shape[2] :]  # text may have no queries
    if zero:
        out[:, :, rows] = 0.0
    elif blur is None:
        for head in heads:
            out[:, head, rows] = torch.lerp(out[:, head, rows], own[:, head, rows], strength)
    return out


# Guidance by a whole extra pass.


def guided_by_hand(model, worse, scale=1.0, side="cond"):
    """Return a model guided away from predictions that are made worse.

    Args:
        model: the model to guide; `pushes` of what is returned tells how far each step was moved.
        worse: takes the number of the step, from 1, and the options of the extra pass, which it
            may change, and returns a context for that pass.
        scale: guidance weight.
        side: `"cond"`, `"uncond"`, or `"free"`, in which the uncond prediction is the worse one.
    """
    guided = model.clone()
    guided.pushes = []

    def guide(args):
        conds = args["uncond" if side == "free" else side]
        options = comfy.model_patcher.create_model_options_clone(args["model_options"])

        def evaluate(options):
            return comfy.samplers.calc_cond_batch(
                args["model"], [conds], args["input"], args["sigma"], options
            )[0]

        with worse(len(guided.pushes) + 1, options):
            bad = evaluate(options)
        if side == "free":
            result = bad + (args["cond_scale"] + scale) * (args["cond_denoised"] - bad)
        else:
            good = args[side + "_denoised"]
            if args["model_options"].get("sampler_pre_cfg_function"):  # altered since
                good = evaluate(args["model_options"])
            result = args["denoised"] + scale * (good - bad)
        guided.pushes.append(deviation(result, args["denoised"]))
        return result

    guided.set_model_sampler_post_cfg_function(guide)
    return guided


def guided_by_attention(model, changes, blocks=(("middle", 0),), **guidance):
    """Return a model guided away from predictions with other attention in blocks of its UNet.

    Args:
        model: the model to guide.
        changes: arguments of `changed_attention` for the self-attentions of a block in turn: on
            video UNets every second one is over time.
        blocks: where, as ComfyUI counts blocks.
        guidance: further arguments of `guided_by_hand`.
    """

    @contextlib.contextmanager
    def worse(_step, options):
        turn = itertools.cycle(changes)

        def attention(query, key, value, extra_options):
            split = (heads_apart(t, extra_options["n_heads"]) for t in (query, key, value))
            return changed_attention(*split, **next(turn)).transpose(1, 2).flatten(2)

        for block in blocks:
            comfy.model_patcher.set_model_options_patch_replace(options, attention, "attn1", *block)
        yield

    return guided_by_hand(model, worse, **guidance)


def halved(size, level):
    """Return the grid of a level of the tiny networks: stride-2 convolutions round up."""
    for _ in range(level):
        size = tuple((n + 1) // 2 for n in size)
    return size


def dense_seg(
    model, scale=3.0, sigma=math.inf, kernel="reference", *, size, level=1, blocks=(("middle", 0),),
    side="cond", video=False,
):  # fmt: skip
    """Return a clone of a UNet with Smoothed Energy Guidance.

    Args:
        model: the model to guide.
        scale: guidance weight.
        sigma: blur width in cells.
        kernel: border and reach, as the node's widget.
        size: latent height and width.
        level: how often the network has halved it at the blocks.
        blocks: where to smooth, as ComfyUI counts blocks.
        side: as in `guided_by_hand`.
        video: every second self-attention is over time and not to be smoothed.
    """
    changes = [{"blur": blur_map(*halved(size, level), sigma, kernel)}]
    if video:
        changes.append({"strength": 0.0})
    return guided_by_attention(model, changes, blocks, scale=scale, side=side)


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
    ours = seg(prepared, scale, sigma, kernel=kernel, **(node or {}))
    reference = dense_seg(prepared, scale, sigma, kernel, size=size, **(dense or {}))
    ours, theirs = (run(after(m), size=size, **options) for m in (ours, reference))
    assert torch.isfinite(ours).all()
    assert max(reference.pushes) > visible, "the guidance of the reference is visible"
    return deviation(ours, theirs)
