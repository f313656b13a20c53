"""One real ComfyUI server for all tests of this folder, with the made checkpoint in place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dev import stock_checkpoint
from dev.host import Server
from dev.machine import link_file

PICTURE = "example.png"


@pytest.fixture(scope="session")
def names() -> dict[str, str]:
    """File names, as ComfyUI lists them, of what the workflows load."""
    return {
        "checkpoint": stock_checkpoint.CHECKPOINT,
        "controlnet": stock_checkpoint.CONTROLNET,
        "image": PICTURE,
    }


@pytest.fixture(scope="session")
def host(names: dict[str, str]) -> Iterator[Server]:
    """A running server."""
    tree = Path(os.environ["COMFYUI_PATH"]).resolve()
    made = stock_checkpoint.files(tree)
    with Server(tree, demo=True) as server:
        link_file(made["checkpoint"], server.base / "models/checkpoints" / names["checkpoint"])
        link_file(made["controlnet"], server.base / "models/controlnet" / names["controlnet"])
        _picture().save(server.base / "input" / names["image"])
        yield server


def _picture() -> Image.Image:
    """A picture with edges and gradients, for ControlNets and image inputs."""
    rows, columns = np.mgrid[0:128, 0:128]
    circle = ((rows - 64) ** 2 + (columns - 50) ** 2 < 900) * 200
    return Image.fromarray(np.stack([circle, rows * 2, columns * 2], -1).astype(np.uint8))
