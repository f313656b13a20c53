"""Perturbed-Attention Guidance (PAG)."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io

from ..seg_core import identity_attention
from . import inputs
from .guidance_node import GuidanceNode
from .host import ChangeOutput

INPUTS = [
    inputs.MODEL,
    inputs.scale(3.0, "perturbed prediction"),
    *inputs.window(),
    inputs.blocks("Which self-attention blocks to perturb.", heads=True),
    inputs.number(
        "strength",
        1.0,
        "How far to move the attention maps towards the identity (SoftPAG). 1 = PAG. 0 = no "
        "effect.",
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
            search_aliases=["SoftPAG", "identity attention", "HeadHunter"],
            inputs=INPUTS,
            outputs=[inputs.GUIDED],
        )

    @classmethod
    def change(cls, *, strength: float, **_: Any) -> ChangeOutput:
        """Return the change of attention in the selected blocks."""
        return ChangeOutput(partial(identity_attention, strength=strength), needs_map=strength != 1)
