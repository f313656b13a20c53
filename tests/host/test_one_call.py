"""A guided step is one call of the model: what runs how often, and when it is not."""

from __future__ import annotations

import contextlib
import functools

import pytest
from choice import each
from family_oracle import guide
from host_models import conditioning, sample, seg, shared_model, with_controlnet
from host_oracle import deviation
from neighbours import regrouped
from reuse_checks import control_net, outcome, require_equal, set_free_memory, with_room_for
from stand_ins import patched
from test_video import clip_prompts

EXACT = 1e-12


def all_of(*parts):
    """Return what applies several nodes, each given as method, blocks and further widgets."""

    def guided(model, **options):
        for method, blocks, widgets in parts:
            model = guide(method, model, 2.0, blocks=blocks, **options, **widgets)
        return model

    return guided


FINITE = {"infinite_blur": False, "blur_sigma": 1.5}
UNCOND = {"branch": "unconditional"}
GUIDED = {
    "SEG": all_of(("SEG", "auto", {})),
    "SEG, finite": all_of(("SEG", "d0", FINITE)),
    "SEG, heads": all_of(("SEG", "m0:h1,u0", {})),
    "SEG, late": all_of(("SEG", "u1.1", {})),
    "PAG": all_of(("PAG", "auto", {})),
    "PAG, strength": all_of(("PAG", "m0", {"strength": 0.5})),
    "PAG, heads": all_of(("PAG", "m0:h1-2", {})),
    "TPG": all_of(("TPG", "auto", {})),
    "SLG": all_of(("SLG", "auto", {})),
    "SLG, layers": all_of(("SLG", "d0.1,u0.0", {})),
    "SLG, attention": all_of(("SLG", "m0", {"what": "attention"})),
    "SEG and PAG": all_of(("SEG", "m0", {}), ("PAG", "m0", {})),
    "PAG before SEG": all_of(("PAG", "d0", {}), ("SEG", "u1", {})),
    "two sides": all_of(("SEG", "m0", UNCOND), ("SEG", "u0", FINITE)),
    "beside free": lambda model, **options: guide(
        "SEG", seg(model, branch="free", sigma=1.5, blocks="d0"), **UNCOND, **options
    ),
    "the family": all_of(
        ("SLG", "m0.0,u0.1", {}), ("SEG", "m0", {}), ("TPG", "d0.1", {}),
        ("SEG", "m0.1:h1,u0", UNCOND), ("PAG", "m0", {}), ("SLG", "m0", {"what": "attention"}),
    ),
}  # fmt: skip
BOTH_SIDES = ("two sides", "beside free", "the family")
ON_SVD = {  # space and time have a layer each
    "SEG over time": functools.partial(guide, "SEG", axes="time"),
    "SEG over space and time": functools.partial(guide, "SEG", axes="space and time"),
}


CLIP = {"batch": 3, "scheduler": "karras", **clip_prompts()}
RUNS = {
    "SDXL": ("sdxl", {"cfg": 7.0}),
    "SDXL, cfg 1": ("sdxl", {"cfg": 1.0, "batch": 2}),
    "SD1.5": ("sd15", {"cfg": 7.0, "batch": 2}),
    "SVD": ("svd", {"cfg": 2.5, **CLIP}),
}


def outputs(model, **settings):
    """Return what the network gives in one step, call by call, and how often each layer ran."""
    found, ran = [], []
    network = model.model.diffusion_model
    layers = [m for m in network.modules() if not list(m.children())]
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(lambda m, *_: ran.append(id(m))))
        hooks.enter_context(
            network.register_forward_hook(lambda _m, _args, out: found.append(out.clone()))
        )
        sample(model, **{"steps": 1, "size": (6, 8), **settings})
    return found, [ran.count(id(m)) for m in layers]


@functools.cache
def plain_layers(run):
    kind, settings = RUNS[run]
    return outputs(shared_model(kind), **settings)[1]


def possible(name, run):
    if name in ON_SVD:
        return run == "SVD"
    # One layer has no second, and SVD's are of space and time.
    layered = name in ("SLG, layers", "the family", "SEG, late") and run in ("SD1.5", "SVD")
    return not layered and not (name in BOTH_SIDES and run == "SDXL, cfg 1")


@pytest.mark.floor
@pytest.mark.parametrize(*each(possible, name=[*GUIDED, *ON_SVD], run=RUNS))
def test_one_call_gives_what_whole_passes_give_and_runs_each_layer_once(name, run):
    kind, settings = RUNS[run]
    guided = (GUIDED | ON_SVD)[name]
    (one, layers), (whole, more) = (
        outputs(guided(shared_model(kind), reuse=reuse), **settings) for reuse in (True, False)
    )
    assert layers == plain_layers(run)
    assert more > layers
    assert len(one) == len(whole) > 1
    for ours, theirs in zip(one, whole, strict=True):
        assert deviation(ours, theirs) <= EXACT


def test_blocks_before_the_first_changed_one_compute_no_further_rows():
    plain = outcome(shared_model(), cfg=1.0).evaluated
    # In each block at a fork, the layer before its transformer is shared too.
    for blocks, shared in (("d0", 4), ("middle", 5), ("u0", 6), ("u1", 7)):
        found = outcome(seg(shared_model(), blocks=blocks), cfg=1.0).evaluated
        assert [found[key] - plain[key] for key in plain] == [0] * shared + [3] * (9 - shared)


# What other nodes are told of a call that has more rows.


@pytest.mark.parametrize(*each(kind=["sdxl", "sd15"], blocks=["middle", "u1"]))
def test_patches_are_told_of_each_row_and_else_what_they_are_told_without_guidance(kind, blocks):
    told = ("transformer_index", "block_index", "block")

    def watching(model, seen):
        def look(rows, options):
            assert len(options["cond_or_uncond"]) == len(set(options["uuids"])) == rows
            shape = tuple(options["activations_shape"])[1:] if "activations_shape" in options else 0
            seen.append((rows, shape, *(options.get(name) for name in told)))

        def between(h, *rest):
            look(len(h), rest[-1])
            return (h, *rest[:-1]) if len(rest) > 1 else h

        for kind in ("input_block_patch", "output_block_patch", "attn2_patch"):
            model = patched(kind)(between)(model)
        return model

    plain, guided = [], []
    sample(watching(shared_model(kind), plain), steps=1, size=(8, 10))
    sample(watching(seg(shared_model(kind), blocks=blocks), guided), steps=1, size=(8, 10))
    assert {rows for rows, *_ in plain} == {2}
    assert {2, 4} == {rows for rows, *_ in guided}, "a perturbed row, and one to check it by"
    assert [rest for _, *rest in plain] == [rest for _, *rest in guided][: len(plain)]


# When it is not one call.


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_where_memory_is_short_the_pass_is_whole_and_the_same(monkeypatch, cfg, caplog):
    control, calls = control_net()
    positive, negative = with_controlnet(conditioning(1), conditioning(2), control)
    settings = {"cfg": cfg, "positive": positive, "negative": negative}
    caplog.set_level("INFO")
    set_free_memory(monkeypatch, 1e6)
    on = outcome(seg(shared_model()), **settings)
    assert (on.shared, on.because("memory")) == (0, 3)
    assert sum("because memory" in message for message in caplog.messages) == 1, "said once"
    assert len(calls) == 3 * (1 + (cfg > 1)) + 3, "a whole pass has a ControlNet of its own"
    off = outcome(seg(shared_model(), reuse=False), **settings)
    require_equal(on, off, bitwise=True)
    assert deviation(on.latents, outcome(shared_model(), **settings).latents) > 1e-3


def test_memory_that_becomes_short_in_mid_run(monkeypatch):
    whole = outcome(seg(shared_model(), reuse=False))
    steps = []

    @patched("sampler_post_cfg_function")
    def less_and_less(args):
        steps.append(1)
        if len(steps) == 2:
            set_free_memory(monkeypatch, 1e6)
        return args["denoised"]

    result = outcome(less_and_less(with_room_for(monkeypatch, 2, seg(shared_model()))))
    assert (result.shared, result.because("memory")) == (2, 1)
    require_equal(result, whole)


def test_rows_that_another_node_regroups_take_whole_passes():
    plain = outcome(regrouped(shared_model()), size=(8, 12))
    found = outcome(regrouped(seg(shared_model())), size=(8, 12))
    assert found.full.total() >= 2, "from the second step on"
    whole = 3 * 2 * 2  # two pieces of both conds in each step: they were in one call
    assert found.evaluated["output", 3] <= plain.evaluated["output", 3] + whole + 2
