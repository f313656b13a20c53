"""Stand-ins of code in networks that is right for the plain batch alone, or cannot run with more.

Each says which real thing it stands for.
"""

from __future__ import annotations

import torch
from host_models import noise_like
from stand_ins import attention_override, patched

# UNets: rows depend on each other.


@patched("attn1_patch")
def first_of_each_half(n, context, value, extra):
    """As style alignment: each half of the batch also attends to the half's first image."""
    halves = [t.unflatten(0, (2, len(t) // 2)) for t in (context, value)]
    return n, *((half + 0.5 * half[:, :1]).flatten(0, 1) for half in halves)


@patched("attn1_patch")
def mean_of_all_rows(n, context, value, extra):
    """As attention shared across images: keys and values are drawn to those of all rows."""
    return n, *(0.5 * (t + t.mean(0, keepdim=True)) for t in (context, value))


@patched("attn1_output_patch")
def halves_apart(out, extra):
    """As nodes that take the batch for two sides of cfg: one is pushed away from the other."""
    first, second = out.chunk(2)
    return torch.cat([first + 0.2 * (first - second), second])


# UNets: rows or labels are counted.


def asserts_labels(*allowed):
    """As regional prompts: the number of labels in a call must be one that the author met."""

    @patched("attn2_patch")
    def regional(q, k, v, extra):
        assert len(extra["cond_or_uncond"]) in allowed, "unexpected number of conds"
        return q, k, 1.2 * v

    return regional


def asserts_rows(rows):
    """As code that was written for one image: it knows what to add to so many rows alone."""

    @patched("input_block_patch")
    def added(h, options):
        assert len(h) == rows, "unexpected batch size"
        return h + 0.1 * noise_like(h.shape, 4).to(h)

    return added


@patched("attn1_output_patch")
def first_row_of_each_label(out, extra):
    """As ComfyUI's NAG, which looks up labels by `index`: later rows of a label are left out."""
    labels = extra["cond_or_uncond"]
    size = len(out) // len(labels)
    out = out.clone()
    for label in set(labels):
        at = labels.index(label) * size
        out[at : at + size] *= 1.3
    return out


def first_rows(count):
    """As caches of one image's features: so many rows get them, further ones nothing."""
    return patched("attn1_output_patch")(
        lambda out, extra: torch.cat([1.3 * out[:count], out[count:]])
    )


# UNets: calls that raise, and what changes the number of keys or rows.


def raises_beyond(rows, error):
    """As code that cannot run with more rows than it was written for.

    Args:
        rows: beyond these it raises, in the last attention that the network has.
        error: makes what is raised.
    """

    @patched("output_block_patch")
    def bounded(h, hsp, options):
        if len(h) > rows:
            raise error()
        return h, 1.1 * hsp

    return bounded


@patched("attn1_patch")
def longer_keys(n, context, value, extra):
    """As reference images: keys and values of another picture beside those of each row."""
    other = noise_like((1, 3, n.shape[-1]), 3).to(n).expand(len(n), -1, -1)
    return n, *(torch.cat([t, other], 1) for t in (context, value))


def windowed(model):
    """As attention in windows (MSW-MSA): tokens come as two windows, batch first, and go back."""

    @patched("attn1_patch")
    def windows(n, context, value, extra):
        return (n.unflatten(1, (2, -1)).flatten(0, 1),) * 3

    @patched("attn1_output_patch")
    def back(out, extra):
        return out.unflatten(0, (-1, 2)).flatten(1, 2)

    return back(windows(model))


# Transformers.


@attention_override
def override_over_rows(function, q, k, v, *args, **kwargs):
    """As attention shared across images on a transformer: an override that draws rows together."""
    k, v = (0.5 * (t + t.mean(0, keepdim=True)) for t in (k, v))
    return function(q, k, v, *args, **kwargs)


@patched("patch_replace", "dit", "double_block", 1)
def block_of_one_row(args, extra):
    """As identity adapters for Flux: what is added to a block's image has one row, and says so."""
    out = extra["original_block"](args)
    assert len(out["img"]) == 1, "made for one image"
    return {**out, "img": out["img"] + 0.2 * noise_like(out["img"].shape, 8).to(out["img"])}


@patched("post_input_patch")
def style_of_one_row(args):
    """As ComfyUI's USO style reference: one image's tokens before the text of a Flux."""
    style = {"txt": noise_like((1, 3, args["txt"].shape[-1]), 6), "txt_ids": torch.zeros(1, 3, 3)}
    joined = {name: torch.cat([t.to(args[name]), args[name]], 1) for name, t in style.items()}
    return {**args, **joined}


@patched("attn2_patch")
def sound_of_one_row(args):
    """As ComfyUI's InfiniteTalk: each block of a Wan attends to a sound, which has one row."""
    x = args["x"]
    sound = noise_like((1, 3, x.shape[-1]), 7).to(x)
    return x + torch.bmm(torch.bmm(x, sound.mT).softmax(-1), sound)
