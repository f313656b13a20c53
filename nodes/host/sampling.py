"""The guidance of one model: a run of sampling, a step of it, and what holds them together.

State lives in the `Run` of one sampling call and the `Step` of one model evaluation; both travel in
`transformer_options`, so two runs, clones or devices never meet. Nothing outlives the run.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ...seg_core import BlurMatrices
from .branch import KEY, Branch
from .call import Call, with_apply_wrapper
from .passes import MainPass, PerturbedPass
from .perturbation import Perturbation, Site
from .prefix import Prefix
from .recorder import Recorder, recorder_of
from .report import Report

log = logging.getLogger(__name__)


class Run:
    """One sampling call: what is decided, cached and counted once for all of its steps."""

    def __init__(self, model_sampling: Any, recorder: Recorder | None = None) -> None:
        self.model_sampling = model_sampling
        self.recorder = recorder
        """What a probe records; None without a probe."""
        self.report = Report()
        self.matrices = BlurMatrices()
        self.wanted: dict[Branch, set[Hashable]] = {}
        self.masses: dict[Hashable, dict[Any, Any]] = {}
        self._windows: dict[Branch, tuple[float, float]] = {}
        self._uuids: dict[tuple[Branch, Hashable], Hashable] = {}
        self._originals: dict[Hashable, Hashable] = {}

    def site(self, branch: Branch, rows: list[slice] | None = None) -> Site:
        """Return what a perturbation needs to know during one model call."""
        look = None if self.recorder is None else self.recorder.look(branch)
        return Site(self.matrices, rows, look)

    def private_uuid(self, branch: Branch, original: Hashable) -> Hashable:
        """Return a branch's own, stable identity of a cond, so that no cache answers for it."""
        key = (branch, original)
        if key not in self._uuids:
            self._uuids[key] = uuid.uuid4()
            self._originals[self._uuids[key]] = original
        return self._uuids[key]

    def original_uuid(self, private: Hashable) -> Hashable:
        """Return the cond identity that a private one stands for."""
        return self._originals.get(private, private)

    def active(self, branches: list[Branch], timestep: torch.Tensor) -> tuple[Branch, ...]:
        """Return the branches whose window holds this noise level."""
        if all(b.window.covers_everything for b in branches):
            return tuple(branches)
        noise_sigma = float(timestep.flatten()[0])
        return tuple(b for b in branches if b.window.contains(noise_sigma, *self._edges(b)))

    def _edges(self, branch: Branch) -> tuple[float, float]:
        # Asked of the host once a run: its answer may wait for the device.
        if branch not in self._windows:
            at = self.model_sampling.percent_to_sigma
            window = branch.window
            self._windows[branch] = (at(window.start_percent), at(window.end_percent))
        return self._windows[branch]


class Step:
    """One evaluation of the guided model: the main pass, then one perturbed pass per branch."""

    def __init__(self, run: Run, active: tuple[Branch, ...], guider: Any = None) -> None:
        self.run = run
        self.active = active
        self.guider = guider
        self.x: torch.Tensor | None = None
        self.model_options: dict[str, Any] = {}
        self.prefix = Prefix()
        self.in_main_pass = False

    def main_options(self, model_options: dict[str, Any], x: torch.Tensor) -> dict[str, Any]:
        """Return the options for the main pass, under which it keeps what branches reuse."""
        self.x = x
        self.model_options = model_options
        self.in_main_pass = True
        # Another node's own evaluation of the conds may do anything with the latent.
        self.prefix.open = "sampler_calc_cond_batch_function" not in model_options
        compiled = not any(
            b.side == "free" or b.perturbation.watches_main_pass for b in self.active
        )
        options = with_apply_wrapper(model_options, MainPass(self), apply_model, compiled=compiled)
        # Whatever other guidance nodes evaluate after the main pass must not be mistaken for it.
        for name, result in _HOOKS_AFTER_MAIN.items():
            options[name] = [self._main_ends(result), *model_options.get(name, ())]
        return options

    def _main_ends(self, result: str) -> Callable[[dict[str, Any]], Any]:
        def main_pass_ended(args: dict[str, Any]) -> Any:
            self.in_main_pass = self.prefix.open = False
            return args[result]

        return main_pass_ended

    def predict(
        self, branch: Branch, args: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the ordinary and the perturbed prediction that a branch compares."""
        side = self._side(branch, args)
        if side == "free":
            self.run.report.guided[branch] += 1
            return args["cond_denoised"], args["uncond_denoised"]
        conds, prediction = _SIDES[side]
        if args[conds] is None:  # DualCFGGuider at cfg 1 and 1: the report says it had no effect
            self.run.report.guided[branch] += 1
            return None
        self.run.wanted[branch] = {cond["uuid"] for cond in args[conds]}
        start = branch.perturbation.start(self, args, args[conds], args[prediction])
        if start is None:
            return None
        self.run.report.guided[branch] += 1
        perturbed = self._perturbed(branch, args, args[conds], start.x)
        if start.reference is not args[prediction]:
            perturbed = args[prediction] + (perturbed - start.reference)
        return args[prediction], perturbed

    def _perturbed(
        self, branch: Branch, args: dict[str, Any], conds: list[dict[str, Any]], x: torch.Tensor
    ) -> torch.Tensor:
        different = "" if branch.reuse else "reuse is off"
        if x is not args["input"]:
            different = "it starts from another latent"
        elif x is not self.x:
            different = different or "another node changed the latent"
        perturbed_pass = PerturbedPass(self, branch, different=different)
        options = with_apply_wrapper(
            args["model_options"], perturbed_pass, apply_model, compiled=False
        )
        (perturbed,) = comfy.samplers.calc_cond_batch(
            args["model"], [perturbed_pass.conds(conds)], x, args["sigma"], options
        )
        return perturbed

    def _side(self, branch: Branch, args: dict[str, Any]) -> str:
        if branch.side == "conditional" or args["uncond"] is not None:
            return branch.side
        label = branch.perturbation.label
        if branch.side == "free":
            raise ValueError(
                f"{label}: branch 'free' perturbs the unconditional prediction, and at cfg 1 there "
                "is none. Raise cfg above 1, or set branch to 'conditional'."
            )
        self.run.report.warn_once(
            f"{label}: at cfg 1 there is no unconditional prediction, so branch 'unconditional' "
            "guides the only prediction there is."
        )
        return "conditional"

    def wanted(self, branch: Branch) -> set[Hashable]:
        """Return the conds whose main pass a branch needs: last step's, or the likely ones."""
        known = self.run.wanted.get(branch)
        return self.likely(branch) if known is None else known

    def watched(self, perturbation: Perturbation) -> set[Hashable] | None:
        """Return the conds whose main pass a perturbation must see; None for all of them."""
        known = [self.run.wanted.get(b) for b in self.active if b.perturbation is perturbation]
        return known[0]

    def likely(self, branch: Branch) -> set[Hashable]:
        """Return the conds that a branch perturbs under the guiders that ComfyUI ships."""
        name = "positive" if branch.side == "conditional" else "negative"
        conds = getattr(self.guider, "conds", {}).get(name) or ()
        return {cond["uuid"] for cond in conds}

    def close(self) -> None:
        """Let go of everything that was kept."""
        self.prefix.clear()
        self.x = None
        self.model_options = {}


_SIDES = {
    "conditional": ("cond", "cond_denoised"),
    "unconditional": ("uncond", "uncond_denoised"),
}
_HOOKS_AFTER_MAIN = {
    "sampler_pre_cfg_function": "conds_out",
    "sampler_post_cfg_function": "denoised",
}


def step_of(args: dict[str, Any]) -> Step | None:
    """Return the step that a post-CFG call belongs to; None where guidance is not active."""
    model_options = args["model_options"]
    held = model_options["transformer_options"].get(KEY)
    if isinstance(held, Run) and held.report.steps:
        return None
    if held is not None and not isinstance(held, Run):
        return held.step
    # A guider that runs none of the host's PREDICT_NOISE wrappers: nothing was kept.
    run = held or Run(args["model"].model_sampling)
    return Step(run, run.active(branches_of(model_options), args["sigma"]))


def branches_of(model_options: dict[str, Any]) -> list[Branch]:
    """Return the branches of a model, in the order in which they act."""
    return [f for f in model_options.get("sampler_post_cfg_function", ()) if isinstance(f, Branch)]


def apply_model(
    executor: Callable[..., torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: torch.Tensor | None = None,
    c_crossattn: torch.Tensor | None = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Wrap one model call of the host for the pass that it belongs to."""
    options = transformer_options or {}
    call = Call(executor, x, t, c_concat, c_crossattn, control, options, kwargs)
    return options[KEY].apply(call)


def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap one sampling call of the host: begin a run, and end it whatever happens."""
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]
    recorder = recorder_of(guider.model_options)
    run = Run(guider.model_patcher.get_model_object("model_sampling"), recorder)
    options[KEY] = run
    try:
        result = executor(*args, **kwargs)
        run.report.finish(branches_of(guider.model_options))
        if recorder is not None:
            recorder.finish(result, branches_of(guider.model_options), run.report)
        return result
    finally:
        options.pop(KEY, None)


def predict_noise(
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
    with run.recorder.step(timestep, run.report) if run.recorder is not None else nullcontext():
        if not active:
            return executor(x, timestep, model_options, seed)
        tell_apart(executor.class_obj)
        step = Step(run, active, executor.class_obj)
        try:
            return executor(x, timestep, step.main_options(model_options, x), seed)
        finally:
            step.close()


def tell_apart(guider: Any) -> None:
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


def attach(model: Any, branch: Branch) -> Any:
    """Return a clone of a model that a branch guides; the model itself stays as it is."""
    patched = with_run(model)
    patched.set_model_sampler_post_cfg_function(branch)
    return patched


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


def with_run(model: Any) -> Any:
    """Return a clone of a model whose sampling calls are runs, guided or not."""
    patched = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
    ):
        patched.remove_wrappers_with_key(kind, KEY)  # one for all branches of the model
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched
