"""Skip Layer Guidance (SLG), known for video as Spatiotemporal Skip Guidance (STG)."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from comfy_api.latest import io

from . import inputs
from .guidance_node import GuidanceNode
from .host import BlockPerturbation, ChangeOutput, SkipBlock, network_of

log = logging.getLogger(__name__)
SCALE = 3.0
MEASURED = {
    "LTX-Video": (1.0, "the default of ComfyUI's LTXVSpatioTemporalGuidance"),
    "LTX-2": (1.0, "the default of ComfyUI's LTXVSpatioTemporalGuidance"),
    "random": (0.25, "the weight of the S2-Guidance paper, arXiv:2508.12880"),
}
"""Scales that somebody measured or ships, by family of networks, or for random blocks."""


def nothing(out: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the output of attention that contributes nothing, before its output projection."""
    del out
    return torch.zeros_like(value)


SKIPPED = {
    "block": SkipBlock(),
    "attention": ChangeOutput(nothing, needs_map=False, auto="skip"),
}
INPUTS = [
    inputs.MODEL,
    inputs.scale(SCALE, "prediction with skipped blocks"),
    *inputs.window(0.01, 0.15),
    inputs.blocks(
        "Which blocks to skip.",
        "7-9 of SD3.5, 14 and 19 of LTX-Video, 29 of LTX-2 (28 from version 2.3 on), 10 of Wan, a "
        "middle range of other transformers, the middle block of a UNet",
        random=True,
    ),
    inputs.choice(
        "what",
        SKIPPED,
        "What to skip. block = the whole block, as in ComfyUI's own node. attention = only its "
        "self-attention, whose output for the image becomes 0.",
    ),
    *inputs.extra_prediction(
        "as in ComfyUI's own node.",
        " Random blocks are drawn anew in each step: holding one draw is another method.",
    ),
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
                "spatiotemporal skip guidance",
                "S2-Guidance",
                "SkipLayerGuidanceDiT",
                "SkipLayerGuidanceSD3",
            ],
            inputs=INPUTS,
            outputs=[inputs.GUIDED],
        )

    @classmethod
    def change(cls, *, what: str, **_: Any) -> SkipBlock | ChangeOutput:
        """Return what skips the selected blocks, or their self-attention."""
        return SKIPPED[what]

    @classmethod
    def perturbation(cls, model: Any, *, scale: float, **widgets: Any) -> BlockPerturbation:
        """Return what makes the prediction worse; say once if its default scale is too high."""
        network, change = network_of(model, cls.LABEL), cls.change(**widgets)
        perturbation = network.perturbation(cls.LABEL, widgets["blocks"], change)
        case = "random" if perturbation.drawn else network.kind
        if scale == SCALE and case in MEASURED:
            _advise(case, *MEASURED[case])
        return perturbation


@functools.cache
def _advise(case: str, scale: float, source: str) -> None:
    """Log, once in a session, a scale that fits better than the default."""
    log.info(
        "%s: for %s try scale %g, %s.",
        SEGuidanceSLG.LABEL,
        "random blocks" if case == "random" else case,
        scale,
        source,
    )
