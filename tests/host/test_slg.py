"""Skip Layer Guidance is ComfyUI's node at its settings; which blocks are chosen, and drawn."""

from __future__ import annotations

import pytest
import torch
from choice import pairs, some
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from dit_models import KINDS, sampled, shape_of, tiny_dit
from dit_oracle import CORE, block_modules, exact_model, selector
from family_oracle import guide, skipped
from host_models import part, sample, shared_model
from host_oracle import deviation, guided_by_hand

from seg_core import draw_blocks

EXACT = 1e-6
SCALE = 1.0
LISTED = ("sd3", "flux", "chroma", "qwen", "hunyuan_video", "aura", "wan")


def cores_node(model, **widgets):
    inputs = SkipLayerGuidanceDiT.define_schema().inputs
    defaults = {i.id: i.default for i in inputs if i.id != "model"}
    return SkipLayerGuidanceDiT.execute(model, **defaults | widgets)[0]


@pytest.mark.parametrize("kind", some([k for k in KINDS if k in LISTED], "sd3", "flux"))
def test_cores_node_gives_the_same_at_its_settings(kind):
    model = exact_model(kind)
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
    slg = part("slg").SEGuidanceSLG
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
    model, blocks = exact_model("flux"), "double.1"
    skipping = guide("SLG", model, SCALE, blocks=blocks, branch="free")
    joined, whole = (
        sampled(guide("SLG", skipping, SCALE, blocks=blocks, reuse=reuse), "flux", cfg=1.5)
        for reuse in (True, False)
    )
    assert deviation(joined, whole) < EXACT


def test_the_order_of_tokens_is_the_seeds_and_the_same_in_each_run():
    model, noise = guide("TPG", tiny_dit("flux")), torch.ones(shape_of("flux"))
    first, again, other = (sampled(model, "flux", seed=seed, noise=noise) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert deviation(first, other) > 1e-3


@pytest.mark.parametrize(
    ("kind", "blocks", "scale"), [("ltxv", "auto", 1), ("wan", "random", 0.25)]
)
def test_a_default_that_others_found_too_high_is_said_once_and_kept(kind, blocks, scale, caplog):
    part("slg")._advise.cache_clear()
    caplog.set_level("INFO")
    for _ in range(2):
        guided = guide("SLG", tiny_dit(kind), 3.0, blocks=blocks)
    guide("SLG", tiny_dit(kind), 2.0, blocks=blocks)
    said = [message for message in caplog.messages if "try scale" in message]
    assert len(said) == 1
    assert f"try scale {scale:g}, " in said[0]
    function = guided.model_options["sampler_post_cfg_function"][-1]
    assert function.branch.scale == 3.0


# Random skipped blocks.


@pytest.mark.parametrize(
    *pairs(blocks=["random:2", "Random:1, 1-2"], cfg=[1.0, 4.0], reuse=[True, False])
)
def test_blocks_drawn_anew_in_each_step_of_a_transformer(blocks, cfg, reuse):
    kind, seed = "wan", 5
    model = exact_model(kind)
    modules = block_modules(model)
    pool, count = ([1, 2], 1) if "," in blocks else (range(1, len(modules)), 2)
    drawn = []

    def worse(step, _options):
        numbers = draw_blocks(len(pool), count, seed, step)
        drawn.append(numbers)
        return skipped([modules[pool[number]] for number in numbers])

    ours = guide("SLG", model, blocks=blocks, reuse=reuse)
    options = {"cfg": cfg, "steps": 4, "seed": seed}
    theirs = sampled(guided_by_hand(model, worse), kind, **options)
    assert len(set(drawn)) > 1, "not always the same"
    assert deviation(sampled(model, kind, **options), theirs) > 1e-2
    assert deviation(sampled(ours, kind, **options), theirs) < 1e-5  # Wan's patches are in float32


def test_random_blocks_share_the_call_from_the_first_one_drawn(caplog):
    caplog.set_level("INFO")
    sample(guide("SLG", shared_model(), blocks="random:2"), steps=3)
    assert "2 random of" in caplog.text
    assert "3 of 3 model evaluations guided, 3 in the same model call" in caplog.text
    assert "reached" not in caplog.text, "blocks that were not drawn are not missed"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("random:0", "random:0 must draw at least 1"),
        ("random:99", "at most the .* blocks that there are to draw from"),
        ("random:1, d0.0", "at most the 0 blocks that there are to draw from: none"),
        ("random 3", "must be written as random or random:3"),
        ("random:x", "must be written as random or random:3"),
        ("d0, random:2", "random must stand first"),
        ("d0, random", "selector language"),
        ("random:1, 1 2", "numbers in blocks must be parted by commas"),
    ],
)
def test_what_cannot_be_drawn_is_refused(blocks, message):
    with pytest.raises(ValueError, match=message):
        guide("SLG", shared_model(), blocks=blocks)
    with pytest.raises(ValueError, match="selector language"):
        guide("SEG", shared_model(), blocks="random")
