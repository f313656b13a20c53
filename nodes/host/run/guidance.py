"""The post-CFG function of ComfyUI that a branch becomes: what it compares, and what it adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import comfy.samplers
import torch

from ....seg_core import apply_guidance
from ..batch.call import KEY
from ..settings.branch import Branch
from ..settings.errors import GuidanceError
from ..settings.perturbation import InputBlur
from .perturbed_pass import PerturbedPass
from .report import Report
from .run import Run
from .saliency import blurred_start
from .state import BranchState
from .step import Evaluation, Step

Args = dict[str, Any]
Compared = tuple[torch.Tensor, torch.Tensor]
_PATIENCE = 3


@dataclass(frozen=True, eq=False)
class Guidance:
    """Guides each prediction of a model by one branch."""

    branch: Branch

    def __call__(self, args: Args) -> torch.Tensor:
        """Guide one prediction; outside the window `denoised` itself comes back."""
        branch, step = self.branch, _step_of(args)
        run = step.run
        state = run.state(branch)
        if state not in run.active([branch], args["sigma"]):
            return args["denoised"]
        compared = _Comparison(state, step, args).predictions()
        if compared is None:
            return args["denoised"]
        prediction, perturbed = compared
        uncond = args["uncond_denoised"]
        guided = apply_guidance(
            args["denoised"],
            prediction,
            perturbed,
            branch.scale,
            rescale=branch.rescale,
            rescale_mode=branch.rescale_mode,
            cond=args["cond_denoised"],
            # Guiders without an uncond hand on a number, or the cond in its place.
            uncond=uncond if args["uncond"] is not None and torch.is_tensor(uncond) else None,
        )
        if run.recorder is not None:
            run.recorder.guided(branch, args, guided, state.counts)
        return guided


def branches_of(model_options: dict[str, Any]) -> list[Branch]:
    """Return the branches of a model, in the order in which they act."""
    functions = model_options.get("sampler_post_cfg_function", ())
    return [function.branch for function in functions if isinstance(function, Guidance)]


def _step_of(args: Args) -> Step:
    """Return the step that a post-CFG call belongs to.

    A guider may run none of the host's wrappers, or another node may have taken ours off the model:
    nothing joined the base predictions then. The run is kept in the host's copy of the options for
    one sampling call, which alone knows its noise levels, and never in a model's own.
    """
    model_options = args["model_options"]
    run = model_options.get(KEY)
    if isinstance(run, Run) and run.step is not None:
        return run.step
    if not isinstance(run, Run):
        run = Run(args["model"].model_sampling)
        if "sample_sigmas" in model_options["transformer_options"]:
            model_options[KEY] = run
        else:
            run.report = _report_of(args)
    active = run.active(branches_of(model_options), args["sigma"])
    return Step(run, active, args["input"], model_options)


_reports: WeakKeyDictionary[Any, tuple[float, Report]] = WeakKeyDictionary()


def _report_of(args: Args) -> Report:
    """Return what was said of a model's run so far; a run begins where the noise level rises."""
    sigma = float(args["sigma"].flatten()[0])
    before, report = _reports.get(args["model"], (0.0, Report()))
    report = report if sigma < before else Report()
    _reports[args["model"]] = sigma, report
    return report


@dataclass(frozen=True)
class _Comparison:
    """What one branch compares in one evaluation."""

    state: BranchState
    step: Step
    args: Args

    def predictions(self) -> Compared | None:
        """Return the ordinary and the perturbed prediction; None where there is nothing to do."""
        state, step, args = self.state, self.step, self.args
        step.asked.add(state)
        state.seen, state.unused = True, False
        side = self._side()
        if side is None or not self._is_intercepted():
            return None
        state.wanted = {cond["uuid"] for cond in args[side] or ()}
        if args[side] is None:  # as DualCFGGuider at cfg 1 and 1; the report says it had no effect
            state.explained = not state.guided
            self._pause(f"this guider makes no {side} prediction at this cfg")
            return None
        if not self._is_active(side):
            return None
        evaluation = step.evaluation(args["input"])
        prediction = step.prediction(evaluation, args, side)
        free = state.branch.side == "free"
        compared = step.prediction(evaluation, args, "cond") if free else prediction
        if prediction is None or compared is None or not torch.is_tensor(args["denoised"]):
            self._pause(f"the sampler made no {side} prediction in a step")
            return None
        if not free:
            return self._with_perturbed(side, prediction, evaluation)
        if step.perturbed.isdisjoint(state.wanted):
            self._pause("which prompts this guider compares is known after its first evaluation")
            return None
        return (compared, prediction) if self._is_reached() else None

    def _with_perturbed(
        self, side: str, prediction: torch.Tensor, evaluation: Evaluation
    ) -> Compared | None:
        """Return a prediction, and the one that is made with the perturbation at work."""
        state, step, args = self.state, self.step, self.args
        branch, x, reference = state.branch, evaluation.latent, prediction
        different = "" if branch.reuse else "reuse is off"
        if evaluation is not step.evaluations[0]:
            different = different or "another node evaluates the model twice in a step"
        if isinstance(branch.perturbation, InputBlur):
            different = "it starts from another latent"
            own = {**args, "input": x}
            start = blurred_start(branch.perturbation, step.run, own, args[side], prediction)
            if start is None:
                return None
            x, reference = start
        with step.run.memory.of(branch, args["model"].diffusion_model):
            perturbed = PerturbedPass(step, state, different=different).evaluate(args, side, x)
        if not self._is_reached():
            return None
        if reference is not prediction:
            perturbed = prediction + (perturbed - reference)
        return prediction, perturbed

    def _is_reached(self) -> bool:
        """Tell whether the perturbation was at work, and count the evaluation if it was."""
        state, step = self.state, self.step
        # Code in the network's place may answer single evaluations from a cache.
        if not state.reaches(_PATIENCE if step.run.memory.is_rewritten else 1):
            if state.unreachable:
                step.run.report.explain_misses(state)
            return False
        if state not in step.guided:
            step.guided.add(state)
            state.guided += 1
        return True

    def _is_intercepted(self) -> bool:
        """Tell whether a branch can act, and warn where another node keeps it out."""
        state, step = self.state, self.step
        acts_in_base = state.branch.side == "free" or state.branch.needs_saliency
        if step.is_intercepted:
            return True
        effect = "has no effect: it acts in the base predictions" if acts_in_base else "is slower"
        if acts_in_base or not step.run.report.evaluations:
            step.run.report.warn_once(
                f"{state.label} {effect}, because another node has taken this pack's sampling "
                "wrappers off the model. Put that node before this one."
            )
        return not acts_in_base

    def _side(self) -> str | None:
        """Return whose conds a branch perturbs, `cond` or `uncond`; None if it has to pause."""
        state, branch = self.state, self.state.branch
        if branch.side == "conditional" or self.args["uncond"] is not None:
            return "cond" if branch.side == "conditional" else "uncond"
        if branch.side == "free" and state.guided:
            self._pause("cfg has fallen to 1, where there is no unconditional prediction")
            return None
        if branch.side == "free":
            raise GuidanceError(
                f"{state.label}: branch 'free' perturbs the unconditional prediction, and at cfg 1 "
                "there is none. Raise cfg above 1, or set branch to 'conditional'."
            )
        self.step.run.report.warn_once(
            f"{state.label}: at cfg 1 there is no unconditional prediction, so branch "
            "'unconditional' guides the only prediction there is."
        )
        return "cond"

    def _is_active(self, side: str) -> bool:
        """Tell whether any prompt of a side was evaluated in this step, and say why not."""
        step, args = self.step, self.args
        placed = (
            comfy.samplers.get_area_and_mult(cond, args["input"], args["sigma"])
            for cond in args[side]
        )
        if all(one is None for one in placed):
            self._pause(f"no prompt of its side ({side}) is active in a step")
            return False
        if not step.is_intercepted or step.labels:
            return True
        acts_in_base = self.state.branch.side == "free" or self.state.branch.needs_saliency
        if step.is_anonymous and not acts_in_base:
            return True
        if step.is_anonymous:
            self._pause("another node evaluates the prompts without naming them")
        else:
            self._pause("another node ran the network by itself in a step, out of reach")
        return False

    def _pause(self, why: str) -> None:
        """Say once why a branch does not act in a step."""
        self.step.run.report.warn_once(f"{self.state.label} pauses: {why}.")
