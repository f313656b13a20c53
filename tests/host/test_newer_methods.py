"""Random skipped blocks, the edges of softened smoothing, and the effective cfg."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from choice import each, pairs
from dit_oracle import block_modules, exact_dit, sampled
from family_oracle import guide, skipped
from host_models import PACK, conditioning, sample, shared_model, tiny_model
from host_oracle import deviation, guided_by_hand

REUSE = (True, False)
EXACT = 1e-6


def test_at_strength_1_the_result_is_that_of_seg_and_at_0_there_is_none(caplog):
    seg = sample(guide("SEG", shared_model()))
    assert torch.equal(seg, sample(guide("SEG", shared_model(), strength=1.0)))
    off = guide("SEG", shared_model(), strength=0.0)
    assert "Smoothed Energy Guidance has no effect: strength is 0." in caplog.messages
    assert "sampler_post_cfg_function" not in off.model_options
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="strength must be between 0 and 1"):
            guide("SEG", shared_model(), strength=wrong)


# Random skipped blocks.

core = importlib.import_module(PACK + ".seg_core")


@pytest.mark.parametrize(*pairs(blocks=["random:2", "Random:1, 1-2"], cfg=[1.0, 4.0], reuse=REUSE))
def test_blocks_drawn_anew_in_each_step_of_a_transformer(blocks, cfg, reuse):
    kind, seed = "wan", 5
    model = exact_dit(kind)
    modules = block_modules(model)
    pool, count = ([1, 2], 1) if "," in blocks else (range(1, len(modules)), 2)
    drawn = []

    def worse(step, _options):
        numbers = core.draw_blocks(len(pool), count, seed, step)
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


# How much of a push a higher cfg would have done.


def only_cross_attention(model):
    """Let a tiny UNet's middle block do nothing but read the prompt, and no other block."""
    with torch.no_grad():
        for name, weight in model.model.diffusion_model.named_parameters():
            writes = any(part in name for part in ("attn1.to_out", "attn2.to_out", ".ff.net.2"))
            reads_the_prompt = name.startswith("middle_block") and "attn2" in name
            if writes and (not reads_the_prompt or name.endswith("bias")):
                weight.zero_()
    return model


def test_guidance_that_is_a_higher_cfg_is_known_as_one(caplog):
    """Without its middle block the model does not see the prompt: SLG is cfg itself."""
    caplog.set_level("INFO")
    model = only_cross_attention(tiny_model("sdxl", dtype=torch.float64))
    nothing = conditioning(2)
    nothing[0][0] = torch.zeros_like(nothing[0][0])
    nothing[0][1]["pooled_output"] = conditioning(1)[0][1]["pooled_output"]
    options = {"negative": nothing, "steps": 3}
    guided = sample(guide("SLG", model, scale=2.0), cfg=4.0, **options)
    assert deviation(guided, sample(model, cfg=6.0, **options)) < EXACT
    assert "effective cfg 6 (0% of the push is beside cfg)" in caplog.text
    caplog.clear()
    sample(guide("SEG", model, blocks="d0", scale=2.0), cfg=1.0, **options)
    assert "effective cfg" not in caplog.text, "there is no cfg to compare with"


@pytest.mark.parametrize(*each(method=["SEG", "PAG", "SLG"]))
def test_the_rest_of_the_push_is_reported(method, caplog):
    caplog.set_level("INFO")
    sample(guide(method, shared_model()), cfg=4.0)
    (line,) = (m for m in caplog.messages if "effective cfg" in m)
    share = float(line.partition("(")[2].partition("%")[0])
    assert 20 < share <= 100
