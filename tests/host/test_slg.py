"""Skip Layer Guidance is ComfyUI's node at its settings; what `auto` and the seed choose."""

from __future__ import annotations

import importlib

import pytest
import torch
from choice import some
from dit_models import KINDS, tiny_dit
from dit_oracle import CELLS, CORE, exact_dit, sampled, selector, shape_of
from family_oracle import guide
from host_models import PACK
from host_oracle import deviation

EXACT = 1e-6
SCALE = 1.0
LISTED = ("sd3", "flux", "chroma", "qwen", "hunyuan_video", "aura", "wan")


def cores_node(model, **widgets):
    node = importlib.import_module("comfy_extras.nodes_slg").SkipLayerGuidanceDiT
    defaults = {i.id: i.default for i in node.define_schema().inputs if i.id != "model"}
    return node.execute(model, **defaults | widgets)[0]


@pytest.mark.parametrize("kind", some([k for k in KINDS if k in LISTED], "sd3", "flux"))
def test_cores_node_gives_the_same_at_its_settings(kind):
    model = exact_dit(kind)
    blocks = selector(model, kind, [1, 2] if kind != "aura" else [0, 1])
    lists = {"double_layers": [], "single_layers": []}
    for name in blocks.split(","):
        *named, number = name.split(".")
        lists[f"{named[0] if named else 'double'}_layers"].append(number)
    lists = {name: ", ".join(numbers) for name, numbers in lists.items()}
    theirs = cores_node(model, scale=SCALE, start_percent=0.0, end_percent=1.0, **lists)
    ours = guide("SLG", model, SCALE, blocks=blocks)
    steps = 1 if kind == "wan" else 2  # the host embeds its patches in float32
    mine, theirs, plain = (sampled(m, kind, steps=steps, cfg=1.5) for m in (ours, theirs, model))
    assert deviation(mine, theirs) < EXACT
    assert deviation(mine, plain) > 1e-2


def test_the_defaults_are_those_of_cores_node_on_sd35():
    """A network as deep as SD3.5: blocks 7 to 9, scale 3, the window from 0.01 to 0.15."""
    slg = importlib.import_module(PACK + ".nodes.slg").SEGuidanceSLG
    model = tiny_dit("sd3", num_blocks=12, dtype=torch.float64)
    given = {i.id: getattr(i, "default", None) for i in slg.define_schema().inputs}
    guided = slg.execute(model, **{k: v for k, v in given.items() if v is not None})[0]
    mine, theirs, plain = (
        sampled(m, "sd3", steps=8, cfg=1.5) for m in (guided, cores_node(model), model)
    )
    assert deviation(mine, theirs) < EXACT
    assert deviation(mine, plain) > 1e-2


AUTO = [
    ("SLG", "ltxv", 28, "14, 19"),
    ("SLG", "wan", 30, "10"),
    ("SLG", "ltxv", 10, "3-4"),
    ("SLG", "flux", None, "double.1, single.0"),
    *(("SAG", kind, None, "double.1" if kind == "flux" else "1") for kind in CORE),
]


@pytest.mark.parametrize(("method", "kind", "depth", "blocks"), AUTO)
def test_auto_is_what_the_help_says(method, kind, depth, blocks):
    model = tiny_dit(kind, num_layers=depth) if depth else tiny_dit(kind)
    auto, named = (
        sampled(guide(method, model, blocks=chosen), kind, steps=1) for chosen in ("auto", blocks)
    )
    assert torch.equal(auto, named)


def test_a_block_that_writes_into_its_arguments_leaves_the_rows_that_skip_it_alone():
    """The rows of branch `free` come before those that compute the block."""
    model, blocks = exact_dit("flux"), "double.1"
    skipping = guide("SLG", model, SCALE, blocks=blocks, branch="free")
    joined, whole = (
        sampled(guide("SLG", skipping, SCALE, blocks=blocks, reuse=reuse), "flux", cfg=1.5)
        for reuse in (True, False)
    )
    assert deviation(joined, whole) < EXACT


def test_the_order_of_tokens_is_the_seeds_and_the_same_in_each_run():
    model, noise = guide("TPG", tiny_dit("flux")), torch.ones(shape_of("flux", CELLS))
    first, again, other = (sampled(model, "flux", seed=seed, noise=noise) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert deviation(first, other) > 1e-3


@pytest.mark.parametrize(
    ("kind", "blocks", "scale"), [("ltxv", "auto", 1), ("wan", "random", 0.25)]
)
def test_a_default_that_others_found_too_high_is_said_once_and_kept(kind, blocks, scale, caplog):
    importlib.import_module(PACK + ".nodes.slg")._advise.cache_clear()
    caplog.set_level("INFO")
    for _ in range(2):
        guided = guide("SLG", tiny_dit(kind), 3.0, blocks=blocks)
    guide("SLG", tiny_dit(kind), 2.0, blocks=blocks)
    said = [message for message in caplog.messages if "try scale" in message]
    assert len(said) == 1
    assert f"try scale {scale:g}, " in said[0]
    function = guided.model_options["sampler_post_cfg_function"][-1]
    assert function.branch.scale == 3.0
