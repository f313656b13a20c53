"""One evaluation of the guided model: what is known of it, and what it holds until it is over."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ..calls.call import KEY
from ..settings.branch import Branch
from .aside import Aside
from .run import Run

_SIDES = {"positive", "negative", "middle", "empty_negative_prompt"}


class Step:
    """One evaluation of the guided model.

    Attributes:
        run: the sampling call.
        active: the branches whose window holds its noise level.
        aside: what its plain calls put aside.
        evaluated: the plain predictions before other nodes altered them, by the conds' identities.
        input: the latent that its plain predictions were made of.
        labels: which side the plain pass took each cond for.
        together: the conds of each of its calls.
        asked: the branches that asked for their prediction.
        shape: of the latent.
        middle_patches: other nodes' patches of that name; what a call has besides is its prompt's.
        freed: the conds whose plain predictions were perturbed themselves.
        has_main_pass: its plain predictions were made under its eyes.
        in_main_pass: calls of the model are those of the plain predictions.
        is_open: rows may join them.
        is_proved: chunks of rows are the conds' own, in the host's order.
    """

    def __init__(self, run: Run, active: tuple[Branch, ...], guider: Any = None) -> None:
        self.run = run
        self.active = active
        self.aside = Aside()
        self.labels: dict[Hashable, int] = {}
        self.together: list[set[Hashable]] = []
        self.evaluated: dict[tuple[Hashable, ...], torch.Tensor] = {}
        self.input: torch.Tensor | None = None
        self.asked: set[Branch] = set()
        self._evaluated_at: torch.Tensor | None = None
        self.shape = torch.Size()
        self.middle_patches: list[Any] = []
        self.freed = set[Hashable]()
        self.has_main_pass = False
        self.in_main_pass = self.is_open = self.is_proved = False
        self._guider = guider

    def begin_main_pass(self, model_options: dict[str, Any], x: torch.Tensor) -> None:
        """Note under which options the plain predictions are made, and of what."""
        self.shape = x.shape
        patches = model_options["transformer_options"].get("patches", {})
        self.middle_patches = list(patches.get("middle_patch", []))
        self.in_main_pass = True
        self.has_main_pass = self.is_open = True
        wrappers = model_options["transformer_options"].get("wrappers", {})
        others = set(wrappers.get("apply_model", {})) - {KEY}
        self.is_proved = "model_function_wrapper" not in model_options and not others

    def end_main_pass(self, args: dict[str, Any]) -> None:
        """Note what was predicted, and that whatever is evaluated from now on is not plain."""
        self.in_main_pass = self.is_open = False
        if self.input is None:
            self.input = args["input"]
        self._evaluated_at = args["input"]
        for conds, out in zip(args.get("conds", ()), args.get("conds_out", ()), strict=False):
            # A copy: the functions that follow may write into it.
            self.evaluated[_names(conds)] = out.clone()

    def prediction(self, args: dict[str, Any], side: str) -> torch.Tensor | None:
        """Return the prediction of one side as it was evaluated; None if none was made.

        Other nodes may have altered it since: their change is theirs, and not to be multiplied by
        a scale of ours.
        """
        name = _names(args[side])
        altered = args[f"{side}_denoised"]
        if name in self.evaluated and args["input"] is self._evaluated_at:
            return self.evaluated[name]
        seen = not self.labels or any(uuid in self.labels for uuid in name)
        return altered if seen and torch.is_tensor(altered) else None

    def wanted(self, branch: Branch) -> set[Hashable]:
        """Return the conds that a branch will ask for: last step's, or the likely ones."""
        known = self.run.wanted.get(branch)
        return self.likely(branch) if known is None else known

    def likely(self, branch: Branch) -> set[Hashable]:
        """Return the conds that a branch perturbs under the guiders that ComfyUI ships.

        Under others with more than two sides `free` waits a step: what it perturbs for nothing
        would be in the plain prediction.
        """
        conds = getattr(self._guider, "conds", {})
        cond, uncond = "positive", "negative"
        if "middle" in conds:  # DualCFGGuider compares neighbours
            nested = getattr(self._guider, "nested", False)
            cond, uncond = ("positive", "middle") if nested else ("middle", "negative")
        if branch.side == "free" and conds.keys() - _SIDES:
            return set()
        side = cond if branch.side == "conditional" else uncond
        return {one["uuid"] for one in conds.get(side) or ()}

    def close(self) -> None:
        """Let go of everything, and note whose rows were computed for nothing."""
        for branch in {owner for owner, _, _ in self.aside.predictions} - self.asked:
            self.run.idle.add(branch)
            self.run.report.warn_once(
                f"{branch.perturbation.label}: its prediction was made and nobody used it, because "
                "another node takes the place of guidance. It is no longer made beforehand."
            )
        self.run.regrouped |= self.aside.regrouped
        self.aside.clear()
        self.evaluated.clear()
        self.input = self._evaluated_at = None


def _names(conds: Any) -> tuple[Hashable, ...]:
    return tuple(cond["uuid"] for cond in conds or ())
