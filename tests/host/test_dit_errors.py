"""Transformers that cannot be guided say so and why; pages say what the code does."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import comfyui_version
import pytest
import torch
from choice import some
from dit_models import ALL, KINDS, TINY, sampled, tiny_dit
from dit_oracle import KEYS_TOO, PIXELS, block_modules, selector
from family_oracle import guide
from host_models import part, seg

from seg_core import Block, Target, describe_targets

ROOT = Path(__file__).resolve().parents[2]
UNSUPPORTED = {
    "comfy.ldm.pixart.pixartms.PixArtMS": "PixArt",
    "comfy.ldm.hydit.models.HunYuanDiT": "HunyuanDiT",
    "comfy.ldm.ernie.model.ErnieImageModel": "ERNIE-Image",
    "comfy.ldm.seedvr.model.NaDiT": "SeedVR2",
    "comfy.ldm.minimax.model.MiniMaxH3Model": "MiniMax H3",
    "comfy.ldm.wan.ar_model.CausalWanModel": "Wan autoregressive",
    "comfy.ldm.wan.model_animate2.WanAnimate2Model": "Wan Animate 2",
    "comfy.ldm.sensenova.model.SenseNovaU15": r"SenseNova U1\.5",
    "comfy.ldm.prism.model.Prism": "Prism",
}
NEWER_THAN_0_33 = {
    "kandinsky6.model.Kandinsky6NativeAVDiT",
    "prism.model.Prism",
    "qwen_image21.model.QwenImage21Transformer2DModel",
    "sensenova.model.SenseNovaU15",
}


families = part("host.networks.dit.families")


def host_class(path):
    """Return a class of the host by its path, or None where this ComfyUI has none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def model_around(network):
    """Return what the node needs of a model whose network is never run."""
    return SimpleNamespace(model=SimpleNamespace(), get_model_object=lambda _name: network)


@pytest.mark.parametrize("path", UNSUPPORTED)
def test_a_family_out_of_reach_is_an_error_that_names_it_and_says_why(path):
    cls = host_class(path)
    if cls is None:
        pytest.skip("this ComfyUI has no such family")
    network = cls.__new__(cls)
    torch.nn.Module.__init__(network)
    with pytest.raises(ValueError, match=f"{UNSUPPORTED[path]} models .*: ") as error:
        seg(model_around(network))
    assert cls.__name__ in str(error.value)


def test_an_unknown_network_is_an_error_that_says_how_to_report_it():
    with pytest.raises(ValueError, match=r"network Linear \(torch\.nn.*issues"):
        seg(model_around(torch.nn.Linear(2, 2)))


def test_blocks_and_heads_that_do_not_exist_are_errors_that_list_what_does():
    with pytest.raises(ValueError, match=r"double\.0-1, single\.0-2"):
        seg(tiny_dit("flux"), blocks="double.7-9")
    with pytest.raises(ValueError, match="this model has 0-4"):
        seg(tiny_dit("sd3"), blocks="7-9")
    with pytest.raises(ValueError, match=r"block double\.1 has 2 heads.*no head 2"):
        seg(tiny_dit("flux"), blocks="double.1:h2")


@pytest.mark.skipif("pixeldit" not in KINDS, reason="this ComfyUI has no such network")
def test_blocks_that_the_image_does_not_enter_are_refused():
    with pytest.raises(ValueError, match=r"do not enter block pixel\.0"):
        guide("TPG", tiny_dit("pixeldit"), blocks="pixel.0")


@pytest.mark.skipif("hidream_o1" not in KINDS, reason="this ComfyUI has no such network")
@pytest.mark.parametrize("method", ["TPG", "SLG"])
def test_blocks_that_hand_on_more_than_tokens_are_refused(method):
    with pytest.raises(ValueError, match=r"block 1 of HiDream-O1\. Choose other blocks of 0-3"):
        guide(method, tiny_dit("hidream_o1"), blocks="1")


PICTURES = [k for k in KINDS if not TINY[k].frames or k in ("qwen", "krea2", "joyimage")]


@pytest.mark.parametrize("kind", some(PICTURES, "flux", "qwen"))
def test_image_models_have_no_time_and_say_so(kind):
    with pytest.raises(ValueError, match=r"smooths over the frames of a video, and .* single pic"):
        seg(tiny_dit(kind), axes="time")


def test_a_video_of_one_frame_says_so_once_and_changes_nothing(caplog):
    model, shape = tiny_dit("wan"), (1, 16, 1, 6, 8)
    guided = sampled(seg(model, axes="time"), "wan", shape)
    assert torch.equal(sampled(model, "wan", shape), guided)
    assert sum("there is one frame" in message for message in caplog.messages) == 1
    assert not any("had no effect" in message for message in caplog.messages)


# The table of families, the page of it, and the help.


def test_each_row_of_the_table_is_a_class_of_the_newest_comfyui():
    names = [name for family in families.FAMILIES for name in (family.network, *family.variants)]
    missing = {name for name in names if host_class("comfy.ldm." + name) is None}
    version = [int(part) for part in comfyui_version.__version__.split(".")]
    if version >= [0, 30]:
        newer = version >= [0, 33]
        older = set() if newer else {"wan.model_animate2.WanAnimate2Model"}
        assert missing - NEWER_THAN_0_33 == older
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", ALL)
def test_every_block_of_a_family_and_every_method_of_the_page_can_be_had(kind):
    model = tiny_dit(kind)
    last = len(block_modules(model)) - 1
    assert seg(model, blocks=selector(model, kind, range(last + 1))) is not model
    first = selector(model, kind, [0])
    beyond = first.replace("0", "99")
    with pytest.raises(ValueError, match="this model has"):
        seg(model, blocks=f"{first},{beyond}")
    if kind in KEYS_TOO:
        assert guide("SLG", model, what="attention") is not model
        return
    assert guide("SAG", model) is not model
    assert guide("SLG", model) is not model
    assert guide("TPG", model, **({"blocks": "patch"} if kind in PIXELS else {})) is not model


UNETS = (
    "| SD1.x, SD2.x, SDXL and other UNets | yes | no: single pictures | yes | yes | middle block |",
    "| Stable Video Diffusion | yes | yes | yes | yes | middle block |",
)


OLDER, NEWER = (SimpleNamespace(caption_proj_before_connector=new) for new in (False, True))


MASKS = {
    "LTX-2": "only without sound: both share a latent",
    "Kandinsky 6": "no: its sound and video share a latent",
}


def blocks_in_code(numbers):
    """Return numbers of blocks as the page writes them."""
    return f"`{', '.join(map(str, numbers))}`".replace("7, 8, 9", "7-9")


def row(family):
    """Return one row of the page, from what the code knows of a family."""
    if family.unsupported:
        return f"| {family.name} | none: {family.unsupported} | | | | |"
    time = "yes" if family.video else "no: single pictures"
    unknown = [part for part in family.parts if part not in family.carried]
    lacking = [p for p, c in family.carried.items() if c.image is None]
    shuffled = "yes"
    if unknown:
        shuffled = "no: its blocks hand on more than tokens"
    elif lacking:
        shuffled = f"yes, but not in `{lacking[0]}`: the image's tokens do not enter there"
    skip = "middle range"
    if unknown:
        skip = "attention only: its blocks hand on more than tokens"
    elif family.skip(OLDER):
        skip = blocks_in_code(family.skip(OLDER))
        if family.skip(NEWER) != family.skip(OLDER):
            skip += f", from 2.3 on {blocks_in_code(family.skip(NEWER))}"
    mask = MASKS.get(family.name, "yes")
    return f"| {family.name} | yes | {time} | {mask} | {shuffled} | {skip} |"


def test_the_page_has_a_row_for_each_family_that_says_what_the_code_does():
    lines = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line.startswith("| ") and "SEG, PAG" not in line]
    assert found == [*UNETS, *map(row, families.FAMILIES)]


AUTO = re.compile(r"^\| ([^|`]+) \| (\d+)(?: \+ (\d+))? \| `([\w., -]+)` \|$", re.MULTILINE)
NAMES = {"Flux.1": "Flux", "Z-Image": "Z-Image", "Wan 14B": "Wan", "SD3.5 Medium": "SD3.5"}


@pytest.mark.parametrize(
    "page", ["SEGuidance.md", *(f"SEGuidance/{n}.md" for n in ("zh", "ja", "ko"))]
)
def test_auto_is_what_the_help_page_says(page):
    rows = AUTO.findall((ROOT / "web" / "docs" / page).read_text(encoding="utf-8"))
    assert len(rows) == 7
    for model, *depths, auto in rows:
        name = NAMES.get(model.split(",")[0], model.split(",")[0])
        family = next(
            each for each in families.FAMILIES if name in each.name.replace(" / ", ", ").split(", ")
        )
        sizes = [int(depth) for depth in depths if depth]
        blocks = [
            Block(part, i)
            for part, size in zip(family.parts, sizes, strict=True)
            for i in range(size)
        ]
        chosen = [blocks[n] for n in families.auto_range(len(blocks))]
        targets = [Target(block.part, block.index) for block in chosen]
        assert describe_targets(targets, blocks) == auto, model
