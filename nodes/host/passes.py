"""The two kinds of pass in a step: the main one, which is recorded, and the perturbed one."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch

from .branch import Branch
from .call import COMPILE_KEY, Call, place_of, signature
from .perturbation import Site
from .prefix import Control, Kept, NotReusable, joined_control

if TYPE_CHECKING:
    from .sampling import Step


class MainPass:
    """The ordinary predictions: computed untouched, and kept where a branch will need them."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def apply(self, call: Call) -> torch.Tensor:
        """Run one model call of the main pass."""
        if not self.step.in_main_pass:
            return call.run()
        if self.step.prefix.open:
            self._record(call)
        for branch in self.step.active:
            branch.perturbation.watch(call, self.step)
        sites = [(b, self._perturb_uncond(call, b)) for b in self.step.active if b.side == "free"]
        out = call.run()
        for branch, site in sites:
            self.step.run.report.reached(branch, site)
        return out

    def _perturb_uncond(self, call: Call, branch: Branch) -> Site:
        uncond = self.step.likely(branch)
        rows = [call.rows(i) for i, uuid in enumerate(call.uuids) if uuid in uncond]
        site = self.step.run.site(branch, rows)
        if rows:
            branch.perturbation.install(call, site)
        return site

    def _record(self, call: Call) -> None:
        sharing = [b for b in self.step.active if b.shares]
        wanted = set[Hashable]().union(*(self.step.wanted(b) for b in sharing))
        if not wanted.intersection(call.uuids):
            return
        theirs = signature(call.options)
        kept = []
        for chunk, uuid in enumerate(call.uuids):
            if uuid not in wanted:
                continue
            one = Kept(call.rows(chunk), call.x.shape, call.x.device, theirs)
            one.keep_control(call.control)
            if self.step.prefix.begin((uuid, call.place), one):
                kept.append(one)
        forks = [b.perturbation.fork for b in sharing if b.perturbation.fork is not None]
        if forks and kept:
            network = sharing[0].perturbation.network
            reason = self._obstacle(call, network, len(kept))
            for one in kept:
                one.missing = reason
            if not reason:
                network.record(call, kept, forks)

    def _obstacle(self, call: Call, network: Any, conds: int) -> str:
        """Return why nothing can be kept in this call; empty if it can."""
        if COMPILE_KEY in call.options.get("wrappers", {}).get("apply_model", {}):
            return "the model is compiled"
        model = call.executor.class_obj
        shape = list(call.x.shape)
        samples = conds * shape[0] // len(call.uuids)
        needed = model.memory_required(shape) + samples * network.prefix_bytes(model, shape)
        free = comfy.model_management.get_free_memory(call.x.device)
        return "memory is short" if free < needed else ""


class PerturbedPass:
    """One more prediction of some conds, in which a branch's perturbation is at work."""

    def __init__(self, step: Step, branch: Branch, *, different: str = "") -> None:
        self.step = step
        self.branch = branch
        self.different = different
        """Why nothing of the main pass can be the same; empty if something can."""

    def conds(self, conds: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the conds of this pass: their own identities, and no ControlNet to evaluate."""
        stand_ins: dict[int, ReusedControl] = {}
        own = []
        for cond in conds:
            copy = {**cond, "uuid": self.step.run.private_uuid(self.branch, cond["uuid"])}
            control = cond.get("control")
            if control is not None and not self.different:
                # One stand-in for each: the host batches conds that share one object.
                copy["control"] = stand_ins.setdefault(id(control), ReusedControl(control, self))
            own.append(copy)
        return own

    def apply(self, call: Call) -> torch.Tensor:
        """Run one model call of the perturbed pass."""
        report = self.step.run.report
        site = self.step.run.site(self.branch)
        try:
            self._replay(call)
            report.shared[self.branch] += 1
        except NotReusable as reason:
            report.full[self.branch, str(reason)] += 1
        self.branch.perturbation.install(call, site)
        out = call.run()
        report.reached(self.branch, site)
        return out

    def find(self, options: dict[str, Any], x: torch.Tensor) -> list[Kept]:
        """Return what the main pass kept for the conds of one call.

        Raises:
            NotReusable: if the pass does not see what the main pass saw.
        """
        if self.different:
            raise NotReusable(self.different)
        place = place_of(options)
        original = self.step.run.original_uuid
        kept = [self.step.prefix.find((original(u), place)) for u in options["uuids"]]
        rows = x.shape[0] // len(kept)
        for one in kept:
            if one.device != x.device:
                raise NotReusable("the cond was evaluated on another device")
            if (one.rows.stop - one.rows.start, *one.shape[1:]) != (rows, *x.shape[1:]):
                raise NotReusable("the latent has another shape")
        return kept

    def _replay(self, call: Call) -> None:
        perturbation = self.branch.perturbation
        kept = self.find(call.options, call.x)
        theirs = signature(call.options)
        for one in kept:
            if one.missing:
                raise NotReusable(one.missing)
            if one.signature != theirs:
                raise NotReusable("the model is patched differently in this pass")
        last = self.step.active[-1] is self.branch
        if perturbation.fork is None:
            raise NotReusable("there is no place before its blocks to begin at")
        perturbation.network.replay(call, kept, perturbation.fork, last=last)


class ReusedControl:
    """Stands in for a ControlNet: gives what it gave for the same cond in the main pass."""

    def __init__(self, original: Any, perturbed_pass: PerturbedPass) -> None:
        self._original = original
        self._pass = perturbed_pass

    def get_control(
        self, x_noisy: torch.Tensor, t: Any, cond: Any, batched_number: int, options: dict[str, Any]
    ) -> Control | None:
        """Return the ControlNet's output; it is evaluated only if it was not kept."""
        try:
            kept = self._pass.find(options, x_noisy)
            return joined_control([one.control for one in kept], x_noisy.shape[0] // len(kept))
        except NotReusable:
            self._pass.step.run.report.controls_evaluated += 1
            return self._original.get_control(x_noisy, t, cond, batched_number, options)

    def get_instance_for_device(self, device: torch.device) -> ReusedControl:
        """Return the stand-in for a device; where its ControlNet lies matters only if it runs."""
        return ReusedControl(self._original.get_instance_for_device(device), self._pass)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)
