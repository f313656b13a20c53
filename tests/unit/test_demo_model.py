"""The embedded demo model: its weights file, its log and the code that made it agree."""

import importlib.util
import json
import math
import re
import struct
import sys
from pathlib import Path

import pytest

from dev.demo_model import config as declared
from dev.demo_model import train

DEV = Path(__file__).resolve().parents[2] / "dev"
WEIGHTS = DEV / "demo_pack" / "weights.safetensors"
LOG = DEV / "demo_model" / "train.log"
MAX_BYTES = 5_000_000
STEP_LINE = re.compile(r"^step=(\d+) loss=([0-9.]+) seconds=([0-9.]+)$")


def _import_file(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def header():
    """The parsed header of the weights file."""
    with WEIGHTS.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


@pytest.fixture(scope="module")
def tensors(header):
    """The header's tensor entries by name."""
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


@pytest.fixture(scope="module")
def steps():
    """The log's step lines as tuples of step, loss and seconds."""
    matches = [STEP_LINE.match(line) for line in LOG.read_text(encoding="ascii").splitlines()]
    return [(int(m[1]), m[2], float(m[3])) for m in matches if m]


def test_weights_are_small():
    assert WEIGHTS.stat().st_size <= MAX_BYTES


def test_header_config_is_what_the_code_declares(header):
    assert json.loads(header["__metadata__"]["config"]) == declared.CONFIG


def test_tensors_are_half_precision_and_counted(header, tensors):
    assert {entry["dtype"] for entry in tensors.values()} == {"F16"}
    count = sum(math.prod(entry["shape"]) for entry in tensors.values())
    assert count == int(header["__metadata__"]["parameters"])


def test_class_tokens_fit_the_config(tensors):
    config = declared.CONFIG
    assert tensors["class_tokens"]["shape"] == [
        len(config["class_names"]),
        config["context_tokens"],
        config["unet_config"]["context_dim"],
    ]
    assert config["class_names"][declared.NULL_CLASS] == "nothing"


def test_every_tensor_belongs_to_the_model(tensors):
    others = [name for name in tensors if not name.startswith("diffusion_model.")]
    assert others == ["class_tokens"]


def test_self_attention_sits_in_the_middle_block_only(tensors):
    blocks = {name.split(".attn1.")[0] for name in tensors if ".attn1." in name}
    depth = declared.CONFIG["unet_config"]["transformer_depth_middle"]
    prefix = "diffusion_model.middle_block.1.transformer_blocks"
    assert blocks == {f"{prefix}.{index}" for index in range(depth)}


def test_log_ends_at_the_last_step_with_the_header_loss(header, steps):
    metadata = header["__metadata__"]
    last = steps[-1]
    assert last[0] == declared.CONFIG["training"]["steps"]
    assert last[1] == metadata["final_loss"]
    assert last[2] == pytest.approx(float(metadata["train_seconds"]), abs=1.0)


def test_log_shows_that_the_loss_fell(steps):
    assert float(steps[-1][1]) < 0.3 * float(steps[0][1])


def test_log_counts_the_parameters(header):
    first = LOG.read_text(encoding="ascii").splitlines()[0]
    assert f"parameters={header['__metadata__']['parameters']} " in first


def test_pack_reads_its_own_weights():
    pytest.importorskip("safetensors")
    torch = pytest.importorskip("torch")
    weights = _import_file("seg_demo_weights", DEV / "demo_pack" / "weights.py")
    assert weights.load_config() == declared.CONFIG
    tokens = weights.load_class_tokens()
    assert tokens.dtype == torch.float32
    assert bool(torch.isfinite(tokens).all())
    state = weights.load_unet_state()
    assert state
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_weights_fit_comfyui_unet():
    """The names and shapes are those of ComfyUI's own class, where there is one."""
    if "comfy" not in sys.modules and importlib.util.find_spec("comfy") is None:
        pytest.skip("ComfyUI is not importable")
    pytest.importorskip("safetensors")
    torch = pytest.importorskip("torch")
    train.import_comfyui()
    openaimodel = pytest.importorskip("comfy.ldm.modules.diffusionmodules.openaimodel")
    if not isinstance(getattr(openaimodel, "UNetModel", None), type) or not issubclass(
        openaimodel.UNetModel, torch.nn.Module
    ):
        pytest.skip("comfy is a stand-in here")
    weights = _import_file("seg_demo_weights", DEV / "demo_pack" / "weights.py")
    unet = openaimodel.UNetModel(**weights.load_config()["unet_config"], dtype=torch.float32)
    wanted = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.load_unet_state().items()}
    assert found == wanted
