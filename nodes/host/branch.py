"""One guidance branch in a sampling step: window -> perturbed pass -> blend.

What is perturbed, and how, is the network's business; when and for which conds, the step's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ...seg_core import Window, apply_guidance
from .perturbation import Perturbation

# The one key under which this pack keeps its objects in ComfyUI's dictionaries.
KEY = "smoothed_energy_guidance"

Side = Literal["conditional", "unconditional", "free"]
RescaleMode = Literal["full", "partial", "snf"]


@dataclass(frozen=True, eq=False)
class Branch:
    r"""A post-CFG function of ComfyUI that guides away from one perturbed prediction.

    $$\text{guided} = \text{denoised} + s\,(\text{prediction} - \text{perturbed})$$

    with `denoised` whatever the graph made of the ordinary predictions. Instances are immutable
    and hold no tensor, so clones of a model may share them, also between threads.
    """

    perturbation: Perturbation
    scale: float
    window: Window
    side: Side = "conditional"
    rescale: float = 0.0
    rescale_mode: RescaleMode = "full"
    reuse: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"scale must be a number of at least 0, got {self.scale}")
        if self.side not in get_args(Side):
            raise ValueError(
                f"branch must be one of {', '.join(get_args(Side))}, got {self.side!r}"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be between 0 and 1, got {self.rescale}")
        if self.rescale_mode not in get_args(RescaleMode):
            raise ValueError(
                f"rescale_mode must be one of {', '.join(get_args(RescaleMode))}, "
                f"got {self.rescale_mode!r}"
            )

    @property
    def shares(self) -> bool:
        """True if its pass may take over what the main pass computed."""
        return self.reuse and self.side != "free"

    def __call__(self, args: dict[str, Any]) -> torch.Tensor:
        """Guide one prediction; outside the window `denoised` itself comes back."""
        from .sampling import step_of

        step = step_of(args)
        if step is None or self not in step.active:
            return args["denoised"]
        recorder = step.run.recorder
        if recorder is not None:
            recorder.begin(self, args)
        compared = step.predict(self, args)
        if compared is None:
            return args["denoised"]
        prediction, perturbed = compared
        guided = apply_guidance(
            args["denoised"],
            prediction,
            perturbed,
            self.scale,
            rescale=self.rescale,
            rescale_mode=self.rescale_mode,
            cond=args["cond_denoised"],
            uncond=args["uncond_denoised"] if args["uncond"] is not None else None,
        )
        if recorder is not None:
            recorder.guided(self, args, guided)
        return guided
