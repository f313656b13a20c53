"""Stand-ins of what other packs do to a model, by kind: each takes one, and returns one."""

from __future__ import annotations

import comfy.controlnet
import comfy.samplers
import torch
from host_models import noise_like
from stand_ins import WRAPPERS, exchanged, patched, shipped, wrapped

# What is done to a step, or to its predictions.


@patched("sampler_pre_cfg_function")
def altered_before_cfg(args):
    """As adaptive projected guidance, latent operations, skimmed cfg."""
    return [out.mul_(0.9) if n == 0 else out for n, out in enumerate(args["conds_out"])]


def _noisy(cond, sigma):
    text = cond["model_conds"]["c_crossattn"]
    noise = noise_like(text.cond.shape, int(1000 * float(sigma[0])) % 977)
    other = type(text)(text.cond + 0.5 * noise)
    return {**cond, "model_conds": {**cond["model_conds"], "c_crossattn": other}}


@patched("sampler_calc_cond_batch_function")
def noise_on_prompts(args):
    """As condition-annealed sampling: the node evaluates the conds itself, with other prompts."""
    options = {**args["model_options"]}
    options.pop("sampler_calc_cond_batch_function")
    sigma = args["sigma"]
    conds = [side and [_noisy(cond, sigma) for cond in side] for side in args["conds"]]
    return comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], sigma, options)


@patched("sampler_post_cfg_function")
def momentum(args):
    """As momentum and sliding-mode controllers: state kept in the model's options."""
    options = args["model_options"]
    before = options.get("momentum", torch.zeros_like(args["denoised"]))
    options["momentum"] = 0.5 * before + 0.1 * args["denoised"]
    inner = options["transformer_options"]
    inner["steps seen"] = inner.get("steps seen", 0) + 1
    return args["denoised"] + options["momentum"]


@wrapped(WRAPPERS.PREDICT_NOISE, outside=True)
def functions_in_conditions(executor, x, timestep, options, seed):
    """A node that wraps each post-CFG function in a condition of its own."""
    names = options.get("sampler_post_cfg_function", ())
    functions = [lambda args, one=one: one(args) for one in names]
    return executor(x, timestep, {**options, "sampler_post_cfg_function": functions}, seed)


def wrappers_dropped(model):
    """A node that overwrites the wrappers of a model."""
    model = model.clone()
    model.wrappers = {}
    return model


@wrapped(WRAPPERS.PREDICT_NOISE)
def calls_twice(executor, x, timestep, options, seed):
    """As samplers with a corrector: the whole evaluation runs twice in a step."""
    first = executor(x, timestep, options, seed)
    return 0.5 * (first + executor(0.9 * x, timestep, options, seed))


# What is done to a call of the model.


@patched("unet_function_wrapper")
def in_pieces(apply_model, args):
    """As nodes that tile: each piece in a call of its own."""
    halves = args["input"].chunk(2, dim=-1)
    return torch.cat([apply_model(x, args["timestep"], **args["c"]) for x in halves], dim=-1)


@patched("unet_function_wrapper")
def regrouped(apply_model, args):
    """As nodes that tile: the pieces of all conds in one call, piece by piece."""
    pieces, c = torch.cat(args["input"].chunk(2, dim=-1)), dict(args["c"])
    c["c_crossattn"] = c["c_crossattn"].repeat(2, 1, 1)
    c["y"] = c["y"].repeat(2, 1)
    out = apply_model(pieces, args["timestep"].repeat(2), **c)
    return torch.cat(out.chunk(2), dim=-1)


def turned(inputs):
    """Return inputs of the network with the rows of each tensor in the opposite order."""
    return {n: v.flip(0) if torch.is_tensor(v) and v.ndim else v for n, v in inputs.items()}


@patched("unet_function_wrapper")
def turned_outside(apply_model, args):
    """As nodes that put the sides in an order of their own, under the labels as they were."""
    return apply_model(**turned({"x": args["input"], "t": args["timestep"], **args["c"]})).flip(0)


@wrapped(WRAPPERS.DIFFUSION_MODEL)
def turned_inside(executor, *args, **kwargs):
    """As the above, inside of the model call."""
    return executor(*turned(dict(enumerate(args))).values(), **turned(kwargs)).flip(0)


@wrapped(WRAPPERS.CALC_COND_BATCH)
def one_by_one(executor, model, conds, x, timestep, options):
    """As nodes with windows of their own: the evaluation runs for each part of the latent."""
    parts = [executor(model, conds, part, timestep, options) for part in x.chunk(2, dim=-1)]
    return [torch.cat(outs, dim=-1) for outs in zip(*parts, strict=True)]


@patched("attn2_patch")
def reads_the_label(q, k, v, options):
    """As image prompts and attention couples: one side of cfg attends to something else."""
    sides = options["cond_or_uncond"]
    scale = torch.tensor([1.5 if side == 0 else 0.5 for side in sides], dtype=v.dtype)
    return q, k, v * scale.repeat_interleave(len(q) // len(sides))[:, None, None]


@wrapped(WRAPPERS.DIFFUSION_MODEL)
def runs_twice(executor, x, *args, **kwargs):
    """As reference-only nets: a reference image first, then the picture, in one call."""
    reference = executor(0.5 * x, *args, **kwargs)
    return executor(x + 0.1 * reference, *args, **kwargs)


class ActsThroughOptions(comfy.controlnet.ControlBase):
    """A ControlNet that gives nothing, and patches the network through the options instead."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        patches = dict(transformer_options.get("patches", {}))
        patches["attn2_patch"] = [lambda q, k, v, extra: (1.3 * q, k, v)]
        transformer_options["patches"] = patches


@exchanged("forward")
def another_forward(network, _):
    """As code for one family: a forward in the network's place, which runs no wrappers."""

    def forward(x, timesteps=None, context=None, y=None, control=None, transformer_options=None,
                **kwargs):  # fmt: skip
        options = transformer_options
        return 1.1 * network._forward(x, timesteps, context, y, control, options, **kwargs)

    return forward


@exchanged("forward")
def around_forward(_network, forward):
    """As hooks of libraries: a function around the network's forward."""
    return lambda *args, **kwargs: 1.1 * forward(*args, **kwargs)


# Caches.


@exchanged("_forward")
def cache_inside(network, forward):
    """As caches of features: code in the network's place, which remembers under each label."""

    def run(x, *args, **kwargs):
        options = next(v for v in (*args, *kwargs.values()) if isinstance(v, dict))
        sides = options["cond_or_uncond"]
        state = vars(network).setdefault("known", {})
        known = [state.setdefault(side, {"calls": 0, "residual": None}) for side in sides]
        for one in known:
            one["calls"] += 1
        if all(one["calls"] % 2 == 0 and one["residual"] is not None for one in known):
            return x + torch.cat([one["residual"] for one in known])
        out = forward(x, *args, **kwargs)
        for one, residual in zip(known, (out - x).chunk(len(sides)), strict=True):
            one["residual"] = residual
        return out

    return run


class CachedBlocks(torch.nn.Module):
    """Blocks of which every second run is answered from what the last one gave."""

    def __init__(self, blocks, state):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)
        self.state = state

    def forward(self, img, txt, **kwargs):
        img, txt = self.blocks[0](img=img, txt=txt, **kwargs)
        known = self.state.pop("known", None)
        if known is not None and known[0].shape == img.shape:
            self.state["hits"] = self.state.get("hits", 0) + 1
            return img + known[0], txt + known[1]
        first = img.clone(), txt.clone()
        for block in self.blocks[1:]:
            img, txt = block(img=img, txt=txt, **kwargs)
        self.state["known"] = img - first[0], txt - first[1]
        return img, txt


def cache_around_blocks(state):
    """As caches of the first block: a module in the blocks' place, its state in a closure."""
    return exchanged("double_blocks")(
        lambda _network, blocks: torch.nn.ModuleList([CachedBlocks(blocks, state)])
    )


def cache_in_a_closure(state):
    """As caches that keep nothing on the network: every second call of one size is answered."""

    def cached(_network, forward):
        def run(x, *rest, **kwargs):
            known = state.pop("known", None)
            if known is not None and known.shape == x.shape:
                state["hits"] = state.get("hits", 0) + 1
                return x + known
            out = forward(x, *rest, **kwargs)
            state["known"] = out - x
            return out

        return run

    return exchanged("_forward")(cached)


KINDS = {
    "predictions altered before cfg": altered_before_cfg,
    "adaptive projected guidance": shipped("apg", "APG", eta=0.5, norm_threshold=5.0, momentum=0.3),
    "tangential damping": shipped("tcfg", "TCFG"),
    "prompts altered by an own evaluation": noise_on_prompts,
    "pieces, one call each": in_pieces,
    "pieces regrouped in one call": regrouped,
    "rows in another order": turned_outside,
    "rows in another order inside of the call": turned_inside,
    "parts evaluated one by one": one_by_one,
    "effects by side": reads_the_label,
    "attention made of both sides": shipped(
        "nag", "NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5
    ),
    "state in the model's options": momentum,
    "functions in conditions": functions_in_conditions,
    "wrappers dropped": wrappers_dropped,
    "the network twice in a call": runs_twice,
    "two evaluations in a step": calls_twice,
    # At a threshold at which it answers wherever it may.
    "a cache of steps": shipped("easycache", "EasyCacheNode", 3.0, 0.2, 0.9, verbose=False),
    "a cache inside the network": cache_inside,
    "another forward": another_forward,
    "a function around the forward": around_forward,
}
