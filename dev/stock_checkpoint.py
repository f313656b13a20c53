"""A checkpoint in the true SD1.5 file format with seeded random weights, and a ControlNet for it.

Small enough for a test (320 channels at two levels), complete enough for the stock
`CheckpointLoaderSimple`: UNet, the whole CLIP-L and the whole VAE. Not a model that draws.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

from dev.environment import python_command, stream
from dev.places import ROOT, cache_root, locked, made_folder, require_space
from dev.say import step

EDITION = "v1"  # raise it whenever the content of the files changes
CHECKPOINT = f"seg-random-sd15-{EDITION}.safetensors"
CONTROLNET = f"seg-random-controlnet-{EDITION}.safetensors"
SEED = 20240800760
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 1),
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "legacy": False,
}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def files(tree: Path) -> dict[str, Path]:
    """Return folder in `models` -> file, made with this ComfyUI at their first use."""
    folder = cache_root() / "checkpoints"
    wanted = {"checkpoints": folder / CHECKPOINT, "controlnet": folder / CONTROLNET}
    with locked(cache_root() / "locks" / "checkpoints", "making the test checkpoint"):
        if not all(path.exists() for path in wanted.values()):
            step(f"Making the random SD1.5 test checkpoint in {folder}")
            require_space(folder, 1.5, "The test checkpoint")
            _make(tree, made_folder(folder))
    return wanted


def _make(tree: Path, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{ROOT}"}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
        command = python_command("-m", "dev.stock_checkpoint", scratch)
        stream(command, environment, "make the test checkpoint")
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)


def _write(folder: Path) -> None:
    """Write both files; runs in a process of its own that has ComfyUI on its path."""
    from comfy.cli_args import args

    args.cpu = True
    import comfy.cldm.cldm
    import comfy.clip_model
    import comfy.ldm.models.autoencoder
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
    import comfy.ops
    import safetensors.torch

    operations = comfy.ops.disable_weight_init
    clip_config = Path(comfy.clip_model.__file__).with_name("sd1_clip_config.json")
    outward = {"out_channels": 4, "transformer_depth_output": [1, 1, 1, 1]}
    parts = {
        "model.diffusion_model.": openaimodel.UNetModel(**UNET, **outward, operations=operations),
        "cond_stage_model.transformer.": comfy.clip_model.CLIPTextModel(
            json.loads(clip_config.read_text()), None, "cpu", operations
        ),
        "first_stage_model.": comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=VAE, embed_dim=4),
    }
    weights = {
        prefix + name: _filled(prefix + name, tensor)
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
        if "text_projection" not in name  # SD1.5 files have none
    }
    safetensors.torch.save_file(weights, folder / CHECKPOINT)
    control = comfy.cldm.cldm.ControlNet(**UNET, hint_channels=3, operations=operations)
    weights = {name: _filled(name, tensor) for name, tensor in control.state_dict().items()}
    safetensors.torch.save_file(weights, folder / CONTROLNET)


def _filled(name: str, like: Any) -> Any:
    """Return seeded weights that keep activations near unit size; norms are the identity."""
    import torch

    if like.ndim < 2:
        value = torch.ones if name.endswith("weight") else torch.zeros
        return value(like.shape, dtype=torch.float16)
    generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
    scale = 1.0 / math.sqrt(math.prod(like.shape[1:]))
    return (torch.randn(like.shape, generator=generator) * scale).half()


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
