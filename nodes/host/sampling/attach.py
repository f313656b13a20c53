"""What holds guidance to a model: the sampling wrappers of ComfyUI, and a clone that has them."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Hashable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ..calls.call import KEY, with_apply_wrapper
from ..probe.probe import PROBES, Probe
from ..probe.recorder import recorder_of
from ..settings.branch import Branch
from .guidance import Guidance, branches_of
from .main_pass import MainPass
from .passes import apply_model
from .run import Run
from .step import Step

log = logging.getLogger(__name__)
_SEED = 7
"""Where the seed stands among the arguments of the host's OUTER_SAMPLE."""
_HOOKS_AFTER_MAIN = {
    "sampler_pre_cfg_function": "conds_out",
    "sampler_post_cfg_function": "denoised",
}


def guided(model: Any, branch: Branch, no_effect: str = "") -> Any:
    """Return a clone of a model that a branch guides, or a plain one where that does nothing.

    Args:
        model: the model, which stays as it is.
        branch: the guidance; at scale 0 it does nothing.
        no_effect: another cause for which it does nothing; a warning names it.
    """
    cause = "scale is 0." if branch.scale == 0 else no_effect
    if cause:
        log.warning("%s has no effect: %s", branch.perturbation.label, cause)
        return model.clone()
    return attach(model, branch)


def attach(model: Any, branch: Branch) -> Any:
    """Return a clone of a model that a branch guides; the model itself stays as it is."""
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
    options = guider.model_options["transformer_options"]
    recorder = recorder_of(guider.model_options)
    seed = kwargs.get("seed", args[_SEED] if len(args) > _SEED else None)
    run = Run(guider.model_patcher.get_model_object("model_sampling"), recorder, seed)
    options[KEY] = run
    try:
        result = executor(*args, **kwargs)
        branches = list(dict.fromkeys([*branches_of(guider.model_options), *run.called]))
        run.report.finish(branches)
        if recorder is not None:
            recorder.finish(result, branches, run.report.warnings)
        return result
    finally:
        run.memories.clear()
        options.pop(KEY, None)


def _predict_noise(
    executor: Any,
    x: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any] | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """Wrap one evaluation of the guided model: outside every window it runs untouched."""
    model_options = model_options or {}
    run = model_options.get("transformer_options", {}).get(KEY)
    if not isinstance(run, Run):
        return executor(x, timestep, model_options, seed)
    run.report.count_step()
    active = run.active(branches_of(model_options), timestep)
    with run.recorder.step(timestep) if run.recorder is not None else nullcontext():
        if not active:
            return executor(x, timestep, model_options, seed)
        _tell_apart(executor.class_obj)
        step = Step(run, active, executor.class_obj)
        model = executor.class_obj.inner_model
        if any(branch.perturbation.targets or branch.watches for branch in active):
            run.view_of(model)  # as it is outside of what other nodes do for the length of a call
        run.memories.begin_step(model.diffusion_model)
        ours = _main_options(step, model_options, x)
        try:
            return executor(x, timestep, ours, seed)
        finally:
            step.close()
            _hand_back(ours, model_options, set(_HOOKS_AFTER_MAIN))
            _hand_back(ours["transformer_options"], model_options["transformer_options"], set())


def _main_options(step: Step, model_options: dict[str, Any], x: torch.Tensor) -> dict[str, Any]:
    """Return the options for the plain predictions, whose calls the perturbed ones join."""
    step.begin_main_pass(model_options, x)
    compiled = not any(b.side == "free" or b.watches for b in step.active)
    options = with_apply_wrapper(model_options, MainPass(step), apply_model, compiled=compiled)

    def ended(result: str, args: dict[str, Any]) -> Any:
        if step.in_main_pass:
            step.run.memories.end_plain(args["model"].diffusion_model)
        step.end_main_pass(args)
        return args[result]

    # Whatever other guidance nodes evaluate after the main pass must not be mistaken for it.
    for name, result in _HOOKS_AFTER_MAIN.items():
        options[name] = [partial(ended, result), *model_options.get(name, ())]
    return options


def _hand_back(ours: dict[str, Any], theirs: dict[str, Any], hooks: set[str]) -> None:
    """Keep what other nodes wrote into the options of a step, and nothing of ours."""
    for key in (set(ours) | set(theirs)) - hooks - {"transformer_options", "wrappers", KEY}:
        if key not in ours:
            del theirs[key]
        elif key not in theirs or theirs[key] is not ours[key]:
            theirs[key] = ours[key]


def _tell_apart(guider: Any) -> None:
    """Give each cond of a run an identity of its own.

    Where one prompt has an area and the other has none, the host copies a cond of the one to the
    other side together with its uuid. The dictionaries belong to this run alone.
    """
    seen = set[Hashable]()
    for conds in getattr(guider, "conds", {}).values():
        for cond in conds or ():
            if cond["uuid"] in seen:
                cond["uuid"] = uuid.uuid4()
            seen.add(cond["uuid"])
