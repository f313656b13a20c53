"""The embedded demo model: its data, its weights file, and the log of its training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from safetensors import safe_open

from dev.demo_model import butterflies
from dev.demo_model.config import CONFIG

DEV = Path(__file__).resolve().parents[2] / "dev"
WEIGHTS = DEV / "demo_pack" / "weights.safetensors"
LOG = (DEV / "demo_model" / "train.log").read_text(encoding="ascii")
MAX_BYTES = 5_000_000


def test_pictures_are_mirror_images_of_themselves_in_the_models_range():
    for size in (14, 32, 50):
        pictures, classes = butterflies.sample_data(3, 200, size)
        assert (pictures.shape, pictures.dtype) == ((200, 3, size, size), np.float32)
        np.testing.assert_array_equal(pictures, pictures[..., ::-1])
        assert classes[:5].tolist() == [0, 1, 2, 3, 0]
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


def test_the_weights_are_small_and_of_the_training_that_the_log_and_the_code_tell_of():
    assert WEIGHTS.stat().st_size <= MAX_BYTES
    with safe_open(WEIGHTS, "numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == CONFIG
    steps = re.findall(r"^step=(\d+) loss=([0-9.]+) ", LOG, re.MULTILINE)
    assert steps[-1] == (str(CONFIG["training"]["steps"]), metadata["final_loss"])
    assert float(steps[-1][1]) < 0.3 * float(steps[0][1])
