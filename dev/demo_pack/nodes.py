"""The nodes of the demo pack."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import ComfyExtension, io

from .model import load_model, read_weights

CATEGORY = "SEG demo"
CONFIG, TENSORS = read_weights()
CLASS_NAMES = CONFIG["class_names"]


class SEGDemoModelLoader(io.ComfyNode):
    """Loads the embedded model of butterflies."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="SEGDemoModelLoader",
            display_name="SEG Demo Model Loader",
            category=CATEGORY,
            description="A tiny diffusion model of butterflies, 32x32 pixels.",
            inputs=[],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Return the model patcher."""
        return io.NodeOutput(load_model())


class SEGDemoPrompt(io.ComfyNode):
    """Turns the choice of a colour into conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="SEGDemoPrompt",
            display_name="SEG Demo Prompt",
            category=CATEGORY,
            description="The colour of the butterfly, or nothing in particular.",
            inputs=[io.Combo.Input("prompt", options=CLASS_NAMES, default=CLASS_NAMES[0])],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def execute(cls, prompt: str) -> io.NodeOutput:
        """Return the class's context tokens as conditioning."""
        index = CLASS_NAMES.index(prompt)
        tokens = TENSORS["class_tokens"][index : index + 1].float()
        return io.NodeOutput([[tokens, {}]])


class PixelVAE:
    """Stands in for a VAE: the demo model's latent pictures are pictures already."""

    def __init__(self, scale: int) -> None:
        self.scale = scale

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Return latent pictures, enlarged, as images ``(batch, height, width, 3)`` in [0, 1]."""
        if samples.ndim != 4 or samples.shape[1] != CONFIG["channels"]:
            raise ValueError(
                "SEG Demo VAE decodes latents of the demo model, (batch, 3, height, width); "
                f"these are {tuple(samples.shape)}."
            )
        pictures = samples.float()
        if self.scale > 1:
            pictures = torch.nn.functional.interpolate(
                pictures, scale_factor=self.scale, mode="bicubic"
            )
        images = ((pictures + 1.0) * 0.5).clamp(0.0, 1.0).movedim(1, -1)
        return images.to(comfy.model_management.intermediate_device())


class SEGDemoVAE(io.ComfyNode):
    """Hands out the decoder of the demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="SEGDemoVAE",
            display_name="SEG Demo VAE",
            category=CATEGORY,
            description="Shows the demo model's latent pictures, enlarged by a whole factor.",
            inputs=[io.Int.Input("scale", default=8, min=1, max=32)],
            outputs=[io.Vae.Output(display_name="vae")],
        )

    @classmethod
    def execute(cls, scale: int) -> io.NodeOutput:
        """Return the decoder."""
        return io.NodeOutput(PixelVAE(scale))


class DemoExtension(ComfyExtension):
    """Hands the nodes to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return [SEGDemoModelLoader, SEGDemoPrompt, SEGDemoVAE]
