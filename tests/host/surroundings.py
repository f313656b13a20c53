"""Stand-ins of code in UNets: each function says which real thing it stands for."""

from __future__ import annotations

import comfy.patcher_extension
import torch
from host_models import noise_like

WRAPPERS = comfy.patcher_extension.WrappersMP
LABELS = "_or_".join(("cond", "uncond"))
"""The host's key of a call's labels, out of reach for those who look for it in code."""


def patched(name, patch):
    """Return what puts a patch of the host on a model."""

    def around(model):
        model = model.clone()
        model.set_model_patch(patch, name)
        return model

    return around


# Right for the plain batch alone.


def first_of_each_half(model):
    """As style alignment: each half of the batch also attends to the half's first image."""

    def shared(n, context, value, extra):
        del extra
        halves = [t.unflatten(0, (2, len(t) // 2)) for t in (context, value)]
        return n, *((half + 0.5 * half[:, :1]).flatten(0, 1) for half in halves)

    return patched("attn1_patch", shared)(model)


def longer_keys(model):
    """As reference images: keys and values of another picture beside those of each row."""

    def more(n, context, value, extra):
        del extra
        other = noise_like((1, 3, n.shape[-1]), 3).to(n).expand(len(n), -1, -1)
        return n, *(torch.cat([t, other], 1) for t in (context, value))

    return patched("attn1_patch", more)(model)


def mean_of_all_rows(model):
    """As attention shared across images: keys and values are drawn to those of all rows."""

    def shared(n, context, value, extra):
        del extra
        both = [0.5 * (t + t.mean(0, keepdim=True)) for t in (context, value)]
        return n, *both

    return patched("attn1_patch", shared)(model)


def normalised_over_rows(model):
    """As style alignment's normalisation: queries and keys take the first row's statistics."""

    def aligned(n, context, value, extra):
        del extra
        deviation, mean = torch.std_mean(n, dim=1, keepdim=True)
        n = (n - mean) / (deviation + 1e-5) * deviation[:1] + mean[:1]
        return n, context, value

    return patched("attn1_patch", aligned)(model)


def halves_apart(model):
    """As nodes that take the batch for two sides of cfg: one is pushed away from the other."""

    def pushed(out, extra):
        del extra
        first, second = out.chunk(2)
        return torch.cat([first + 0.2 * (first - second), second])

    return patched("attn1_output_patch", pushed)(model)


def asserts_labels(*allowed):
    """As regional prompts: the number of labels in a call must be one that the author met."""

    def around(model):
        def regional(q, k, v, extra):
            assert len(extra[LABELS]) in allowed, "unexpected number of conds"
            return q, k, 1.2 * v

        return patched("attn2_patch", regional)(model)

    return around


def asserts_rows(rows):
    """As code that was written for one image: it knows what to add to so many rows alone."""

    def around(model):
        def added(h, options):
            assert len(h) == rows, "unexpected batch size"
            return h + 0.1 * noise_like((rows, *h.shape[1:]), 4).to(h)

        return patched("input_block_patch", added)(model)

    return around


def masks_by_label(model):
    """As attention couples: one mask for each label that the plain call has, in its order."""

    def masked(out, extra):
        weights = {(0,): (1.5,), (1,): (0.5,), (0, 1): (1.5, 0.5), (1, 0): (0.5, 1.5)}
        weight = torch.tensor(weights[tuple(extra[LABELS])], dtype=out.dtype)
        return out * weight.repeat_interleave(len(out) // len(weight))[:, None, None]

    return patched("attn2_output_patch", masked)(model)


# Only some rows of a batch are treated.


def first_row_of_each_label(model):
    """As ComfyUI's NAG, which looks up labels by `index`: later rows of a label are left out."""

    def first(out, extra):
        labels = extra[LABELS]
        size = len(out) // len(labels)
        out = out.clone()
        for label in set(labels):
            at = labels.index(label) * size
            out[at : at + size] *= 1.3
        return out

    return patched("attn1_output_patch", first)(model)


def first_rows(count):
    """As caches of one image's features: so many rows get them, further ones nothing."""

    def around(model):
        def first(out, extra):
            del extra
            return torch.cat([1.3 * out[:count], out[count:]])

        return patched("attn1_output_patch", first)(model)

    return around


# Calls that raise.


def raises_beyond(rows, error, seen=None):
    """As code that cannot run with more rows than it was written for.

    Args:
        rows: from which on it raises, in the last attention that the network has.
        error: makes what is raised.
        seen: a list that gets the rows of each call that comes this far.
    """

    def around(model):
        def bounded(h, hsp, options):
            if seen is not None:
                seen.append(len(h))
            if len(h) > rows:
                raise error()
            return h, 1.1 * hsp

        return patched("output_block_patch", bounded)(model)

    return around


# Rows that a patch multiplies.


def windowed(model):
    """As attention in windows (MSW-MSA): tokens come as two windows, batch first, and go back."""

    def windows(n, context, value, extra):
        del context, value, extra
        n = n.unflatten(1, (2, -1)).flatten(0, 1)
        return n, n, n

    def back(out, extra):
        del extra
        return out.unflatten(0, (-1, 2)).flatten(1, 2)

    model = model.clone()
    model.set_model_attn1_patch(windows)
    model.set_model_attn1_output_patch(back)
    return model
