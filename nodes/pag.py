"""Perturbed-Attention Guidance (PAG): the node's schema, and from its widgets to a guided model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ..seg_core import identity_attention
from . import inputs
from .host import ChangeOutput, network_of

LABEL = "Perturbed-Attention Guidance"


@dataclass(frozen=True)
class SeeItself:
    """Each token's attention is drawn towards itself; see `identity_attention`."""

    strength: float

    @property
    def needs_map(self) -> bool:
        """True if anything of the attention map is left."""
        return self.strength != 1

    def __call__(self, out: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the output of attention, drawn towards the tokens' own values."""
        return identity_attention(out, value, self.strength)


class SEGuidancePAG(io.ComfyNode):
    """Guides sampling away from a prediction in which tokens attend to themselves alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the inputs; workflows store widgets by position, so new ones go last."""
        return io.Schema(
            node_id="SEGuidancePAG",
            display_name="Perturbed-Attention Guidance (PAG)",
            category="model/patch/guidance",
            description=(
                "Makes structures more coherent. Each step predicts once more with chosen "
                "self-attention maps replaced by the identity and moves away from that prediction."
            ),
            search_aliases=[
                "PAG",
                "SoftPAG",
                "perturbed attention guidance",
                "PerturbedAttentionGuidance",
                "identity attention",
                "HeadHunter",
            ],
            inputs=inputs.perturbing(
                "perturbed prediction",
                inputs.blocks(
                    "Which self-attention blocks to perturb. auto = the middle block of a UNet, a "
                    "middle range of a transformer.",
                    heads=True,
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    advanced=True,
                    tooltip="How far to draw the attention maps to the identity (SoftPAG). "
                    "1 = PAG. 0 = not at all, so no effect.",
                ),
                does="perturbs",
            ),
            outputs=[inputs.guided_model()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        scale: float,
        start_percent: float,
        end_percent: float,
        blocks: str = "auto",
        strength: float = 1.0,
        **settings: Any,
    ) -> io.NodeOutput:
        """Return a guided clone of the model; without effect, a plain clone and a warning."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, got {strength}")
        change = ChangeOutput(SeeItself(strength))
        perturbation = network_of(model, LABEL).perturbation(LABEL, blocks, change)
        no_effect = "strength is 0." if strength == 0 else ""
        window = (scale, start_percent, end_percent)
        return inputs.guided_by(model, perturbation, window, no_effect, **settings)
