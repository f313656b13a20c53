"""Self-Attention Guidance (SAG): the node's schema, and from its widgets to a guided model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..seg_core import KERNELS, require_kernel
from . import inputs
from .host import InputBlur, network_of

LABEL = "Self-Attention Guidance"


class SEGuidanceSAG(io.ComfyNode):
    """Guides sampling away from a prediction for an image blurred where attention looks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the inputs; workflows store widgets by position, so new ones go last."""
        return io.Schema(
            node_id="SEGuidanceSAG",
            display_name="Self-Attention Guidance (SAG)",
            category="model/patch/guidance",
            description=(
                "Sharpens what the model looks at. Each step blurs the predicted image where "
                "self-attention gathers, predicts once more from there and moves away from it."
            ),
            search_aliases=[
                "SAG",
                "self attention guidance",
                "SelfAttentionGuidance",
                "blur guidance",
            ],
            inputs=_inputs(),
            outputs=[inputs.guided_model()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        scale: float,
        blur_sigma: float,
        start_percent: float,
        end_percent: float,
        threshold: float = 1.0,
        blocks: str = "auto",
        mask: str = "attention",
        kernel: str = "reference",
        **settings: Any,
    ) -> io.NodeOutput:
        """Return a guided clone of the model; without effect, a plain clone and a warning."""
        require_kernel(blur_sigma, kernel)
        if mask not in ("attention", "everywhere"):
            raise ValueError(f"mask must be attention or everywhere, got {mask!r}")
        watched = network_of(model, LABEL).watching(LABEL, blocks) if mask == "attention" else None
        blur = InputBlur(LABEL, watched, blur_sigma, kernel, threshold)
        no_effect = "blur_sigma is 0." if blur_sigma == 0 else ""
        window = (scale, start_percent, end_percent)
        return inputs.guided_by(model, blur, window, no_effect, reuse=False, **settings)


def _inputs() -> list[io.Input]:
    return [
        inputs.model(),
        inputs.scale(
            0.5,
            "How strongly to move away from the blurred prediction. Above 1 images saturate.",
        ),
        io.Float.Input(
            "blur_sigma",
            default=2.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.001,
            tooltip="Blur width of the predicted image, in latent cells (8 pixels). "
            "0 = no blur, so no effect.",
        ),
        *inputs.window(),
        io.Float.Input(
            "threshold",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.05,
            round=0.001,
            optional=True,
            advanced=True,
            tooltip="Attention that a place must draw to be blurred, in shares of the average: "
            "1 = more than average. 0 = every place.",
        ),
        inputs.blocks(
            "Whose self-attention tells where to blur; several are averaged. auto = the first "
            "transformer of a UNet's middle block, the first of a middle range of a transformer."
        ),
        io.Combo.Input(
            "mask",
            options=["attention", "everywhere"],
            default="attention",
            optional=True,
            advanced=True,
            tooltip="Where to blur. attention = where self-attention gathers. everywhere = the "
            "paper's plain blur guidance, for any model.",
        ),
        inputs.branch(
            {
                "conditional": "the prediction for the prompt; costs one more pass at any cfg.",
                "unconditional": "the prediction for the negative prompt, as ComfyUI's own node.",
            }
        ),
        *inputs.rescale(),
        io.Combo.Input(
            "kernel",
            options=list(KERNELS),
            default="reference",
            optional=True,
            advanced=True,
            tooltip="How blur_sigma is applied. reference = 9 taps as in ComfyUI's own node and "
            "diffusers, close to a box above 3. full = as wide as blur_sigma needs.",
        ),
    ]
