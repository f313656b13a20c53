"""The true SDXL and SD1.5 UNets and their ControlNets, with random weights or none (meta)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_patcher
import comfy.supported_models as supported
import torch

_COMMON = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
_SDXL = _COMMON | {
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "channel_mult": [1, 2, 4],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_head_channels": 64,
    "num_heads": -1,
}
_SD15 = _COMMON | {
    "adm_in_channels": None,
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "num_heads": 8,
}
# The same shape with fewer channels and layers: 196 M parameters.
_SMALL = _SDXL | {
    "model_channels": 128,
    "transformer_depth": [0, 0, 1, 1, 3, 3],
    "transformer_depth_middle": 3,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 3, 3, 3],
    "num_head_channels": 64,
}


@dataclass(frozen=True)
class Kind:
    """A network that is measured."""

    title: str
    config: type
    unet: dict[str, Any]
    size: tuple[int, int]
    """Nominal image size, width and height."""
    early: str = "d0"
    middle: str = "middle"
    late: str = "u3"


KINDS = {
    "sdxl": Kind("SDXL", supported.SDXL, _SDXL, (1024, 1024)),
    "sd15": Kind("SD1.5", supported.SD15, _SD15, (512, 512)),
}
SMALL = Kind("A small SDXL", supported.SDXL, _SMALL, (128, 128))


def unet(
    kind: Kind, device: torch.device, dtype: torch.dtype, *, offloaded: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """Return the network of a kind as a model of ComfyUI.

    Offloaded, its weights stay in the CPU's memory, and each is fetched when it is used: what
    ComfyUI does where a model does not fit, or with `--lowvram`.
    """
    config = kind.config(dict(kind.unet))
    config.unet_config = kind.unet | {"dtype": dtype}
    config.manual_cast_dtype = None
    model = config.get_model({}, device=device)
    _fill(model.diffusion_model.to(dtype))
    place = torch.device("cpu") if offloaded else device
    model.to(place)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=place)
    model.current_patcher = patcher
    if offloaded:
        patcher.patch_model(device, lowvram_model_memory=1)
    return patcher


def control_net(kind: Kind, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the ControlNet of a kind."""
    names = ("out_channels", "transformer_depth_output")
    config = {k: v for k, v in kind.unet.items() if k not in names} | {"dtype": dtype}
    network = comfy.cldm.cldm.ControlNet(hint_channels=3, device=device, **config)
    _fill(network.to(dtype))
    return comfy.controlnet.ControlNet(network, load_device=device)


@torch.no_grad()
def _fill(module: torch.nn.Module) -> None:
    """Draw weights that keep activations near unit size."""
    for name, weight in module.named_parameters():
        if weight.device.type == "meta":
            continue
        if weight.ndim > 1:
            weight.normal_(0.0, 1.0 / math.sqrt(weight[0].numel()))
        else:
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def prompt(kind: Kind, seed: int, control: Any = None) -> list[Any]:
    """Return the CONDITIONING of one random prompt of 77 tokens."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(1, 77, kind.unet["context_dim"], generator=generator)
    values = {"pooled_output": torch.randn(1, 1280, generator=generator)}
    return [[embedding, values if control is None else {**values, "control": control}]]
