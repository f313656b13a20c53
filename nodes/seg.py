"""Smoothed Energy Guidance (SEG)."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io

from ..seg_core import AXES, KERNELS
from . import inputs
from .guidance_node import GuidanceNode, narrow
from .host import SmoothQueries

INPUTS = [
    inputs.MODEL,
    inputs.scale(
        3.0, "smoothed prediction", " The paper fixes it at 3 and controls quality with the blur."
    ),
    io.Boolean.Input(
        "infinite_blur",
        default=True,
        tooltip="Replace every query by the mean query: the strongest blur and the cheapest to "
        "compute. Off = use blur_sigma.",
    ),
    inputs.number(
        "blur_sigma",
        10.0,
        "Blur width in cells of the attention's token grid (32x32 in SDXL's middle block at "
        "1024x1024), used while infinite_blur is off. Try 1, 2, 4, 8, 16. 0 = no effect.",
        most=9999.0,
        step=0.5,
    ),
    *inputs.window(),
    inputs.blocks("Which self-attention blocks to smooth.", heads=True),
    inputs.branch("as in the released code.", "as in the paper's equation 10."),
    *inputs.RESCALE,
    inputs.choice(
        "kernel",
        KERNELS,
        "How blur_sigma is applied. reference = as in the released code, cut off at the size of "
        "the grid. full = not cut off, approaches infinite_blur steadily. Ignored while "
        "infinite_blur is on.",
    ),
    inputs.REUSE,
    inputs.choice(
        "axes",
        AXES,
        "Which axes to blur along. space = within each frame. time = across the frames of a video, "
        "at each position. space and time = both; with infinite_blur, one query for the whole "
        "clip. Experimental, for video models.",
    ),
    inputs.number(
        "strength",
        1.0,
        "How far to move the output of attention towards that of blurred attention (SoftSEG). "
        "1 = SEG. 0 = no effect.",
        step=0.05,
        advanced=True,
    ),
    inputs.every(),
]


class SEGuidance(GuidanceNode, io.ComfyNode):
    """Guides sampling away from a prediction with smoothed self-attention."""

    LABEL = "Smoothed Energy Guidance"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="SEGuidance",
            display_name="Smoothed Energy Guidance (SEG)",
            category=inputs.CATEGORY,
            description="Makes images more coherent, with or without a prompt. Each step predicts "
            "once more with blurred self-attention and moves away from that prediction.",
            search_aliases=[
                "self-attention guidance",
                "query blur",
                "SoftSEG",
                "SEGAttention",
                "SmoothedEnergyGuidanceAdvanced",
            ],
            inputs=INPUTS,
            outputs=[inputs.GUIDED],
        )

    @classmethod
    def change(cls, **widgets: Any) -> SmoothQueries:
        """Return the change of the queries in the selected blocks."""
        sigma = math.inf if widgets["infinite_blur"] else widgets["blur_sigma"]
        return SmoothQueries(sigma, widgets["kernel"], widgets["axes"], widgets["strength"])

    @classmethod
    def no_effect(cls, **widgets: Any) -> str:
        """Return why these widgets have no effect; empty if they have one."""
        blur = cls.change(**widgets)
        return "strength is 0." if blur.strength == 0 else narrow(blur.sigma, blur.kernel)
