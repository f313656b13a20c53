"""Perturbed-Attention Guidance (PAG)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ..seg_core import identity_attention
from . import inputs
from .guidance_node import GuidanceNode
from .host import ChangeOutput


@dataclass(frozen=True)
class SeeItself:
    """Attention maps are drawn towards the identity; see `identity_attention`.

    Attributes:
        strength: 0 leaves the map as it is; at 1 each token sees itself alone.

    Raises:
        ValueError: if the strength is not between 0 and 1.
    """

    strength: float

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, got {self.strength}")

    @property
    def needs_map(self) -> bool:
        """True if anything of the attention map is left."""
        return self.strength != 1

    def __call__(self, out: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the output of attention, drawn towards the tokens' own values."""
        return identity_attention(out, value, self.strength)


INPUTS = [
    inputs.model(),
    inputs.scale(3.0, "perturbed prediction"),
    *inputs.window(),
    inputs.blocks("Which self-attention blocks to perturb.", heads=True),
    inputs.number(
        "strength",
        1.0,
        "How far to draw the attention maps to the identity (SoftPAG). 1 = PAG. 0 = no effect.",
        step=0.05,
        advanced=True,
    ),
    *inputs.extra_prediction("as in the released code."),
]


class SEGuidancePAG(GuidanceNode, io.ComfyNode):
    """Guides sampling away from a prediction in which tokens attend to themselves alone."""

    LABEL = "Perturbed-Attention Guidance"
    NEUTRAL = "strength"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="SEGuidancePAG",
            display_name="Perturbed-Attention Guidance (PAG)",
            category=inputs.CATEGORY,
            description="Makes structures more coherent. Each step predicts once more with "
            "selected self-attention maps replaced by the identity and moves away from it.",
            search_aliases=[
                "PAG",
                "SoftPAG",
                "perturbed attention guidance",
                "PerturbedAttentionGuidance",
                "identity attention",
                "HeadHunter",
            ],
            inputs=INPUTS,
            outputs=[inputs.guided_model()],
        )

    @classmethod
    def change(cls, *, strength: float, **_: Any) -> ChangeOutput:
        """Return the change of attention in the selected blocks."""
        return ChangeOutput(SeeItself(strength))
