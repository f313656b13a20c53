"""The other perturbations the slow way: hooks of the tests' own, and blurred latents.

Independent of the code under test: blocks are known by their modules, and what goes through them
by the shapes of tensors.
"""

from __future__ import annotations

import contextlib
import itertools

import comfy.samplers
import torch
from host_models import part
from host_oracle import attention_logits, masked
from stand_ins import patched
from unit.oracles import blur_matrix

NODES = {
    "SEG": ("seg", "SEGuidance"),
    "PAG": ("pag", "SEGuidancePAG"),
    "SAG": ("sag", "SEGuidanceSAG"),
    "TPG": ("tpg", "SEGuidanceTPG"),
    "SLG": ("slg", "SEGuidanceSLG"),
    "SSG": ("ssg", "SEGuidanceSSG"),
}


def guide(method, model, scale=1.0, start=0.0, end=1.0, **widgets):
    """Return a model that is guided by one of the pack's nodes."""
    module, name = NODES[method]
    node = getattr(part(module), name)
    if method == "SEG":
        widgets = {"infinite_blur": True, "blur_sigma": 10.0} | widgets
    if method == "SAG":
        widgets = {"blur_sigma": 2.0} | {k: v for k, v in widgets.items() if k != "reuse"}
    return node.execute(model, scale=scale, start_percent=start, end_percent=end, **widgets)[0]


def tensors(value):
    """Return the tensors among a block's arguments or results."""
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for one in value for tensor in tensors(one)]
    return []


@contextlib.contextmanager
def skipped(modules):
    """Let what enters the modules come out: each result is the argument of its shape."""
    entered = {}

    def before(module, args, kwargs):
        # Copies: some blocks write into what they are given.
        entered[module] = [t.clone() for t in tensors([*args, *kwargs.values()])]

    def after(module, _args, out):
        def through(value):
            if torch.is_tensor(value):
                return next(t for t in entered[module] if t.shape == value.shape).clone()
            return type(value)(map(through, value)) if isinstance(value, tuple) else value

        return through(out)

    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after))
        yield


@contextlib.contextmanager
def entered_by(modules, changes):
    """Let other tokens enter each module.

    Args:
        modules: the modules.
        changes: for each, a function of an argument's tokens that returns others, or None for
            tensors that are not the image's.
    """

    def hook(change):
        def before(_module, args, kwargs):
            def changed(value):
                if isinstance(value, tuple):  # pictures and sound
                    return tuple(map(changed, value))
                if not torch.is_tensor(value) or value.ndim < 3:
                    return value
                others = change(value.flatten(1, -2))
                return value if others is None else others.reshape(value.shape)

            named = {k: changed(v) if torch.is_tensor(v) else v for k, v in kwargs.items()}
            return tuple(map(changed, args)), named

        return before

    with contextlib.ExitStack() as hooks:
        for module, change in zip(modules, changes, strict=True):
            hooks.enter_context(module.register_forward_pre_hook(hook(change), with_kwargs=True))
        yield


def permutation_matrix(order, rows, length):
    """Return the matrix that puts an image's rows, frame by frame, in another order."""
    matrix = torch.eye(length, dtype=torch.float64)
    cells = len(order)
    for first in range(0, len(rows), cells):
        frame = rows[first : first + cells]
        for place, source in enumerate(order.tolist()):
            matrix[frame[place]] = 0.0
            matrix[frame[place], frame[source]] = 1.0
    return matrix


def both_swapped(tokens, rows, frames, ratio):
    """Return tokens whose image rows are swapped as Self-Swap Guidance does, frame by frame."""
    out = tokens.clone()
    for sequence in out:
        image = sequence[rows].reshape(frames, -1, sequence.shape[-1])
        image = [_least_similar_swapped(frame, ratio) for frame in image]
        image = [_least_similar_swapped(frame.T, ratio).T for frame in image]
        sequence[rows] = torch.cat(image)
    return out


def _least_similar_swapped(vectors, ratio):
    """Swap the least similar of some vectors, pair by pair, as the released code does."""
    size = len(vectors)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).tolist()
    found = [(cosines[i][j], i, j) for i in range(size) for j in range(i + 1, size)]
    chosen = sorted(found)[: int(size * ratio)]
    source = list(range(size))
    for _, i, j in chosen:
        source[i] = j
    for _, i, j in chosen:
        source[j] = i
    return vectors[source]


def transformer_blocks(model, *places):
    """Return transformer blocks of a tiny UNet by part, block and layer."""
    network = model.model.diffusion_model
    parts = {"d": network.input_blocks, "m": [network.middle_block], "u": network.output_blocks}
    found = []
    for name, index, number in places:
        layers = itertools.chain.from_iterable(parts[name])
        spatial = [layer for layer in layers if hasattr(layer, "transformer_blocks")]
        found.append(spatial[index].transformer_blocks[number])
    return found


# Self-Attention Guidance.


def drawn(query, key, rows=slice(None), mask=None):
    """Return the attention that tokens draw from each other, by a whole map: (batch, tokens)."""
    map_ = masked(attention_logits(query, key).double(), mask).softmax(-1)
    own = map_[..., key.shape[2] - query.shape[2] :]  # text may have no queries
    return own[:, :, rows][..., rows].sum(2).mean(1)


def blurred_latent(image, sigma):
    """Return planes blurred by 9 taps of a Gaussian, fewer on short axes, reflected at borders."""
    rows, columns = (
        blur_matrix(n, sigma, "reference", taps=min(9, n - (n % 2 - 1))) for n in image.shape[-2:]
    )
    return rows @ image @ columns.T


def blurred_where_attended(model, attention, scale, sigma):
    """Return a model guided away from what it predicts where its own prediction was blurred.

    Args:
        model: the model to guide, at cfg 1.
        attention: returns the attention over the latent that was seen since the last time, 1 on
            average.
        scale: guidance weight.
        sigma: blur width in latent cells.
    """

    @patched("sampler_post_cfg_function")
    def guided(args):
        x0, x = args["cond_denoised"].double(), args["input"].double()
        mask = (attention() > 1.0).double().expand_as(x0)
        assert 0 < mask.mean() < 1
        degraded = mask * blurred_latent(x0, sigma) + (1 - mask) * x0
        (again,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], (x + degraded - x0).to(args["input"]), args["sigma"],
            args["model_options"],
        )  # fmt: skip
        return (x0 + scale * (degraded - again)).to(args["denoised"])

    return guided(model)
