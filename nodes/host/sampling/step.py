"""One evaluation of the guided model: what is known of it, and what it holds until it is over."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ..calls.call import KEY
from ..settings.branch import Branch
from .aside import Aside
from .run import Run


class Step:
    """One evaluation of the guided model.

    Attributes:
        run: the sampling call.
        active: the branches whose window holds its noise level.
        aside: what its plain calls put aside.
        labels: which side the plain pass took each cond for.
        asked: the branches that asked for their prediction.
        samples: images in the latent.
        in_main_pass: calls of the model are those of the plain predictions.
        is_open: rows may join them.
        is_proved: chunks of rows are the conds' own, in the host's order.
    """

    def __init__(self, run: Run, active: tuple[Branch, ...], guider: Any = None) -> None:
        self.run = run
        self.active = active
        self.aside = Aside()
        self.labels: dict[Hashable, int] = {}
        self.asked: set[Branch] = set()
        self.samples = 0
        self.in_main_pass = self.is_open = self.is_proved = False
        self._guider = guider

    def begin_main_pass(self, model_options: dict[str, Any], x: torch.Tensor) -> None:
        """Note under which options the plain predictions are made, and of what."""
        self.samples = len(x)
        self.in_main_pass = True
        # Another node's own evaluation of the conds may do anything with the latent.
        self.is_open = "sampler_calc_cond_batch_function" not in model_options
        wrappers = model_options["transformer_options"].get("wrappers", {})
        others = set(wrappers.get("apply_model", {})) - {KEY}
        self.is_proved = "model_function_wrapper" not in model_options and not others

    def end_main_pass(self) -> None:
        """Note that whatever is evaluated from now on is not a plain prediction."""
        self.in_main_pass = self.is_open = False

    def wanted(self, branch: Branch) -> set[Hashable]:
        """Return the conds that a branch will ask for: last step's, or the likely ones."""
        known = self.run.wanted.get(branch)
        return self.likely(branch) if known is None else known

    def likely(self, branch: Branch) -> set[Hashable]:
        """Return the conds that a branch perturbs under the guiders that ComfyUI ships."""
        name = "positive" if branch.side == "conditional" else "negative"
        conds = getattr(self._guider, "conds", {}).get(name) or ()
        return {cond["uuid"] for cond in conds}

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
