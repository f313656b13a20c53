"""Skip Layer Guidance (SLG), known for video as Spatiotemporal Skip Guidance (STG)."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from . import inputs
from .guidance_node import GuidanceNode
from .host import ChangeOutput, SkipBlock


class Nothing:
    """Attention contributes nothing: its output is 0 before the output projection."""

    needs_map = False

    def __call__(self, out: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return zeros in the shape of the output."""
        del out
        return torch.zeros_like(value)


SKIPPED = {
    "block": SkipBlock(),
    "attention": ChangeOutput(Nothing(), takes_heads=False, auto="skip"),
}
INPUTS = [
    inputs.model(),
    inputs.scale(3.0, "prediction with skipped blocks"),
    *inputs.window(0.01, 0.15),
    inputs.blocks(
        "Which blocks to skip.",
        "7-9 of SD3.5, 14 and 19 of LTX-Video, 10 of Wan, a middle range of other transformers, "
        "the middle block of a UNet",
    ),
    inputs.choice(
        "what",
        SKIPPED,
        "What to skip. block = the whole block, as in ComfyUI's own node. attention = only its "
        "self-attention, whose output for the image becomes 0.",
    ),
    *inputs.extra_prediction("as in ComfyUI's own node."),
]


class SEGuidanceSLG(GuidanceNode, io.ComfyNode):
    """Guides sampling away from a prediction in which selected blocks are skipped."""

    LABEL = "Skip Layer Guidance"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="SEGuidanceSLG",
            display_name="Skip Layer Guidance (SLG, STG)",
            category=inputs.CATEGORY,
            description="Makes bodies, hands and motion more coherent. Each step predicts once "
            "more with selected blocks skipped and moves away from that prediction.",
            search_aliases=[
                "SLG",
                "STG",
                "skip layer guidance",
                "spatiotemporal skip guidance",
                "SkipLayerGuidanceDiT",
                "SkipLayerGuidanceSD3",
            ],
            inputs=INPUTS,
            outputs=[inputs.guided_model()],
        )

    @classmethod
    def change(cls, *, what: str, **_: Any) -> SkipBlock | ChangeOutput:
        """Return what skips the selected blocks, or their self-attention."""
        return SKIPPED[what]
