"""The post-CFG function of ComfyUI that a branch becomes: what it compares, and what it adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch

from ....seg_core import apply_guidance
from ..calls.call import KEY, with_apply_wrapper
from ..settings.branch import Branch
from ..settings.perturbation import InputBlur
from .passes import apply_model
from .perturbed_pass import PerturbedPass
from .run import Run
from .saliency import blurred_start
from .step import Step

Args = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Guidance:
    """Guides each prediction of a model by one branch."""

    branch: Branch

    def __call__(self, args: Args) -> torch.Tensor:
        """Guide one prediction; outside the window `denoised` itself comes back."""
        branch, step = self.branch, step_of(args)
        if branch not in step.run.active([branch], args["sigma"]):
            return args["denoised"]
        recorder = step.run.recorder
        if recorder is not None:
            recorder.begin(branch, args, step.run.report.counts(branch))
        compared = _compared(branch, step, args)
        if compared is None:
            return args["denoised"]
        prediction, perturbed = compared
        guided = apply_guidance(
            args["denoised"],
            prediction,
            perturbed,
            branch.scale,
            rescale=branch.rescale,
            rescale_mode=branch.rescale_mode,
            cond=args["cond_denoised"],
            uncond=args["uncond_denoised"] if args["uncond"] is not None else None,
        )
        if recorder is not None:
            recorder.guided(branch, args, guided, step.run.report.counts(branch))
        return guided


def step_of(args: Args) -> Step:
    """Return the step that a post-CFG call belongs to."""
    model_options = args["model_options"]
    held = model_options["transformer_options"].get(KEY)
    if held is not None and not isinstance(held, Run):
        return held.step
    # A guider that runs none of the host's PREDICT_NOISE wrappers, or a node that hides us in a
    # function of its own: nothing joined the plain calls.
    run = held or Run(args["model"].model_sampling)
    model_options["transformer_options"][KEY] = run  # the host's copy for this sampling call
    return Step(run, run.active(branches_of(model_options), args["sigma"]))


def branches_of(model_options: dict[str, Any]) -> list[Branch]:
    """Return the branches of a model, in the order in which they act."""
    functions = model_options.get("sampler_post_cfg_function", ())
    return [function.branch for function in functions if isinstance(function, Guidance)]


def _compared(branch: Branch, step: Step, args: Args) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the ordinary and the perturbed prediction that a branch compares."""
    run = step.run
    step.asked.add(branch)
    run.called[branch] = None
    run.report.guided.setdefault(branch, 0)
    run.idle.discard(branch)
    side = _side(branch, run, args)
    if side is None or _misses_main_pass(branch, step):
        return None
    run.wanted[branch] = {cond["uuid"] for cond in args[side] or ()}
    if args[side] is None:  # as DualCFGGuider at cfg 1 and 1; the report says it had no effect
        run.report.guided[branch] += 1
        return None
    if step.has_main_pass and not step.labels:
        run.report.warn_once(
            f"{branch.perturbation.label}: another node ran the network by itself in a step, out "
            "of reach. It pauses there."
        )
        return None
    prediction = step.prediction(args, side)
    compared = step.prediction(args, "cond") if branch.side == "free" else prediction
    if prediction is None or compared is None or not torch.is_tensor(args["denoised"]):
        run.report.warn_once(
            f"{branch.perturbation.label}: the sampler made no {side} prediction in a step, so "
            "there is nothing to compare. It pauses there."
        )
        return None
    if branch.side == "free":
        if step.freed.isdisjoint(run.wanted[branch]):
            run.report.warn_once(
                f"{branch.perturbation.label}: which prompts this guider compares is known after "
                "its first evaluation. Branch 'free' begins there."
            )
            return None
        run.report.guided[branch] += 1
        return compared, prediction
    return _with_perturbed(branch, step, args, side, prediction)


def _with_perturbed(
    branch: Branch, step: Step, args: Args, side: str, prediction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a prediction, and the one that is made with the perturbation at work."""
    x, reference = args["input"], prediction
    if isinstance(branch.perturbation, InputBlur):
        start = blurred_start(branch.perturbation, step.run, args, args[side], prediction)
        if start is None:
            return None
        x, reference = start
    with step.run.memories.of(branch, args["model"].diffusion_model):
        perturbed = _perturbed(branch, step, args, side, x)
    if branch.joins and step.run.memories.may_answer(step.run.report.steps):
        if not step.run.report.was_reached(branch):
            return None
    elif step.run.report.reached_nothing(branch):
        step.run.dead.add(branch)
        return None
    step.run.report.guided[branch] += 1
    if reference is not prediction:
        perturbed = prediction + (perturbed - reference)
    return prediction, perturbed


def _misses_main_pass(branch: Branch, step: Step) -> bool:
    """Tell whether a branch acts in the plain predictions, and another node keeps it out."""
    acts_there = branch.side == "free" or branch.watches
    if step.has_main_pass or (step.run.report.steps and not acts_there):
        return False
    label = branch.perturbation.label
    effect = "has no effect: it acts in the plain predictions" if acts_there else "is slower"
    step.run.report.warn_once(
        f"{label} {effect}, because another node has taken this pack's sampling wrappers off the "
        "model. Put that node before this one."
    )
    return acts_there


def _side(branch: Branch, run: Run, args: Args) -> str | None:
    """Return whose conds a branch perturbs, `cond` or `uncond`; None if it has to pause."""
    if branch.side == "conditional" or args["uncond"] is not None:
        return "cond" if branch.side == "conditional" else "uncond"
    label = branch.perturbation.label
    if branch.side == "free" and run.report.guided[branch]:
        run.report.warn_once(
            f"{label}: cfg has fallen to 1, where there is no unconditional prediction. Branch "
            "'free' pauses there."
        )
        return None
    if branch.side == "free":
        raise ValueError(
            f"{label}: branch 'free' perturbs the unconditional prediction, and at cfg 1 there "
            "is none. Raise cfg above 1, or set branch to 'conditional'."
        )
    run.report.warn_once(
        f"{label}: at cfg 1 there is no unconditional prediction, so branch 'unconditional' "
        "guides the only prediction there is."
    )
    return "cond"


def _perturbed(branch: Branch, step: Step, args: Args, side: str, x: torch.Tensor) -> torch.Tensor:
    different = "" if branch.reuse else "reuse is off"
    if x is not args["input"]:
        different = "it starts from another latent"
    elif step.has_main_pass and x is not step.input:
        different = different or "another node evaluates the model twice in a step"
    perturbed_pass = PerturbedPass(step, branch, different=different)
    options = with_apply_wrapper(args["model_options"], perturbed_pass, apply_model, compiled=False)
    # Under the label that the plain pass gave these conds: others go by it.
    known = (step.labels[c["uuid"]] for c in args[side] if c["uuid"] in step.labels)
    label = next(known, int(side == "uncond"))
    sides: list[Any] = [None] * (1 + max(1, label, *step.labels.values()))
    others = args["uncond" if side == "cond" else "cond"] or []
    mates = perturbed_pass.mates(args[side], others, options["transformer_options"])
    for at in {step.labels[cond["uuid"]] for cond in mates}:
        same = [cond for cond in mates if step.labels[cond["uuid"]] == at]
        sides[at] = perturbed_pass.conds(same)
    sides[label] = perturbed_pass.conds(args[side])
    options = _in_the_same_step(options)
    evaluate = options.get("sampler_calc_cond_batch_function")
    if evaluate is None:
        return comfy.samplers.calc_cond_batch(args["model"], sides, x, args["sigma"], options)[
            label
        ]
    # Another node evaluates the conds in its own way: these too.
    own = {"conds": sides, "input": x, "sigma": args["sigma"], "model": args["model"]}
    return evaluate({**own, "model_options": options})[label]


def _in_the_same_step(options: dict[str, Any]) -> dict[str, Any]:
    """Return options without the node that would begin a step of ComfyUI's EasyCache anew.

    A step that it answered from its cache stays one: either both predictions come from there, or
    neither does. Their difference would else hold the error of the cache, times the scale.
    """
    transformer = options["transformer_options"]
    wrappers = transformer.get("wrappers", {})
    others = {k: fns for k, fns in wrappers.get("calc_cond_batch", {}).items() if k != "easycache"}
    wrappers = {**wrappers, "calc_cond_batch": others}
    return {**options, "transformer_options": {**transformer, "wrappers": wrappers}}
