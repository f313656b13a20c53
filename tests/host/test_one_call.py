"""A guided step is one call of the model: what runs how often, what is held, and when it is not."""

from __future__ import annotations

import gc
import importlib
import weakref
from unittest import mock

import pytest
import torch
from host_models import (
    PACK,
    conditioning,
    counted_calls,
    noise_like,
    sample,
    seg,
    shared_model,
    tiny_model,
)
from reuse_checks import (
    MemoryShortage,
    both,
    control_net,
    controlled_pair,
    exact_model,
    outcome,
    part,
    require_effect,
    require_equal,
    set_free_memory,
)

EXACT = 1e-12


def pag(model, **settings):
    node = importlib.import_module(PACK + ".nodes.pag").SEGuidancePAG
    return node.execute(model, 2.0, 0.0, 1.0, **settings)[0]


GUIDED = {
    "SEG": lambda model, reuse: seg(model, reuse=reuse),
    "SEG, sigma 1.5": lambda model, reuse: seg(model, sigma=1.5, blocks="d0", reuse=reuse),
    "PAG": lambda model, reuse: pag(model, reuse=reuse),
    "PAG, strength 0.5": lambda model, reuse: pag(model, strength=0.5, reuse=reuse),
    "SEG and PAG": lambda model, reuse: pag(seg(model, reuse=reuse), reuse=reuse),
    "PAG before SEG": lambda model, reuse: seg(
        pag(model, blocks="d0", reuse=reuse), blocks="u1", reuse=reuse
    ),
    "two sides": lambda model, reuse: seg(
        seg(model, branch="unconditional", reuse=reuse), sigma=2.0, blocks="u0", reuse=reuse
    ),
    "beside free": lambda model, reuse: seg(
        seg(model, branch="free", sigma=1.5, blocks="d0"), branch="unconditional", reuse=reuse
    ),
}


def outputs(model, **settings):
    """Return what the network gives in one step, call by call, in its own precision."""
    found = []
    network = model.model.diffusion_model
    handle = network.register_forward_hook(lambda _module, _args, out: found.append(out.clone()))
    try:
        sample(model, **{"steps": 1, "size": (6, 8), **settings})
    finally:
        handle.remove()
    return found


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize(("kind", "cfg", "batch"), [("sdxl", 7.0, 1), ("sd15", 1.0, 2)])
def test_one_call_gives_what_whole_passes_give(name, kind, cfg, batch):
    if cfg == 1.0 and name in ("two sides", "beside free"):
        pytest.skip("needs an unconditional prediction")
    model = shared_model(kind)
    on, off = (outputs(GUIDED[name](model, reuse), cfg=cfg, batch=batch) for reuse in (True, False))
    assert len(on) == len(off) > 1
    for one, whole in zip(on, off, strict=True):
        assert float((one - whole).abs().max() / whole.std()) <= EXACT


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("kind", ["sdxl", "sd15", "svd"])
def test_every_layer_runs_once_in_a_guided_step(name, kind):
    if kind == "svd" and "free" not in name:
        settings = {"batch": 3, "channels": 4}
    elif kind == "svd":
        pytest.skip("as the others")
    else:
        settings = {}
    model = tiny_model(kind)
    layers = [m for m in model.model.diffusion_model.modules() if not list(m.children())]
    ran = []
    handles = [m.register_forward_hook(lambda m, _args, _out: ran.append(m)) for m in layers]

    def runs(guided):
        ran.clear()
        sample(guided, steps=1, **settings)
        return {id(m): sum(r is m for r in ran) for m in layers}

    plain, guided = runs(model), runs(GUIDED[name](model, True))
    for handle in handles:
        handle.remove()
    assert guided == plain


def test_the_network_s_inputs_are_widened_once_and_its_output_narrowed_again():
    model = seg(tiny_model())
    with counted_calls(model) as batches:
        sample(model, steps=2)
    # What other nodes see: the plain call, and one that asks for the perturbed prediction.
    assert batches == [2, 1, 2, 1]


# What is held, and for how long.


class Watch:
    """Every prediction that is put aside: how large, and which of them still live."""

    def __init__(self):
        aside = part("sampling.aside").Aside
        original = aside.put
        self.bytes = 0
        self.alive = []

        def put(one, key, prediction):
            original(one, key, prediction)
            self.bytes += prediction.out.nbytes
            self.alive.append(weakref.ref(prediction.out))

        self.patch = mock.patch.object(aside, "put", put)

    def __enter__(self):
        self.patch.start()
        return self

    def __exit__(self, *_error):
        self.patch.stop()

    @property
    def living(self):
        gc.collect()
        return sum(ref() is not None for ref in self.alive)


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_what_is_put_aside_is_the_perturbed_rows_of_the_output_alone(cfg):
    with Watch() as watch:
        outcome(seg(tiny_model()), cfg=cfg, steps=1, batch=2)
    assert watch.bytes == 4 * (2 * 4 * 8 * 8)


@pytest.mark.parametrize("blocks", ["middle", "u1"])
def test_nothing_is_kept_after_a_step(blocks):
    living = []

    def after_step(executor, *args):
        with torch.inference_mode():
            out = executor(*args)
        living.append(watch.living)
        return out

    model = seg(tiny_model(), blocks=blocks)
    wrappers = part("sampling.attach").WrappersMP
    # Outside ours: it looks when our step is over.
    model.wrappers[wrappers.PREDICT_NOISE] = {
        "test": [after_step],
        **model.wrappers[wrappers.PREDICT_NOISE],
    }
    with Watch() as watch:
        sample(model, steps=3)
    assert living == [0, 0, 0]
    assert len(watch.alive) == 3


def test_nothing_is_made_outside_the_window_or_when_nothing_needs_it():
    cases = {
        "another part of sampling": (seg(tiny_model(), start=0.2, end=0.3), {"steps": 3}),
        "scale 0": (seg(tiny_model(), scale=0.0), {}),
        "sigma 0": (seg(tiny_model(), sigma=0.0), {}),
        "reuse off": (seg(tiny_model(), reuse=False), {}),
        "free": (seg(tiny_model(), branch="free"), {}),
    }
    for name, (model, settings) in cases.items():
        with Watch() as watch:
            outcome(model, **settings)
        assert not watch.alive, name


def test_steps_outside_the_window_are_the_plain_steps():
    plain = outcome(tiny_model(), steps=6)
    guided = outcome(seg(tiny_model(), start=0.5), steps=6)
    extra = guided.shared
    assert 0 < extra < 6
    assert guided.evaluated["input", 0] == plain.evaluated["input", 0]
    assert guided.evaluated["output", 3] == plain.evaluated["output", 3] + extra


@pytest.mark.parametrize("at", [1, 2])
def test_no_module_carries_a_hook_or_another_forward_in_or_after_a_run_that_breaks_off(at):
    bare = tiny_model()
    model = pag(seg(bare, blocks="u1"))
    network = model.model.diffusion_model
    sample(bare, steps=1)  # ComfyUI marks the layers that it has loaded

    def state():
        return {
            name: (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), type(m))
            for name, m in network.named_modules()
        }

    before = state()
    sample(model, steps=2)
    assert state() == before
    calls = []

    def fail(_module, _args):
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("stop")

    handle = network.output_blocks[2][0].register_forward_pre_hook(fail)
    with Watch() as watch, pytest.raises(RuntimeError, match="stop"):
        sample(model, steps=3)
    handle.remove()
    assert state() == before
    assert watch.living == 0


def test_one_who_writes_into_what_is_handed_out_spoils_nothing():
    """As a guider does that applies cfg twice to one evaluation."""

    def twice(args):
        for function in args["model_options"]["sampler_post_cfg_function"]:
            if hasattr(function, "branch"):
                function({**args, "denoised": args["denoised"].clone()})
        return args["denoised"]

    def spoil(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        if len(out) == 1:  # the perturbed one
            kept.append(out.clone())
            out.mul_(0.5)
        return out

    kept = []
    model = exact_model()
    model.set_model_sampler_post_cfg_function(twice)
    model.add_wrapper_with_key(part("sampling.attach").WrappersMP.DIFFUSION_MODEL, "t", spoil)
    outcome(seg(model), steps=1)
    first, second = kept
    assert torch.equal(first, second)


# When it is not one call.


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_where_memory_is_short_the_pass_is_whole_and_the_same(monkeypatch, cfg, caplog):
    control, calls = control_net()
    pair = controlled_pair(conditioning(1), conditioning(2), control)
    settings = {"cfg": cfg, "positive": pair[0], "negative": pair[1]}
    caplog.set_level("INFO")
    with Watch() as watch:
        set_free_memory(monkeypatch, 1e6)
        on, off = both(**settings)
    assert on.shared == 0
    assert on.full == {"memory is short": 3}
    assert sum("3 because memory is short" in m for m in caplog.messages) == 1, "said once"
    assert not watch.alive
    assert on.controls == 0, "what a ControlNet gave is taken all the same: it costs nothing more"
    assert sum(calls) == 3 * (1 + (cfg > 1)) + 3 * (2 + (cfg > 1))
    require_equal(on, off, bitwise=True)
    require_effect(than=on, **settings)


def test_memory_that_becomes_short_in_mid_run(monkeypatch):
    memory = MemoryShortage(monkeypatch, chunks=1)
    model = memory.reach(seg(exact_model()))
    whole = outcome(seg(exact_model(), reuse=False))
    steps = []

    def less_and_less(args):
        steps.append(1)
        if len(steps) == 2:
            set_free_memory(monkeypatch, 1e6)
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(less_and_less)
    result = outcome(model)
    assert result.shared == 2
    assert result.full == {"memory is short": 1}
    require_equal(result, whole)


def test_rows_that_nobody_asks_for_are_noticed_and_no_longer_made(caplog):
    """As beside a node that takes our function out of the list in mid-run."""

    def without_ours(executor, x, timestep, options, seed):
        functions = options["sampler_post_cfg_function"]
        kept = [f for f in functions if not hasattr(f, "branch")]
        return executor(x, timestep, {**options, "sampler_post_cfg_function": kept}, seed)

    model = seg(tiny_model())
    wrappers = part("sampling.attach").WrappersMP
    model.add_wrapper_with_key(wrappers.PREDICT_NOISE, "test", without_ours)
    with Watch() as watch:
        result = outcome(model, steps=4)
    assert torch.equal(result.latents, outcome(tiny_model(), steps=4).latents)
    assert len(watch.alive) == 1
    assert sum("nobody used it" in message for message in caplog.messages) == 1


def test_a_function_that_is_called_though_it_is_not_in_the_list_guides():
    """As by a node that wraps each function in a condition of its own."""

    def wrapped(executor, x, timestep, options, seed):
        functions = [lambda args, f=f: f(args) for f in options["sampler_post_cfg_function"]]
        return executor(x, timestep, {**options, "sampler_post_cfg_function": functions}, seed)

    def around(model):
        kind = part("sampling.attach").WrappersMP.PREDICT_NOISE
        # Outside of ours.
        model.wrappers[kind] = {"test": [wrapped], **model.wrappers[kind]}
        return model

    on, off = both(around=around)
    plain = outcome(seg(exact_model()))
    assert (on.shared, on.full) == (2, {"cond was not evaluated": 1})
    require_equal(on, plain)
    require_equal(off, plain)


def test_one_label_for_the_plain_and_the_perturbed_rows_of_a_cond():
    seen = set()

    def look(q, k, v, options):
        del q
        rows = len(k) // len(options["cond_or_uncond"])
        prompts = k.reshape(len(options["cond_or_uncond"]), rows, -1).double().sum((1, 2))
        seen.update(
            zip((round(float(p), 6) for p in prompts), options["cond_or_uncond"], strict=True)
        )
        return k, k, v

    for reuse in (True, False):
        seen.clear()
        model = exact_model()

        def attention(q, k, v, options):
            look(q, k, v, options)
            return q, k, v

        model.set_model_attn2_patch(attention)
        outcome(seg(seg(model, branch="unconditional", reuse=reuse), reuse=reuse))
        assert len(seen) == 2, "each prompt has one label"
        assert {label for _, label in seen} == {0, 1}


def test_a_pass_of_another_shape_or_device_is_not_given_what_was_put_aside():
    aside, call = part("sampling.aside"), part("calls.network_call")

    def network(x):
        return x

    def of(x):
        return call.NetworkCall(network, [x], {})

    x = noise_like((2, 4, 8, 8))
    kept = aside.Aside()
    kept.put(("b", "a", None), aside.Prediction(x[1:], of(x), slice(1, 2)))
    rows = slice(0, 1)
    assert not isinstance(kept.find(("b", "a", None), of(x[1:]), rows, proved=False), str)
    for other in (x[1:, :, :4], x[1:, :3], x[1:].to("meta")):
        found = kept.find(("b", "a", None), of(other), rows, proved=True)
        assert found == "the latent has another shape or device"
    assert "evaluated" in kept.find(("b", "c", None), of(x), rows, proved=True)
    assert "regroups" in kept.find(("b", "a", None), of(x), rows, proved=False)


def test_a_patch_made_anew_is_never_the_same():
    same = part("calls.call").same_options

    def fresh():
        return {"patches": {"attn2_patch": [lambda q, k, v, _: (q, k, v)]}}

    assert not same(fresh(), fresh())
    steady = {"patches": {"attn2_patch": [print]}, "wrappers": {"diffusion_model": {"a": [len]}}}
    assert same(steady, {**steady, "patches": dict(steady["patches"]), "uuids": [1]})
    assert same({"patches": {}}, {}), "no patch is no patch"
    assert not same(steady, {**steady, "flag": True})


@pytest.mark.parametrize("free", [None, 1e6])
def test_the_log_says_what_was_made_in_the_plain_call_and_why_the_rest_was_not(
    monkeypatch, caplog, free
):
    if free is not None:
        set_free_memory(monkeypatch, free)
    with caplog.at_level("INFO"):
        outcome(seg(tiny_model()))
    (line,) = [m for m in caplog.messages if m.startswith("Smoothed Energy Guidance: ")]
    if free is None:
        assert "3 in the plain call of the model, 0 in whole passes" in line
    else:
        assert "0 in the plain call of the model, 3 in whole passes" in line
        assert "(3 because memory is short)" in line
