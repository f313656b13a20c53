"""The family of perturbations the slow way: hooks of the tests' own around a whole extra pass.

Independent of the code under test: blocks are known by their modules, what goes through them by
the shapes of tensors, and the guidance is a post-CFG function of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import math

import comfy.samplers
import torch
from host_models import PACK

NODES = {
    "SEG": ("seg", "SEGuidance"),
    "PAG": ("pag", "SEGuidancePAG"),
    "SAG": ("sag", "SEGuidanceSAG"),
    "TPG": ("tpg", "SEGuidanceTPG"),
    "SLG": ("slg", "SEGuidanceSLG"),
}


def guide(method, model, scale=1.0, start=0.0, end=1.0, **widgets):
    """Return a model that is guided by one of the pack's nodes."""
    module, name = NODES[method]
    node = getattr(importlib.import_module(f"{PACK}.nodes.{module}"), name)
    if method == "SEG":
        widgets = {"infinite_blur": True, "blur_sigma": 10.0} | widgets
    if method == "SAG":
        widgets = {"blur_sigma": 2.0} | {k: v for k, v in widgets.items() if k != "reuse"}
    return node.execute(model, scale=scale, start_percent=start, end_percent=end, **widgets)[0]


def guided_by_hand(model, worse, scale=1.0, side="cond"):
    """Return a model guided away from predictions under `worse(step)`, a context of hooks.

    Args:
        model: the model to guide.
        worse: takes the number of the step, from 1.
        scale: guidance weight.
        side: `"cond"`, `"uncond"`, or `"free"`, in which the uncond prediction is the worse one.
    """
    steps = []

    def guide(args):
        steps.append(None)
        options = args["model_options"].copy()
        conds = args["uncond" if side == "free" else side]
        with worse(len(steps)):
            (bad,) = comfy.samplers.calc_cond_batch(
                args["model"], [conds], args["input"], args["sigma"], options
            )
        if side == "free":
            return bad + (args["cond_scale"] + scale) * (args["cond_denoised"] - bad)
        return args["denoised"] + scale * (args[side + "_denoised"] - bad)

    guided = model.clone()
    guided.set_model_sampler_post_cfg_function(guide)
    return guided


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

    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def permuted(modules, matrices):
    """Multiply the tokens that enter each module by a permutation matrix of its own.

    Args:
        modules: the modules.
        matrices: for each, a function of the argument's tokens that returns the whole matrix,
            or None for tensors that are not the image's.
    """

    def hook(matrix):
        def before(_module, args, kwargs):
            def shuffled(value):
                if isinstance(value, tuple):  # pictures and sound
                    return tuple(map(shuffled, value))
                if not torch.is_tensor(value) or value.ndim < 3:
                    return value
                tokens = value.flatten(1, -2)
                whole = matrix(tokens)
                if whole is None:
                    return value
                return torch.einsum("ij,bjc->bic", whole.to(tokens), tokens).reshape(value.shape)

            named = {k: shuffled(v) if torch.is_tensor(v) else v for k, v in kwargs.items()}
            return tuple(map(shuffled, args)), named

        return before

    handles = [
        module.register_forward_pre_hook(hook(matrix), with_kwargs=True)
        for module, matrix in zip(modules, matrices, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def transformer_blocks(model, *places):
    """Return transformer blocks of a tiny UNet by part, block and layer."""
    network = model.model.diffusion_model
    parts = {"d": network.input_blocks, "m": [network.middle_block], "u": network.output_blocks}
    found = []
    for part, index, layer in places:
        spatial = [
            one
            for block in parts[part]
            for one in block
            if type(one).__name__.startswith("Spatial") and hasattr(one, "transformer_blocks")
        ]
        found.append(spatial[index].transformer_blocks[layer])
    return found


# Self-Attention Guidance.


def blurred_by_loops(image, sigma):
    """Return planes blurred by 9 taps of a Gaussian, fewer on short axes, reflected at borders."""
    for axis in (-2, -1):
        n = image.shape[axis]
        taps = min(9, n - (n % 2 - 1))
        half = taps // 2
        weights = [math.exp(-0.5 * ((t - half) / sigma) ** 2) for t in range(taps)]
        lines = []
        for i in range(n):
            total = 0
            for t, weight in enumerate(weights):
                j = i + t - half
                j = -j if j < 0 else 2 * (n - 1) - j if j >= n else j
                total = total + weight * image.select(axis, j)
            lines.append(total / sum(weights))
        image = torch.stack(lines, axis)
    return image


def blurred_where_attended(model, attention, scale, sigma):
    """Return a model guided away from what it predicts where its own prediction was blurred.

    Args:
        model: the model to guide, at cfg 1.
        attention: returns the attention over the latent that was seen since the last time, 1 on
            average.
        scale: guidance weight.
        sigma: blur width in latent cells.
    """

    def guide(args):
        x0, x = args["cond_denoised"].double(), args["input"].double()
        mask = (attention() > 1.0).double().expand_as(x0)
        assert 0 < mask.mean() < 1
        degraded = mask * blurred_by_loops(x0, sigma) + (1 - mask) * x0
        (again,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], (x + degraded - x0).to(args["input"]), args["sigma"],
            args["model_options"],
        )  # fmt: skip
        return (x0 + scale * (degraded - again)).to(args["denoised"])

    guided = model.clone()
    guided.set_model_sampler_post_cfg_function(guide)
    return guided
