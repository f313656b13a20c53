"""Stand-ins of what other packs do to a model, by kind: each takes one, and returns one."""

from __future__ import annotations

from unittest import mock

import comfy.controlnet
import comfy.patcher_extension
import comfy.samplers
import torch
from host_models import noise_like
from reuse_checks import core_node

WRAPPERS = comfy.patcher_extension.WrappersMP


def wrapped(kind, wrapper, *, outside=False):
    """Return what puts a wrapper of the host on a model, inside or outside of those it has."""

    def around(model):
        model = model.clone()
        if outside:
            others = dict(model.wrappers.get(kind, {}))
            model.wrappers[kind] = {"test": [wrapper], **others}
        else:
            model.add_wrapper_with_key(kind, "test", wrapper)
        return model

    return around


def altered_before_cfg(model):
    """As adaptive projected guidance, latent operations, skimmed cfg."""
    model = model.clone()
    model.set_model_sampler_pre_cfg_function(
        lambda args: [out.mul_(0.9) if n == 0 else out for n, out in enumerate(args["conds_out"])]
    )
    return model


def noise_on_prompts(model):
    """As condition-annealed sampling: the node evaluates the conds itself, with other prompts."""

    def evaluate(args):
        options = {**args["model_options"]}
        options.pop("sampler_calc_cond_batch_function")
        conds = []
        for side in args["conds"]:
            noisy = []
            for cond in side or ():
                changed = dict(cond["model_conds"])
                text = changed["c_crossattn"].cond
                noise = noise_like(text.shape, int(1000 * float(args["sigma"][0])) % 977)
                changed["c_crossattn"] = type(changed["c_crossattn"])(text + 0.5 * noise)
                noisy.append({**cond, "model_conds": changed})
            conds.append(noisy if side is not None else None)
        return comfy.samplers.calc_cond_batch(
            args["model"], conds, args["input"], args["sigma"], options
        )

    model = model.clone()
    model.model_options["sampler_calc_cond_batch_function"] = evaluate
    return model


def in_pieces(model):
    """As nodes that tile: each piece in a call of its own."""

    def pieces(apply_model, args):
        x, t, c = args["input"], args["timestep"], args["c"]
        half = x.shape[-1] // 2
        parts = (x[..., :half], x[..., half:])
        return torch.cat([apply_model(part, t, **c) for part in parts], dim=-1)

    model = model.clone()
    model.set_model_unet_function_wrapper(pieces)
    return model


def regrouped(model):
    """As nodes that tile: the pieces of all conds in one call, piece by piece."""

    def together(apply_model, args):
        x, t, c = args["input"], args["timestep"], dict(args["c"])
        half = x.shape[-1] // 2
        c["c_crossattn"] = c["c_crossattn"].repeat(2, 1, 1)
        c["y"] = c["y"].repeat(2, 1)
        out = apply_model(torch.cat([x[..., :half], x[..., half:]]), t.repeat(2), **c)
        return torch.cat(out.chunk(2), dim=-1)

    model = model.clone()
    model.set_model_unet_function_wrapper(together)
    return model


def reads_the_label(model):
    """As image prompts and attention couples: one side of cfg attends to something else."""

    def attention(q, k, v, options):
        sides = options["cond_or_uncond"]
        size = len(q) // len(sides)
        scale = torch.tensor([1.5 if side == 0 else 0.5 for side in sides], dtype=v.dtype)
        return q, k, v * scale.repeat_interleave(size)[:, None, None]

    model = model.clone()
    model.set_model_attn2_patch(attention)
    return model


def momentum(model):
    """As momentum and sliding-mode controllers: state kept in the model's options."""

    def push(args):
        options = args["model_options"]
        before = options.get("momentum", torch.zeros_like(args["denoised"]))
        options["momentum"] = 0.5 * before + 0.1 * args["denoised"]
        options["transformer_options"]["steps seen"] = (
            options["transformer_options"].get("steps seen", 0) + 1
        )
        return args["denoised"] + options["momentum"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(push)
    return model


def _in_conditions(executor, x, timestep, options, seed):
    names = options.get("sampler_post_cfg_function", ())
    functions = [lambda args, one=one: one(args) for one in names]
    return executor(x, timestep, {**options, "sampler_post_cfg_function": functions}, seed)


def functions_in_conditions(model):
    """A node that wraps each post-CFG function in a condition of its own."""
    return wrapped(WRAPPERS.PREDICT_NOISE, _in_conditions, outside=True)(model)


def wrappers_dropped(model):
    """A node that overwrites the wrappers of a model."""
    model = model.clone()
    model.wrappers = {}
    return model


def runs_twice(model):
    """As reference-only nets: a reference image first, then the picture, in one call."""

    def twice(executor, x, *args, **kwargs):
        reference = executor(0.5 * x, *args, **kwargs)
        return executor(x + 0.1 * reference, *args, **kwargs)

    return wrapped(WRAPPERS.DIFFUSION_MODEL, twice)(model)


def calls_twice(model):
    """A node that evaluates the model twice in a step, and takes the second."""

    def twice(executor, x, timestep, options, seed):
        executor(0.9 * x, timestep, options, seed)
        return executor(x, timestep, options, seed)

    return wrapped(WRAPPERS.PREDICT_NOISE, twice)(model)


def easy_cache(model):
    """ComfyUI's cache of steps, at a threshold at which it answers wherever it may."""
    widgets = {"reuse_threshold": 3.0, "start_percent": 0.2, "end_percent": 0.9}
    return core_node("nodes_easycache", "EasyCacheNode", model, **widgets, verbose=False)


def apg(model):
    """ComfyUI's adaptive projected guidance."""
    return core_node("nodes_apg", "APG", model, eta=0.5, norm_threshold=5.0, momentum=0.3)


def perp_cfg(model):
    """ComfyUI's tangential damping of cfg."""
    return core_node("nodes_tcfg", "TCFG", model)


def both_sides(model):
    """ComfyUI's NAG: the attention of one side of cfg is made of that of both."""
    widgets = {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}
    return core_node("nodes_nag", "NAGuidance", model, **widgets)


class ActsThroughOptions(comfy.controlnet.ControlBase):
    """A ControlNet that gives nothing, and patches the network through the options instead."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        del x_noisy, t, cond, batched_number
        patches = dict(transformer_options.get("patches", {}))
        patches["attn2_patch"] = [lambda q, k, v, extra: (1.3 * q, k, v)]
        transformer_options["patches"] = patches


def exchanging(model, name, make):
    """Return a model whose network has something else under a name, for the length of each call.

    Args:
        model: the model.
        name: of the network's attribute.
        make: is given the network and what it has there.
    """

    def run(apply_model, args):
        network = model.model.diffusion_model
        other = make(network, getattr(network, name))
        with mock.patch.object(network, name, other):
            return apply_model(args["input"], args["timestep"], **args["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(run)
    return model


def cache_inside(model):
    """As caches of features: code in the network's place, which remembers under each label."""

    def cached(network, forward):
        def run(x, *args, **kwargs):
            options = next(v for v in (*args, *kwargs.values()) if isinstance(v, dict))
            sides = options["cond_or_uncond"]
            size = len(x) // len(sides)
            rows = [slice(n * size, (n + 1) * size) for n in range(len(sides))]
            state = vars(network).setdefault("known", {})
            known = [state.setdefault(side, {"calls": 0, "residual": None}) for side in sides]
            for one in known:
                one["calls"] += 1
            if all(one["calls"] % 2 == 0 and one["residual"] is not None for one in known):
                return torch.cat([x[r] + k["residual"] for r, k in zip(rows, known, strict=True)])
            out = forward(x, *args, **kwargs)
            for row, one in zip(rows, known, strict=True):
                one["residual"] = out[row] - x[row]
            return out

        return run

    return exchanging(model, "_forward", cached)


class CachedBlocks(torch.nn.Module):
    """Blocks of which every second run but the first is answered from what the last one gave."""

    def __init__(self, blocks, state):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)
        self.state = state

    def forward(self, img, txt, **kwargs):
        state = self.state
        state["runs"] = state.get("runs", 0) + 1
        img, txt = self.blocks[0](img=img, txt=txt, **kwargs)
        known = state.get("known")
        if state["runs"] % 2 == 0 and known is not None and known[0].shape == img.shape:
            state["hits"] = state.get("hits", 0) + 1
            return img + known[0], txt + known[1]
        first = img.clone(), txt.clone()
        for block in self.blocks[1:]:
            img, txt = block(img=img, txt=txt, **kwargs)
        state["known"] = img - first[0], txt - first[1]
        return img, txt


def cache_around_blocks(model, state):
    """As caches of the first block: a module in the blocks' place, its state in a closure."""

    def cached(network, blocks):
        del network
        return torch.nn.ModuleList([CachedBlocks(blocks, state)])

    return exchanging(model, "double_blocks", cached)


def cache_in_a_closure(model, state):
    """As caches that keep nothing on the network: every second call of one size is answered."""

    def cached(network, forward):
        del network

        def run(x, *rest, **kwargs):
            known = state.pop("known", None)
            if known is not None and known.shape == x.shape:
                state["hits"] = state.get("hits", 0) + 1
                return x + known
            out = forward(x, *rest, **kwargs)
            state["known"] = out - x
            return out

        return run

    return exchanging(model, "_forward", cached)


def another_forward(model):
    """As code for one family: a forward in the network's place, which runs no wrappers."""

    def own(network, _):
        def forward(x, timesteps=None, context=None, y=None, control=None,
                    transformer_options=None, **kwargs):  # fmt: skip
            options = transformer_options
            return 1.1 * network._forward(x, timesteps, context, y, control, options, **kwargs)

        return forward

    return exchanging(model, "forward", own)


def around_forward(model):
    """As hooks of libraries: a function around the network's forward."""
    return exchanging(model, "forward", lambda _, forward: lambda *a, **k: 1.1 * forward(*a, **k))


KINDS = {
    "predictions altered before cfg": altered_before_cfg,
    "adaptive projected guidance": apg,
    "tangential damping": perp_cfg,
    "prompts altered by an own evaluation": noise_on_prompts,
    "pieces, one call each": in_pieces,
    "pieces regrouped in one call": regrouped,
    "effects by side": reads_the_label,
    "attention made of both sides": both_sides,
    "state in the model's options": momentum,
    "functions in conditions": functions_in_conditions,
    "wrappers dropped": wrappers_dropped,
    "the network twice in a call": runs_twice,
    "two evaluations in a step": calls_twice,
    "a cache of steps": easy_cache,
    "a cache inside the network": cache_inside,
    "another forward": another_forward,
    "a function around the forward": around_forward,
}
