"""Skip Layer Guidance (SLG, STG): the node's schema, and from its widgets to a guided model."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from . import inputs
from .host import ChangeOutput, PassBy, network_of

LABEL = "Skip Layer Guidance"


class Nothing:
    """Attention gives nothing: its output is 0 before its projection."""

    needs_map = False

    def __call__(self, out: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return zeros in the place of the output."""
        del out
        return torch.zeros_like(value)


CHANGES = {
    "block": PassBy(),
    "attention": ChangeOutput(Nothing(), takes_heads=False, auto="skip"),
}


class SEGuidanceSLG(io.ComfyNode):
    """Guides sampling away from a prediction in which chosen blocks are passed over."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the inputs; workflows store widgets by position, so new ones go last."""
        return io.Schema(
            node_id="SEGuidanceSLG",
            display_name="Skip Layer Guidance (SLG, STG)",
            category="model/patch/guidance",
            description=(
                "Makes bodies, hands and motion more coherent. Each step predicts once more with "
                "chosen blocks passed over and moves away from that prediction."
            ),
            search_aliases=[
                "SLG",
                "STG",
                "skip layer guidance",
                "spatiotemporal skip guidance",
                "SkipLayerGuidanceDiT",
                "SkipLayerGuidanceSD3",
            ],
            inputs=inputs.perturbing(
                "prediction that skips",
                inputs.blocks(
                    "Which blocks to pass over. auto = 7-9 of SD3.5, 14 and 19 of LTX-Video, 10 of "
                    "Wan, a middle range of other transformers, the middle block of a UNet."
                ),
                io.Combo.Input(
                    "what",
                    options=list(CHANGES),
                    default="block",
                    optional=True,
                    advanced=True,
                    tooltip="What to pass over. block = all of it, as ComfyUI's own node. "
                    "attention = its self-attention gathers nothing for the image.",
                ),
                does="skips in",
                usual="as in ComfyUI's own node.",
                active=(0.01, 0.15),
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
        what: str = "block",
        **settings: Any,
    ) -> io.NodeOutput:
        """Return a guided clone of the model; without effect, a plain clone and a warning."""
        if what not in CHANGES:
            raise ValueError(f"what must be one of {', '.join(CHANGES)}, got {what!r}")
        perturbation = network_of(model, LABEL).perturbation(LABEL, blocks, CHANGES[what])
        window = (scale, start_percent, end_percent)
        return inputs.guided_by(model, perturbation, window, **settings)
