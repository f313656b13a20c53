"""The nodes of the demo pack."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import ComfyExtension, io

from .model import load_model
from .weights import load_class_tokens, load_config

CATEGORY = "SEG demo"
CLASS_NAMES = load_config()["class_names"]
IMAGE_SIZE = load_config()["image_size"]
CHANNELS = load_config()["channels"]
INTERPOLATION = {"nearest": "nearest-exact", "bicubic": "bicubic"}


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
        tokens = load_class_tokens()[index : index + 1].clone()
        return io.NodeOutput([[tokens, {}]])


class SEGDemoEmptyLatent(io.ComfyNode):
    """Makes an empty latent picture of the demo model's format."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        size = {"default": IMAGE_SIZE, "min": 16, "max": 128, "step": 8}
        return io.Schema(
            node_id="SEGDemoEmptyLatent",
            display_name="SEG Demo Empty Latent",
            category=CATEGORY,
            description="An empty RGB picture; the model was trained at 32x32.",
            inputs=[
                io.Int.Input("width", **size),
                io.Int.Input("height", **size),
                io.Int.Input("batch_size", default=1, min=1, max=256),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        """Return zeros with three channels and no downscaling."""
        samples = torch.zeros(
            (batch_size, CHANNELS, height, width),
            device=comfy.model_management.intermediate_device(),
        )
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": 1})


class PixelVAE:
    """Stands in for a VAE: the demo model's latent pictures are pictures already."""

    def __init__(self, scale: int, method: str) -> None:
        self.scale = scale
        self.method = method

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Return latent pictures, enlarged, as images ``(batch, height, width, 3)`` in [0, 1]."""
        if samples.ndim != 4 or samples.shape[1] != CHANNELS:
            raise ValueError(
                "SEG Demo VAE decodes latents of the demo model, (batch, 3, height, width); "
                f"these are {tuple(samples.shape)}."
            )
        pictures = samples.float()
        if self.scale > 1:
            pictures = torch.nn.functional.interpolate(
                pictures, scale_factor=self.scale, mode=INTERPOLATION[self.method]
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
            inputs=[
                io.Int.Input("scale", default=8, min=1, max=32),
                io.Combo.Input("method", options=list(INTERPOLATION), default="bicubic"),
            ],
            outputs=[io.Vae.Output(display_name="vae")],
        )

    @classmethod
    def execute(cls, scale: int, method: str) -> io.NodeOutput:
        """Return the decoder."""
        return io.NodeOutput(PixelVAE(scale, method))


class DemoExtension(ComfyExtension):
    """Hands the nodes to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return [SEGDemoModelLoader, SEGDemoPrompt, SEGDemoEmptyLatent, SEGDemoVAE]
