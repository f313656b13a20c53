"""Train the demo model: a small class-conditional pixel-space diffusion UNet of digits.

The network is ComfyUI's own ``UNetModel``, unchanged, with self-attention only in its
middle block, on a 16x16 token grid. Data are the 1797 handwritten digits that
scikit-learn carries (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0),
enlarged from 8x8 to 32x32 pixels. The model predicts velocity under ComfyUI's discrete
noise schedule, so ``ModelType.V_PREDICTION`` samples it without any change.

Usage: ``COMFYUI_PATH=/path/to/ComfyUI python dev/demo_model/train.py``

It runs on the CPU and writes ``dev/demo_pack/weights.safetensors`` (EMA weights, fp16,
the configuration in the header) and ``dev/demo_model/train.log``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent / "demo_pack" / "weights.safetensors"
LOG = HERE / "train.log"

NULL_CLASS = 0
CLASS_NAMES = ["nothing", *(str(digit) for digit in range(10))]

CONFIG: dict[str, Any] = {
    "format": 1,
    "data": "scikit-learn load_digits (UCI optical recognition of handwritten digits, CC BY 4.0)",
    "image_size": 32,
    "class_names": CLASS_NAMES,
    "context_tokens": 4,
    "prediction": "v_prediction",
    "sampling_settings": {
        "beta_schedule": "linear",
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "timesteps": 1000,
    },
    "unet_config": {
        "image_size": 32,
        "in_channels": 1,
        "out_channels": 1,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": [0, 1],
        "num_heads": -1,
        "num_head_channels": 32,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "transformer_depth": [0],
        "transformer_depth_middle": 4,
        "transformer_depth_output": [0, 0, 0],
        "context_dim": 64,
        "legacy": False,
    },
    "training": {
        "seed": 20240908,
        "steps": 1000,
        "batch_size": 32,
        "learning_rate": 1.5e-3,
        "warmup_steps": 100,
        "weight_decay": 0.01,
        "ema_decay": 0.995,
        "class_dropout": 0.15,
        "attention_gain": 2.5,
        "shift_pixels": 1,
        "log_every": 50,
        "threads": 1,
    },
}


def load_digits_images(size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Return the data set as pictures in the model's own range.

    Args:
        size: Edge of the square pictures in pixels; a margin of 1/16 is left empty.

    Returns:
        A pair ``(images, labels)``: float32 array ``(1797, size, size)`` in [-1, 1] with
        the ink bright, and the int64 array of digits.
    """
    import torch
    from sklearn.datasets import load_digits

    digits = load_digits()
    margin = size // 16
    images = torch.from_numpy(digits.images).float()[:, None] / 16.0
    images = torch.nn.functional.interpolate(
        images, size=size - 2 * margin, mode="bicubic", align_corners=False
    )
    # The 8x8 values count ink pixels of a finer bitmap, so a soft threshold brings the
    # outline of the stroke back; set above one half, it keeps small loops open.
    images = ((images - 0.35) / 0.55).clamp(0.0, 1.0)
    images = images * images * (3.0 - 2.0 * images)
    images = torch.nn.functional.pad(images, (margin,) * 4)
    images = images[:, 0] * 2.0 - 1.0
    return images.numpy(), digits.target.astype("int64")


def import_comfyui() -> Any:
    """Make ComfyUI importable, on the CPU unless it has been set up already.

    Returns:
        The ``comfy.cli_args.args`` namespace in force.
    """
    path = os.environ.get("COMFYUI_PATH")
    if path and path not in sys.path:
        sys.path.insert(0, path)
    from comfy.cli_args import args

    if "comfy.model_management" not in sys.modules:
        args.cpu = True
    return args


def build_unet(config: dict[str, Any] | None = None) -> torch.nn.Module:
    """Build and initialise ComfyUI's ``UNetModel`` for training.

    Args:
        config: A configuration of the shape of ``CONFIG``, which is the default.

    Returns:
        The float32 module. ComfyUI's layers skip their initialisation, so it is done here.
    """
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**copy.deepcopy((config or CONFIG)["unet_config"]), dtype=torch.float32)
    for module in unet.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.Linear.reset_parameters(module)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.Conv2d.reset_parameters(module)
        elif isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    # Without a push, so small a network leaves its attention almost uniform, a plain
    # average that nothing about the queries changes; started sharp, it learns to use it.
    gain = (config or CONFIG)["training"]["attention_gain"]
    for name, module in unet.named_modules():
        if name.endswith((".attn1.to_q", ".attn1.to_k")):
            module.weight.data.mul_(gain)
    torch.nn.init.zeros_(unet.out[-1].weight)
    torch.nn.init.zeros_(unet.out[-1].bias)
    return unet


def shift_batch(images: torch.Tensor, generator: torch.Generator, pixels: int) -> torch.Tensor:
    """Move every picture of a batch by up to ``pixels`` along each axis.

    Args:
        images: Tensor ``(B, 1, H, W)`` in [-1, 1].
        generator: The random generator to draw from.
        pixels: Largest move; what leaves one edge is replaced by background.

    Returns:
        The moved batch.
    """
    import torch

    if pixels <= 0:
        return images
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, (pixels,) * 4, value=-1.0)
    moves = torch.randint(0, 2 * pixels + 1, (images.shape[0], 2), generator=generator)
    moved = [
        picture[:, dy : dy + height, dx : dx + width]
        for picture, (dy, dx) in zip(padded, moves.tolist(), strict=True)
    ]
    return torch.stack(moved)


def train(
    config: dict[str, Any] | None = None, weights_path: Path = WEIGHTS, log_path: Path = LOG
) -> float:
    """Train the model and write its weights and its log.

    Args:
        config: A configuration of the shape of ``CONFIG``, which is the default.
        weights_path: Where the safetensors file goes.
        log_path: Where the text log goes.

    Returns:
        The mean loss over the last logged stretch of steps.
    """
    config = config or CONFIG
    import_comfyui()
    import safetensors.torch
    import torch
    from comfy.model_sampling import ModelSamplingDiscrete

    settings = config["training"]
    torch.manual_seed(settings["seed"])
    torch.set_num_threads(settings["threads"])
    generator = torch.Generator().manual_seed(settings["seed"])

    images, labels = load_digits_images(config["image_size"])
    images = torch.from_numpy(images)[:, None]
    labels = torch.from_numpy(labels) + 1

    class _SamplingConfig:
        sampling_settings = config["sampling_settings"]

    sigmas = ModelSamplingDiscrete(_SamplingConfig()).sigmas
    unet = build_unet(config)
    context_dim = config["unet_config"]["context_dim"]
    tokens = torch.nn.Parameter(
        torch.randn(len(config["class_names"]), config["context_tokens"], context_dim)
    )
    parameters = [*unet.parameters(), tokens]
    count = sum(parameter.numel() for parameter in parameters)
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
    )

    lines = []

    def log(text: str) -> None:
        lines.append(text)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    log(
        f"data={len(images)} pictures of {config['image_size']}x{config['image_size']} "
        f"parameters={count} torch={torch.__version__}"
    )
    started = time.perf_counter()
    window = []
    steps = settings["steps"]
    final_loss = float("nan")
    for step in range(1, steps + 1):
        warm = min(1.0, step / settings["warmup_steps"])
        rate = settings["learning_rate"] * warm * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate

        size = settings["batch_size"]
        pick = torch.randint(0, len(images), (size,), generator=generator)
        clean = shift_batch(images[pick], generator, settings["shift_pixels"])
        drop = torch.rand(size, generator=generator) < settings["class_dropout"]
        classes = torch.where(drop, torch.full_like(labels[pick], NULL_CLASS), labels[pick])
        # One draw in each of `size` equal stretches of the schedule keeps the loss steady.
        position = torch.rand(size, generator=generator) + torch.arange(size)
        timesteps = (position / size * len(sigmas)).long().clamp(max=len(sigmas) - 1)
        sigma = sigmas[timesteps][:, None, None, None]
        noise = torch.randn(clean.shape, generator=generator)
        scale = (sigma**2 + 1.0).rsqrt()
        target = (noise - sigma * clean) * scale

        with torch.autocast("cpu", torch.bfloat16):
            output = unet((clean + sigma * noise) * scale, timesteps, context=tokens[classes])
        loss = torch.nn.functional.mse_loss(output.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        decay = min(settings["ema_decay"], (1.0 + step) / (10.0 + step))
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - decay)
        window.append(loss.item())
        if step % settings["log_every"] == 0 or step == steps:
            final_loss = round(sum(window) / len(window), 5)
            window = []
            seconds = time.perf_counter() - started
            log(f"step={step} loss={final_loss:.5f} lr={rate:.6f} seconds={seconds:.1f}")

    seconds = round(time.perf_counter() - started, 1)
    names = [f"diffusion_model.{name}" for name, _ in unet.named_parameters()] + ["class_tokens"]
    tensors = {name: value.half().contiguous() for name, value in zip(names, average, strict=True)}
    metadata = {
        "config": json.dumps(config, sort_keys=True),
        "parameters": str(count),
        "final_loss": f"{final_loss:.5f}",
        "train_seconds": f"{seconds:.1f}",
    }
    safetensors.torch.save_file(tensors, str(weights_path), metadata=metadata)
    Path(log_path).write_text("\n".join(lines) + "\n", encoding="ascii")
    return final_loss


def main() -> None:
    """Run the training from the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--steps", type=int, help="train another number of steps (a trial)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the weights go")
    parser.add_argument("--log", type=Path, default=LOG, help="where the log goes")
    options = parser.parse_args()
    config = copy.deepcopy(CONFIG)
    if options.steps:
        config["training"]["steps"] = options.steps
    train(config, options.weights, options.log)


if __name__ == "__main__":
    main()
