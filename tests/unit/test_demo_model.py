"""The embedded demo model: its data, its weights file, its log and the code that made them."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from dev.demo_model import butterflies
from dev.demo_model import config as declared

DEV = Path(__file__).resolve().parents[2] / "dev"
WEIGHTS = DEV / "demo_pack" / "weights.safetensors"
LOG = (DEV / "demo_model" / "train.log").read_text(encoding="ascii")
MAX_BYTES = 5_000_000

# The data.


@pytest.mark.parametrize("size", [2, 14, 32, 50])
def test_pictures_are_mirror_images_of_themselves_in_the_models_range(size):
    pictures, classes = butterflies.sample_data(3, 200, size)
    assert (pictures.shape, pictures.dtype) == ((200, 3, size, size), np.float32)
    np.testing.assert_array_equal(pictures, pictures[..., ::-1])
    assert classes[:5].tolist() == [0, 1, 2, 3, 0]
    if size > 2:
        assert -1.0 <= pictures.min() < -0.9
        assert 0.9 < pictures.max() <= 1.0


def test_the_seed_decides_everything_and_no_two_pictures_are_alike():
    first, again, other = (butterflies.sample_data(seed, 300)[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    flat = np.concatenate([first, other]).reshape(600, -1).astype(np.float64)
    squares = (flat**2).sum(axis=1)
    apart = squares[:, None] + squares[None] - 2.0 * flat @ flat.T
    apart[np.diag_indices(600)] = np.inf
    assert np.sqrt(apart.min() / flat.shape[1]) > 0.05


# The weights.


@pytest.fixture(scope="module")
def header():
    """The parsed header of the weights file."""
    with WEIGHTS.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


@pytest.fixture(scope="module")
def weights():
    """The pack's module that reads the weights."""
    spec = importlib.util.spec_from_file_location("seg_demo", DEV / "demo_pack" / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_small_and_its_header_is_what_the_code_declares(header):
    config = declared.CONFIG
    assert WEIGHTS.stat().st_size <= MAX_BYTES
    assert json.loads(header["__metadata__"]["config"]) == config
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"F16"}
    count = sum(math.prod(entry["shape"]) for entry in tensors.values())
    assert count == int(header["__metadata__"]["parameters"])
    shape = [len(config["class_names"]), config["context_tokens"]]
    assert tensors["class_tokens"]["shape"] == [*shape, config["unet_config"]["context_dim"]]
    assert config["class_names"][declared.NULL_CLASS] == "nothing"
    blocks = {name.split(".attn1.")[0] for name in tensors if ".attn1." in name}
    depth = config["unet_config"]["transformer_depth_middle"]
    prefix = "diffusion_model.middle_block.1.transformer_blocks"
    assert blocks == {f"{prefix}.{index}" for index in range(depth)}


def test_the_log_is_of_these_weights_and_the_loss_fell(header):
    metadata = header["__metadata__"]
    steps = re.findall(r"^step=(\d+) loss=([0-9.]+) seconds=([0-9.]+)$", LOG, re.MULTILINE)
    step, loss, seconds = steps[-1]
    assert (int(step), loss) == (declared.CONFIG["training"]["steps"], metadata["final_loss"])
    assert float(seconds) == pytest.approx(float(metadata["train_seconds"]), abs=1.0)
    assert float(loss) < 0.3 * float(steps[0][1])
    assert f"parameters={metadata['parameters']} " in LOG.splitlines()[0]


def test_the_pack_reads_its_own_weights(weights):
    assert weights.load_config() == declared.CONFIG
    tokens = weights.load_class_tokens()
    assert tokens.dtype == torch.float32
    state = weights.load_unet_state()
    assert state
    assert all(bool(torch.isfinite(value).all()) for value in (tokens, *state.values()))
