"""Sample the demo model inside this process and save what it draws.

Usage: ``COMFYUI_PATH=/path/to/ComfyUI python dev/demo_model/sample.py --help``

``sample`` is the hook for measuring guidance: it takes any patched model, so a caller
may load the model with ``load_pack``, patch it, and hand the pictures to ``evaluate``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import train

if TYPE_CHECKING:
    import numpy as np

PACK = train.HERE.parent / "demo_pack"
PACK_NAME = "seg_demo_pack"


def load_pack() -> ModuleType:
    """Import the demo pack's nodes module the way ComfyUI would, from its folder.

    Returns:
        The module ``nodes`` of the pack.
    """
    train.import_comfyui()
    if PACK_NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK_NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK_NAME] = module
        spec.loader.exec_module(module)
    return importlib.import_module(PACK_NAME + ".nodes")


def prompt_labels(prompt: str, batch: int) -> list[int]:
    """Return the labels of a batch: -1 without a prompt, else the digit.

    Args:
        prompt: One of the class names.
        batch: Number of pictures.
    """
    return [-1 if prompt == train.CLASS_NAMES[0] else int(prompt)] * batch


def sample(
    model: Any,
    prompt: str,
    batch: int,
    *,
    seed: int = 0,
    steps: int = 20,
    cfg: float = 1.0,
    sampler: str = "euler",
    scheduler: str = "normal",
) -> np.ndarray:
    """Sample one batch through ComfyUI's own sampling code.

    Args:
        model: The model patcher, patched or not.
        prompt: One of the class names; the negative prompt is always "nothing".
        batch: Number of pictures.
        seed: Seed of the noise.
        steps: Sampling steps.
        cfg: Classifier-free guidance scale.
        sampler: A sampler's name.
        scheduler: A scheduler's name.

    Returns:
        Float32 array ``(batch, height, width)`` in [0, 1].
    """
    import comfy.sample

    pack = load_pack()
    size = train.CONFIG["image_size"]
    latent = pack.SEGDemoEmptyLatent.execute(size, size, batch).result[0]["samples"]
    positive = pack.SEGDemoPrompt.execute(prompt).result[0]
    negative = pack.SEGDemoPrompt.execute(train.CLASS_NAMES[0]).result[0]
    latent = comfy.sample.fix_empty_latent_channels(model, latent, 1)
    noise = comfy.sample.prepare_noise(latent, seed)
    result = comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        positive,
        negative,
        latent,
        disable_pbar=True,
        seed=seed,
    )
    return ((result[:, 0].float() + 1.0) * 0.5).clamp(0.0, 1.0).cpu().numpy()


def save_grid(images: np.ndarray, path: Path | str, columns: int = 10, scale: int = 4) -> None:
    """Write pictures as one PNG.

    Args:
        images: Array ``(N, H, W)`` in [0, 1].
        path: The PNG to write.
        columns: Pictures in a row.
        scale: Whole factor of enlargement.
    """
    import numpy as np
    from PIL import Image

    count, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 2), columns * (width + 2)), 0.35, dtype=np.float32)
    for index, image in enumerate(images):
        top = index // columns * (height + 2) + 1
        left = index % columns * (width + 2) + 1
        sheet[top : top + height, left : left + width] = image
    picture = Image.fromarray((sheet * 255.0 + 0.5).astype("uint8"))
    picture = picture.resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.NEAREST)
    picture.save(path)


def main() -> None:
    """Sample from the command line."""
    parser = argparse.ArgumentParser(description="Sample the demo model on the CPU.")
    parser.add_argument("output", type=Path, help="the .npz to write")
    parser.add_argument("--png", type=Path, help="also write a PNG of the pictures")
    parser.add_argument("--prompts", nargs="+", default=train.CLASS_NAMES[1:])
    parser.add_argument("--batch", type=int, default=10, help="pictures of each prompt")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--scheduler", default="normal")
    options = parser.parse_args()

    import numpy as np

    model = load_pack().SEGDemoModelLoader.execute().result[0]
    started = time.perf_counter()
    images, labels = [], []
    for index, prompt in enumerate(options.prompts):
        images.append(
            sample(
                model,
                prompt,
                options.batch,
                seed=options.seed + index,
                steps=options.steps,
                cfg=options.cfg,
                sampler=options.sampler,
                scheduler=options.scheduler,
            )
        )
        labels += prompt_labels(prompt, options.batch)
    images = np.concatenate(images)
    seconds = time.perf_counter() - started
    sys.stdout.write(f"pictures={len(images)} seconds={seconds:.1f}\n")
    np.savez_compressed(options.output, images=images, labels=np.array(labels))
    if options.png:
        save_grid(images, options.png, columns=min(options.batch, 16))


if __name__ == "__main__":
    main()
