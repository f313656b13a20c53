"""Self-Attention Guidance (SAG), and the plain blur guidance of the same paper."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..seg_core import KERNELS
from . import inputs
from .guidance_node import GuidanceNode, narrow
from .host import InputBlur, network_of

INPUTS = [
    inputs.MODEL,
    inputs.scale(0.5, "blurred prediction", " Above 1, images oversaturate."),
    inputs.number(
        "blur_sigma",
        2.0,
        "Width of the blur of the predicted image, in latent cells (8 pixels). 0 = no effect.",
        most=100.0,
        step=0.1,
    ),
    *inputs.window(),
    inputs.number(
        "threshold",
        1.0,
        "How much attention a position must receive to be blurred, as a multiple of the average: 1 "
        "= more than average. 0 = every position.",
        most=100.0,
        step=0.05,
        advanced=True,
    ),
    inputs.blocks(
        "Whose self-attention tells where to blur; several are averaged.",
        "the first transformer of a UNet's middle block, the first of a middle range of a "
        "transformer",
    ),
    inputs.choice(
        "mask",
        ["attention", "everywhere"],
        "Where to blur. attention = where self-attention gathers. everywhere = the paper's plain "
        "blur guidance, for any model.",
    ),
    inputs.branch(
        "the prediction for the prompt; one extra pass at any cfg.",
        "the prediction for the negative prompt, as in ComfyUI's own node.",
        free=False,
    ),
    *inputs.RESCALE,
    inputs.choice(
        "kernel",
        KERNELS,
        "How blur_sigma is applied. reference = 9 taps, as in ComfyUI's own node and diffusers; "
        "close to a box above 3. full = as wide as blur_sigma needs.",
    ),
]


class SEGuidanceSAG(GuidanceNode, io.ComfyNode):
    """Guides sampling away from a prediction for an image blurred where attention gathers."""

    LABEL = "Self-Attention Guidance"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="SEGuidanceSAG",
            display_name="Self-Attention Guidance (SAG)",
            category=inputs.CATEGORY,
            description="Sharpens what the model attends to. Each step blurs the predicted image "
            "where self-attention gathers, predicts once more from there and moves away from it.",
            search_aliases=["SelfAttentionGuidance", "blur guidance"],
            inputs=INPUTS,
            outputs=[inputs.GUIDED],
        )

    @classmethod
    def perturbation(cls, model: Any, **widgets: Any) -> InputBlur:
        """Return the blur of the input, and the blocks whose attention tells where."""
        source = None
        if widgets["mask"] == "attention":
            source = network_of(model, cls.LABEL).saliency_source(widgets["blocks"])
        blur = widgets["blur_sigma"], widgets["kernel"], widgets["threshold"]
        return InputBlur(cls.LABEL, source, *blur)

    @classmethod
    def no_effect(cls, *, blur_sigma: float, **_: Any) -> str:
        """Return why these widgets have no effect; empty if they have one."""
        return narrow(blur_sigma, "full")  # the 9 taps of reference reach as far
