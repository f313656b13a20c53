"""The post-CFG function of ComfyUI that a branch becomes: what it compares, and what it adds."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch

from ....seg_core import apply_guidance, effective_cfg
from ..batch.call import KEY
from ..settings.branch import Branch
from ..settings.errors import GuidanceError
from ..settings.perturbation import InputBlur
from .perturbed_pass import PerturbedPass
from .report import report_of
from .run import Run
from .saliency import blurred_start
from .state import BranchState
from .step import Evaluation, Step

Args = dict[str, Any]
_PATIENCE = 3


class _InactiveError(Exception):
    """A branch does not act on a prediction; says why, unless that was said."""


@dataclass(frozen=True, eq=False)
class Guidance:
    """Guides each prediction of a model by one branch."""

    branch: Branch

    def __call__(self, args: Args) -> torch.Tensor:
        """Guide one prediction; outside the window `denoised` itself comes back."""
        branch, run = self.branch, _run_of(args, self.branch)
        state = run.state(branch)
        if state not in run.active([branch], args["sigma"]):
            return args["denoised"]
        step = run.step or _step_of(run, args)
        try:
            prediction, perturbed = _Comparison(state, step, args).predictions()
        except _InactiveError as pause:
            if pause.args:
                run.report.warn_once(f"{state.label} pauses: {pause}.")
            return args["denoised"]
        denoised, cond, uncond = args["denoised"], args["cond_denoised"], args["uncond_denoised"]
        if args["uncond"] is None or not torch.is_tensor(uncond):
            uncond = None  # guiders without one hand on a number, or the cond in its place
        guided = apply_guidance(
            denoised,
            prediction,
            perturbed,
            branch.scale,
            rescale=branch.rescale,
            rescale_mode=branch.rescale_mode,
            cond=cond,
            uncond=uncond,
        )
        other = cond if uncond is None or branch.side == "free" else uncond
        state.effects.append(effective_cfg(denoised, guided, cond, other))
        if run.recorder is not None:
            run.recorder.guided(branch, args, guided, state.counts, state.effects[-1])
        return guided


def branches_of(model_options: dict[str, Any]) -> list[Branch]:
    """Return the branches of a model, in the order in which they act."""
    functions = model_options.get("sampler_post_cfg_function", ())
    return [function.branch for function in functions if isinstance(function, Guidance)]


def _run_of(args: Args, branch: Branch) -> Run:
    """Return the run that a post-CFG call belongs to.

    A guider may run none of the host's wrappers, or another node may have taken ours off the model:
    nothing joined the base predictions then, and each evaluation is a run of its own.
    """
    run = args["model_options"].get(KEY)
    is_first = branch in branches_of(args["model_options"])[:1]
    if not isinstance(run, Run):
        run = Run(args["model"].model_sampling)
        run.report = report_of(args["model"], run.noise_sigma(args["sigma"]), begins=is_first)
    if is_first and not run.is_intercepted:
        run.report.count_evaluation()
    return run


def _step_of(run: Run, args: Args) -> Step:
    """Return the step of a post-CFG call outside of those that this pack's wrapper begins."""
    active = run.active(branches_of(args["model_options"]), args["sigma"])
    return Step(run, active, args["input"], args["model_options"])


@dataclass(frozen=True)
class _Comparison:
    """What one branch compares in one evaluation."""

    state: BranchState
    step: Step
    args: Args

    def predictions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ordinary and the perturbed prediction.

        Raises:
            _InactiveError: if there is nothing to compare.
        """
        state, step, args = self.state, self.step, self.args
        is_later = 0 < state.asked < step.number
        state.asked, state.unused = step.number, False
        side = self._side()
        self._require_interception()
        before, state.wanted = state.wanted, {cond["uuid"] for cond in args[side] or ()}
        if is_later and before and state.wanted and before.isdisjoint(state.wanted):
            step.run.report.explain_other_prompts(state)
        if args[side] is None:  # as DualCFGGuider at cfg 1 and 1
            raise _InactiveError(f"this guider makes no {side} prediction at this cfg")
        self._require_evaluation(side)
        evaluation = step.evaluation(args["input"])
        prediction = step.prediction(evaluation, args, side)
        free = state.branch.side == "free"
        compared = step.prediction(evaluation, args, "cond") if free else prediction
        if prediction is None or compared is None or not torch.is_tensor(args["denoised"]):
            raise _InactiveError(f"the sampler made no {side} prediction in a step")
        if free and step.perturbed.isdisjoint(state.wanted):
            unknown = "which prompts this guider compares is known after its first evaluation"
            cut = "another node cuts the batch or reorders it: prompts cannot be told apart"
            raise _InactiveError(cut if step.is_cut else unknown)
        if not free:
            return prediction, self._perturbed(side, prediction, evaluation)
        self._require_reach()
        return compared, prediction

    def _perturbed(
        self, side: str, prediction: torch.Tensor, evaluation: Evaluation
    ) -> torch.Tensor:
        """Return the perturbed prediction: computed, or by the difference that is held."""
        state, step = self.state, self.step
        if state.branch.every == 1 or evaluation is not step.evaluations[0]:
            return self._computed(side, prediction, evaluation)
        conds = self._active_conds(side)
        held = state.holding.take(conds)
        if held is not None:
            self._count()
            state.held += 1
            return prediction - held
        perturbed = self._computed(side, prediction, evaluation)
        state.holding.keep(prediction - perturbed, conds)
        return perturbed

    def _computed(
        self, side: str, prediction: torch.Tensor, evaluation: Evaluation
    ) -> torch.Tensor:
        """Return what is predicted in the place of a prediction with the perturbation at work."""
        state, step = self.state, self.step
        args = {**self.args, "model": evaluation.model(self.args, side)}
        branch, x, reference = state.branch, evaluation.latent, prediction
        different = "" if branch.reuse else "reuse is off"
        if evaluation is not step.evaluations[0]:
            different = different or "another node evaluates the model twice in a step"
        elif state.holding.stands_in:
            different = different or "other prompts are active than when it was held"
        if isinstance(branch.perturbation, InputBlur):
            different = "it starts from another latent"
            own = {**args, "input": x}
            start = blurred_start(branch.perturbation, step.run, own, args[side], prediction)
            if start is None:
                raise _InactiveError
            x, reference = start
        with step.run.memory.of(branch, args["model"].diffusion_model):
            perturbed = PerturbedPass(step, state, different=different).evaluate(args, side, x)
        self._require_reach()
        return perturbed if reference is prediction else prediction + (perturbed - reference)

    def _require_reach(self) -> None:
        """Count the evaluation if the perturbation was at work, and pause if it was not."""
        state, step = self.state, self.step
        if state.branch.perturbation.targets and not state.hits:
            state.misses += 1
            # Code in the network's place may answer single evaluations from a cache.
            if state.misses >= (_PATIENCE if step.run.memory.is_rewritten else 1):
                step.run.report.explain_misses(state)
            raise _InactiveError
        self._count()

    def _count(self) -> None:
        """Count the evaluation as guided."""
        if self.state not in self.step.guided:
            self.step.guided.add(self.state)
            self.state.guided += 1

    def _require_interception(self) -> None:
        """Warn where another node keeps a branch out of the base predictions."""
        state, step, branch = self.state, self.step, self.state.branch
        needed = branch.acts_in_base
        if step.guider is not None or not (needed or branch.joins or branch.every > 1):
            return
        effect = "has no effect: it acts in the base predictions" if needed else "is slower"
        effect += ", and makes its prediction in every step" if branch.every > 1 else ""
        if needed or step.run.report.evaluations <= 1:
            step.run.report.warn_once(
                f"{state.label} {effect}, because another node has taken this pack's sampling "
                "wrappers off the model. Put that node before this one."
            )
        if needed:
            raise _InactiveError

    def _side(self) -> str:
        """Return whose conds a branch perturbs, `cond` or `uncond`."""
        state, branch = self.state, self.state.branch
        if branch.side == "conditional" or self.args["uncond"] is not None:
            return "cond" if branch.side == "conditional" else "uncond"
        if branch.side == "free" and state.guided:
            raise _InactiveError("cfg has fallen to 1, where there is no unconditional prediction")
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

    def _require_evaluation(self, side: str) -> None:
        """Pause if no prompt of a side was evaluated in this step."""
        step = self.step
        if not self._active_conds(side):
            raise _InactiveError(f"no prompt of its side ({side}) is active in a step")
        if step.guider is None or step.labels:
            return
        if not step.together:
            raise _InactiveError("another node answered for the model or ran it by itself")
        if self.state.branch.acts_in_base:
            raise _InactiveError("another node evaluates the prompts without naming them")

    def _active_conds(self, side: str) -> frozenset[Hashable]:
        """Return the prompts of a side that take part at this noise level."""
        args, area = self.args, comfy.samplers.get_area_and_mult
        active = (c for c in args[side] if area(c, args["input"], args["sigma"]) is not None)
        return frozenset(cond["uuid"] for cond in active)
