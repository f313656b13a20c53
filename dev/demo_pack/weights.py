"""Reading of the demo model's weights file, without ComfyUI."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHIPPED = Path(__file__).resolve().parent / "weights.safetensors"
WEIGHTS_PATH = Path(os.environ.get("SEG_DEMO_WEIGHTS") or SHIPPED)  # another state of training
UNET_PREFIX = "diffusion_model."
TOKENS_KEY = "class_tokens"


@lru_cache(maxsize=1)
def load_config() -> dict[str, Any]:
    """Return the configuration that the weights file carries in its header."""
    return json.loads(read_metadata()["config"])


@lru_cache(maxsize=1)
def read_metadata() -> dict[str, str]:
    """Return the header's text entries: config, parameters, final_loss, train_seconds."""
    from safetensors import safe_open

    with safe_open(str(WEIGHTS_PATH), framework="numpy") as file:
        return file.metadata()


def load_unet_state() -> dict[str, torch.Tensor]:
    """Return the UNet's state dict under the names that ``UNetModel`` uses."""
    from safetensors.torch import load_file

    state = load_file(str(WEIGHTS_PATH))
    return {
        name[len(UNET_PREFIX) :]: value
        for name, value in state.items()
        if name.startswith(UNET_PREFIX)
    }


@lru_cache(maxsize=1)
def load_class_tokens() -> torch.Tensor:
    """Return the float32 context tokens of all classes, ``(classes, tokens, dim)``."""
    from safetensors import safe_open

    with safe_open(str(WEIGHTS_PATH), framework="pt") as file:
        return file.get_tensor(TOKENS_KEY).float()
