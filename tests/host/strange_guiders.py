"""Stand-ins of guiders and evaluations of other packs: each says which real thing it stands for."""

from __future__ import annotations

import copy
import functools
import uuid
from unittest import mock

import comfy.model_patcher
import comfy.samplers
import torch
from dit_models import prompt, shape_of
from host_models import conditioning, noise_like, tiny_model
from stand_ins import patched

LATENT = (1, 4, 6, 8)


def sampled_by(guider_class, model, *, cfg=4.0, steps=3, kind="sdxl", sampler=None, sigmas=None):
    """Sample by a guider, as `SamplerCustomAdvanced` does, and return the latents.

    Args:
        guider_class: of the guider, which has two prompts.
        model: a tiny model.
        cfg: of the guider.
        steps: how many.
        kind: of the model: `sdxl`, or a key of `TINY`.
        sampler: Euler's if None.
        sigmas: noise levels; by the simple schedule if None.
    """
    shape = LATENT if kind == "sdxl" else shape_of(kind)
    guider = guider_class(model)
    guider.set_conds(*(_prompt(kind, shape, seed) for seed in (1, 2)))
    guider.set_cfg(cfg)
    if sigmas is None:
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    sampler = sampler or comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(noise_like(shape), torch.zeros(shape), sampler, sigmas)


def _prompt(kind, shape, seed):
    return conditioning(seed) if kind == "sdxl" else prompt(kind, shape, seed)


class ByHand(comfy.samplers.CFGGuider):
    """A guider that evaluates its conds, and runs the post-CFG functions, by itself."""

    shown = staticmethod(lambda x, result: x)
    """What it shows the functions as the latent of the step."""
    times = 1
    """How often it runs them on one evaluation."""

    def evaluated(self, x, timestep, options):
        """Return the predictions of both sides; without cfg, the number 0 for the second."""
        sides = [self.conds["positive"], self.conds["negative"]][: 1 + (self.cfg != 1)]
        outs = comfy.samplers.calc_cond_batch(self.inner_model, sides, x, timestep, options)
        return [*outs, 0][:2]

    def further(self, cond, x, timestep, options):
        """Return what is added besides cfg."""
        return 0

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        cond, uncond = self.evaluated(x, timestep, model_options)
        result = uncond + (cond - uncond) * self.cfg
        result = result + self.further(cond, x, timestep, model_options)
        args = {"cond": self.conds["positive"], "uncond": self.conds["negative"],
                "cond_denoised": cond, "uncond_denoised": uncond, "cond_scale": self.cfg,
                "model": self.inner_model, "sigma": timestep, "model_options": model_options,
                "input": self.shown(x, result)}  # fmt: skip
        for function in model_options.get("sampler_post_cfg_function", []) * self.times:
            result = function({**args, "denoised": result})
        return result


class ShowsItsResult(ByHand):
    """As guiders of video packs: what post-CFG functions are shown as `input` is the result."""

    shown = staticmethod(lambda x, result: result)


class AltersByItself(ByHand):
    """As guiders that rescale or skim a prediction before cfg, of a latent of their own."""

    def evaluated(self, x, timestep, options):
        cond, uncond = super().evaluated(x.clone(), timestep, options)
        return [0.9 * cond, uncond]


class EvaluatesElsewhere(ByHand):
    """As samplers with a corrector of their own: the latent that they show is not evaluated."""

    def evaluated(self, x, timestep, options):
        return super().evaluated(0.9 * x, timestep, options)


class BlendsTwoModels(ByHand):
    """As guiders that blend the predictions of two models of a kind; the guided one is second."""

    def evaluated(self, x, timestep, options):
        own, self.inner_model = self.inner_model, another_model()
        others = super().evaluated(x, timestep, options)
        self.inner_model = own
        outs = super().evaluated(x, timestep, options)
        return [0.5 * (one + other) for one, other in zip(outs, others, strict=True)]


@functools.cache
def another_model():
    """Return the loaded model of another checkpoint."""
    patcher = tiny_model("sdxl", seed=5, dtype=torch.float64)
    patcher.model.current_patcher = patcher
    return patcher.model


class RunsFunctionsTwice(ByHand):
    """As guiders that apply cfg twice to one evaluation: at two strengths, or in two places."""

    times = 2


class SkipsByItself(ByHand):
    """As LTX-Video's STG guider: a skipped prediction of its own follows the plain ones.

    What it skips is the second double block of a Flux, or the attention in a UNet's middle block.
    """

    def further(self, cond, x, timestep, options):
        own = comfy.model_patcher.create_model_options_clone(options)
        replace = comfy.model_patcher.set_model_options_patch_replace
        replace(own, lambda q, k, v, extra: torch.zeros_like(q), "attn1", "middle", 0)
        replace(own, lambda args, extra: dict(args), "dit", "double_block", 1)
        side = [self.conds["positive"]]
        (worse,) = comfy.samplers.calc_cond_batch(self.inner_model, side, x, timestep, own)
        return 0.5 * (cond - worse)


class HandsOnZeros(ByHand):
    """As guiders that hand on zeros for a prediction that they have not evaluated."""

    def evaluated(self, x, timestep, options):
        return [super().evaluated(x, timestep, options)[0], torch.zeros_like(x)]


class HandsInTheModelsOptions(comfy.samplers.CFGGuider):
    """As samplers that evaluate with the patcher's own options, and not with the run's copy."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        own = self.model_patcher.model_options
        conds = self.conds["negative"], self.conds["positive"]
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, *conds, self.cfg, model_options=own, seed=seed
        )


class RunsNoWrappers(comfy.samplers.CFGGuider):
    """As guiders that evaluate outside of the host's wrappers of a step."""

    def outer_predict_noise(self, x, timestep, model_options=None, seed=None):
        return self.predict_noise(x, timestep, model_options or {}, seed)


class HandsOnFunctionsAlone(comfy.samplers.CFGGuider):
    """As samplers that make options of their own, with the functions of cfg and nothing else."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        own = {n: v for n, v in model_options.items() if n.startswith("sampler_")}
        return super().predict_noise(x, timestep, own, seed)


class CopiesTheOptions(comfy.samplers.CFGGuider):
    """As nodes that change the options of a step in a deep copy."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        return super().predict_noise(x, timestep, copy.deepcopy(model_options), seed)


class NamesPromptsAnew(comfy.samplers.CFGGuider):
    """As guiders that make their prompts anew in each step, with identities of their own."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        renamed = {n: [{**c, "uuid": uuid.uuid4()} for c in v] for n, v in self.conds.items()}
        with mock.patch.object(self, "conds", renamed):
            return super().predict_noise(x, timestep, model_options, seed)


class BreaksOff(comfy.samplers.CFGGuider):
    """A guider that fails between its two plain calls, as for a prompt that cannot be used."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        side = [self.conds["positive"]]
        comfy.samplers.calc_cond_batch(self.inner_model, side, x, timestep, model_options)
        raise RuntimeError("the second prompt cannot be used")


@patched("sampler_cfg_function")
def in_place(args):
    """As cfg functions that save memory: what they compute they write into the step's latent."""
    result = args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]
    args["input"].mul_(0.8).add_(0.01)
    return result


@patched("sampler_calc_cond_batch_function")
def older_evaluation(args):
    """As copies of an older `calc_cond_batch`: the network is told of no uuids."""
    x, options = args["input"], args["model_options"]
    chosen = [
        (side, comfy.samplers.get_area_and_mult(cond, x, args["sigma"]))
        for side, conds in enumerate(args["conds"])
        for cond in conds or ()
    ]
    outs = [torch.zeros_like(x) for _ in args["conds"]]
    told = {**options["transformer_options"], "sigmas": args["sigma"]}
    told["cond_or_uncond"] = [side for side, _ in chosen]
    c = comfy.samplers.cond_cat([one.conditioning for _, one in chosen])
    sigma = args["sigma"].repeat(len(chosen))
    latents = torch.cat([one.input_x for _, one in chosen])
    out = args["model"].apply_model(latents, sigma, **c, transformer_options=told)
    for (side, _), one in zip(chosen, out.chunk(len(chosen)), strict=True):
        outs[side] = outs[side] + one
    return outs
