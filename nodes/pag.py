"""Perturbed-Attention Guidance (PAG): the node's schema, and from its widgets to a guided model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..seg_core import Window
from . import inputs
from .host import Branch, RescaleMode, Side, guided, network_of

LABEL = "Perturbed-Attention Guidance"


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
            ],
            inputs=[
                inputs.model(),
                inputs.scale(3.0, "How strongly to move away from the perturbed prediction."),
                *inputs.window(),
                inputs.blocks(
                    "Which self-attention blocks to perturb. auto = the middle block of a UNet, a "
                    "middle range of a transformer."
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
                inputs.branch(
                    {
                        "conditional": "as in the released code.",
                        "unconditional": "the prediction for the negative prompt.",
                        "free": "another method: perturbs the unconditional prediction itself, so "
                        "no extra pass; it needs cfg above 1, and a lower cfg than usual.",
                    }
                ),
                *inputs.rescale(),
                inputs.reuse(),
            ],
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
        branch: Side = "conditional",
        rescale: float = 0.0,
        rescale_mode: RescaleMode = "full",
        reuse: bool = True,
    ) -> io.NodeOutput:
        """Return a guided clone of the model; without effect, a plain clone and a warning."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, got {strength}")
        guidance = Branch(
            network_of(model, LABEL).identity(LABEL, blocks, strength),
            scale=scale,
            window=Window(start_percent, end_percent),
            side=branch,
            rescale=rescale,
            rescale_mode=rescale_mode,
            reuse=reuse,
        )
        no_effect = "strength is 0." if strength == 0 else ""
        return io.NodeOutput(guided(model, guidance, no_effect))
