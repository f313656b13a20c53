"""Train the demo model: a small class-conditional diffusion UNet that draws butterflies.

The network is ComfyUI's own ``UNetModel``, unchanged, with self-attention only in its
middle block, on a 16x16 token grid. Data are drawn by ``butterflies.py``, new ones at every
step. The model predicts velocity under ComfyUI's discrete noise schedule, so
``ModelType.V_PREDICTION`` samples it without any change.

Usage, in the checkout's ``.venv``, which any command of ``dev.py`` makes:
``COMFYUI_PATH=path/to/ComfyUI python -m dev.demo_model.train``

It runs on the CPU and writes ``dev/demo_pack/weights.safetensors`` (EMA weights, fp16,
the configuration in the header) and ``dev/demo_model/train.log``. With ``--keep FOLDER``
the averages at earlier steps lie in that folder, for a table of effect against training.
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

from dev.demo_model import butterflies
from dev.demo_model.config import CONFIG, NULL_CLASS

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent / "demo_pack" / "weights.safetensors"
LOG = HERE / "train.log"


def import_comfyui() -> None:
    """Make ComfyUI importable, on the CPU."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = True


def build_unet(config: dict[str, Any]) -> torch.nn.Module:
    """Build ComfyUI's ``UNetModel`` in float32, and initialise it, which its layers skip.

    Args:
        config: A configuration of the shape of ``CONFIG``.
    """
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**copy.deepcopy(config["unet_config"]), dtype=torch.float32)
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
    gain = config["training"]["attention_gain"]
    for name, module in unet.named_modules():
        if name.endswith((".attn1.to_q", ".attn1.to_k")):
            module.weight.data.mul_(gain)
    torch.nn.init.zeros_(unet.out[-1].weight)
    torch.nn.init.zeros_(unet.out[-1].bias)
    return unet


class Run:
    """One training run: the network, its moving average, the data and the log."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Set everything up from the seed of a configuration of the shape of ``CONFIG``."""
        import numpy as np
        import torch

        self.config, self.settings = config, config["training"]
        torch.set_num_threads(self.settings["threads"])
        torch.manual_seed(self.settings["seed"])
        self.generator = torch.Generator().manual_seed(self.settings["seed"])
        self.rng = np.random.default_rng(self.settings["seed"])
        self.sigmas = noise_levels(config)
        self.unet = build_unet(config)
        width = config["unet_config"]["context_dim"]
        shape = (len(config["class_names"]), config["context_tokens"], width)
        self.tokens = torch.nn.Parameter(torch.randn(shape))
        self.parameters = [*self.unet.parameters(), self.tokens]
        self.count = sum(parameter.numel() for parameter in self.parameters)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.settings["learning_rate"],
            weight_decay=self.settings["weight_decay"],
        )

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw pictures and their classes; some classes are dropped to the empty one."""
        import torch

        size = self.settings["batch_size"]
        classes = self.rng.integers(0, len(butterflies.HUES), size)
        pictures = butterflies.draw(self.rng, classes, self.config["image_size"])
        classes = torch.from_numpy(classes) + 1
        drop = torch.rand(size, generator=self.generator) < self.settings["class_dropout"]
        return torch.from_numpy(pictures), classes.masked_fill(drop, NULL_CLASS)

    def loss(self) -> torch.Tensor:
        """Return the error of the predicted velocity on a new batch."""
        import torch

        clean, classes = self.batch()
        # One draw in each of `size` equal stretches of the schedule keeps the loss steady.
        size = len(clean)
        position = torch.rand(size, generator=self.generator) + torch.arange(size)
        timesteps = (position / size * len(self.sigmas)).long().clamp(max=len(self.sigmas) - 1)
        sigma = self.sigmas[timesteps][:, None, None, None]
        noise = torch.randn(clean.shape, generator=self.generator)
        scale = (sigma**2 + 1.0).rsqrt()
        target = (noise - sigma * clean) * scale
        noisy = (clean + sigma * noise) * scale
        output = self.unet(noisy, timesteps, context=self.tokens[classes])
        return torch.nn.functional.mse_loss(output, target)

    def step(self, number: int) -> float:
        """Take one step of the optimiser and return its loss."""
        import torch

        settings = self.settings
        warm = min(1.0, number / settings["warmup_steps"])
        cosine = 0.5 * (1.0 + math.cos(math.pi * number / settings["steps"]))
        for group in self.optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * warm * cosine
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(settings["ema_decay"], (1.0 + number) / (10.0 + number))
        with torch.no_grad():
            new = [parameter.detach() for parameter in self.parameters]
            torch._foreach_lerp_(self.average, new, 1.0 - decay)
        return loss.item()

    def save(self, path: Path, **figures: str) -> None:
        """Write the averaged weights in fp16, with the configuration in the header."""
        import safetensors.torch

        names = [f"diffusion_model.{name}" for name, _ in self.unet.named_parameters()]
        pairs = zip([*names, "class_tokens"], self.average, strict=True)
        tensors = {name: value.half().contiguous() for name, value in pairs}
        header = {
            "config": json.dumps(self.config, sort_keys=True),
            "parameters": str(self.count),
            **figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, str(path), metadata=header)


def noise_levels(config: dict[str, Any]) -> torch.Tensor:
    """Return the sigmas of ComfyUI's discrete schedule."""
    from comfy.model_sampling import ModelSamplingDiscrete

    class _Sampling:
        sampling_settings = config["sampling_settings"]

    return ModelSamplingDiscrete(_Sampling()).sigmas


def train(config: dict[str, Any], weights: Path, log: Path, keep: Path | None = None) -> None:
    """Train the model and write its weights and its log.

    Args:
        config: A configuration of the shape of ``CONFIG``.
        weights: Where the safetensors file goes.
        log: Where the text log goes.
        keep: Folder for the averages at earlier steps; None for none.
    """
    import_comfyui()
    run = Run(config)
    settings = config["training"]
    log.write_text(f"parameters={run.count} batch={settings['batch_size']}\n", encoding="ascii")
    started = time.perf_counter()
    window: list[float] = []
    for number in range(1, settings["steps"] + 1):
        window.append(run.step(number))
        last = number == settings["steps"]
        if number % settings["log_every"] == 0 or last:
            loss, window = sum(window) / len(window), []
            seconds = time.perf_counter() - started
            figures = {"final_loss": f"{loss:.5f}", "train_seconds": f"{seconds:.1f}"}
            line = f"step={number} loss={loss:.5f} seconds={seconds:.1f}"
            with log.open("a", encoding="ascii") as file:
                file.write(line + "\n")
            if last:
                run.save(weights, **figures)
            elif keep and number in settings["keep"]:
                run.save(keep / f"{number:05d}.safetensors", **figures)


def main() -> None:
    """Run the training from the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--steps", type=int, help="train another number of steps (a trial)")
    parser.add_argument("--seed", type=int, help="train from another seed (a trial)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the weights go")
    parser.add_argument("--log", type=Path, default=LOG, help="where the log goes")
    parser.add_argument("--keep", type=Path, help="folder for the averages at earlier steps")
    options = parser.parse_args()
    config = copy.deepcopy(CONFIG)
    for name in ("steps", "seed"):
        if getattr(options, name) is not None:
            config["training"][name] = getattr(options, name)
    train(config, options.weights, options.log, options.keep)


if __name__ == "__main__":
    main()
