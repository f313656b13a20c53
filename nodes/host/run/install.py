"""What holds guidance to a model: the sampling wrappers of ComfyUI, and a clone that has them."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ..batch.call import KEY
from ..probe.probe import PROBES, Probe
from ..probe.recorder import Recorder
from ..settings.branch import Branch
from ..settings.perturbation import InputBlur
from .base_pass import BasePass
from .compat import expected_conds, tell_conds_apart
from .guidance import Guidance, branches_of
from .run import Run
from .saliency import require_picture
from .step import Step

log = logging.getLogger(__name__)
_SEED = 7
"""Where the seed stands among the arguments of the host's OUTER_SAMPLE."""


def guided(model: Any, branch: Branch, no_effect: str = "") -> Any:
    """Return a clone of a model that a branch guides, or a plain one where that does nothing.

    Args:
        model: the model, which stays as it is.
        branch: the guidance; at scale 0 it does nothing.
        no_effect: another cause for which it does nothing; a warning names it.

    Raises:
        GuidanceError: if it blurs a picture, and the model makes none.
    """
    if isinstance(branch.perturbation, InputBlur):
        require_picture(model, branch.perturbation)
    cause = "scale is 0." if branch.scale == 0 else no_effect
    if cause:
        log.warning("%s has no effect: %s", branch.perturbation.label, cause)
        return model.clone()
    if branch.side == "free" and branch.every > 1:
        log.warning(
            "%s: every has no effect with branch 'free', which makes no extra prediction.",
            branch.perturbation.label,
        )
    patched = _with_run(model)
    patched.set_model_sampler_post_cfg_function(Guidance(branch))
    return patched


def watch(model: Any, probe: Probe) -> Any:
    """Return a clone of a model that fills a probe when it samples."""
    watched = _with_run(model)
    options = watched.model_options
    options[PROBES] = [*options.get(PROBES, ()), probe]
    return watched


def _with_run(model: Any) -> Any:
    """Return a clone of a model whose sampling calls are runs, guided or not."""
    patched = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.PREDICT_NOISE, _predict_noise),
    ):
        patched.remove_wrappers_with_key(kind, KEY)  # one for all branches of the model
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap one sampling call of the host: begin a run, and end it whatever happens."""
    guider = executor.class_obj
    before = guider.model_options
    recorder = Recorder(before[PROBES]) if PROBES in before else None
    seed = kwargs.get("seed", args[_SEED] if len(args) > _SEED else None)
    shape = getattr(args[0] if args else kwargs.get("noise"), "shape", None)
    run = Run(guider.model_patcher.get_model_object("model_sampling"), recorder, seed, shape)
    guider.model_options = _installed(before, run)
    try:
        result = executor(*args, **kwargs)
        states = run.states(branches_of(before))
        run.report.finish(states)
        if recorder is not None:
            branches = [state.branch for state in states]
            lines = tuple(run.report.line(state) for state in states if state.guided)
            recorder.finish(result, branches, lines=lines, warnings=run.report.warnings)
        return result
    finally:
        guider.model_options = before
        run.clear()


def _installed(model_options: dict[str, Any], run: Run) -> dict[str, Any]:
    """Return the options of one sampling call, in which a run meets every call of the model.

    The pre-CFG function stands first, so that the run sees what was evaluated before anybody alters
    it, and does not take what other guidance nodes evaluate later for a base prediction. Guiders
    that evaluate by themselves run none: their predictions are seen where the host evaluates them,
    outside of what other nodes do there to all predictions, perturbed ones too.
    """

    def evaluated(executor: Any, model: Any, conds: Any, x: torch.Tensor, *rest: Any) -> Any:
        outs = executor(model, conds, x, *rest)
        if isinstance(run.current, BasePass):
            run.current.step.evaluated(model, conds, x, outs)
        return outs

    def before_cfg(args: dict[str, Any]) -> Any:
        if isinstance(run.current, BasePass):
            run.current.step.end_base_pass(args)
        return args["conds_out"]

    def after_cfg(args: dict[str, Any]) -> Any:
        if run.step is not None:
            run.step.in_base_pass = False
        return args["denoised"]

    hooks = {"sampler_pre_cfg_function": before_cfg, "sampler_post_cfg_function": after_cfg}
    own = {name: [hook, *model_options.get(name, ())] for name, hook in hooks.items()}
    met = run.met_in(model_options)
    wrappers = met["transformer_options"]["wrappers"]
    kind = WrappersMP.CALC_COND_BATCH
    wrappers[kind] = {KEY: [evaluated], **wrappers.get(kind, {})}
    return {**met, KEY: run, **own}


def _predict_noise(
    executor: Any,
    x: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any] | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """Wrap one evaluation of the guided model."""
    model_options = model_options or {}
    run = model_options.get(KEY)
    if not isinstance(run, Run):
        return executor(x, timestep, model_options, seed)
    run.is_intercepted = True
    run.report.count_evaluation()
    with run.recorder.step(timestep) if run.recorder is not None else nullcontext():
        active = run.active(branches_of(model_options), timestep)
        if not active:
            return executor(x, timestep, model_options, seed)
        for state in active:
            if state.branch.every > 1:
                state.holding.begin(x, run.noise_sigma(timestep))
        step = Step(run, active, x, model_options, executor.class_obj)
        _begin(step)
        with run.during(BasePass(step)):
            out = executor(x, timestep, model_options, seed)
        step.close()
        return out


def _begin(step: Step) -> None:
    """Look at a step's prompts and network before anything is evaluated in it."""
    run, model = step.run, step.guider.inner_model
    tell_conds_apart(step.guider)
    for state in step.active:
        if not state.asked:
            state.wanted = expected_conds(step.guider, state.branch)
    branches = [state.branch for state in step.active]
    if any(branch.perturbation.targets or branch.needs_saliency for branch in branches):
        run.network_of(model)  # as it is outside of what other nodes do for the length of a call
    run.memory.begin(model.diffusion_model)
