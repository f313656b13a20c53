"""Where guidance cannot act: the plain result, little is paid, and one warning says why."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from dit_models import sampled, tiny_dit
from family_oracle import guide
from host_models import sample, seg, shared_model, tiny_model
from host_oracle import deviation
from neighbours import in_pieces, regrouped, turned_inside, turned_outside, wrappers_dropped
from no_op import NOTHING, nothing
from reuse_checks import outcome, warned
from stand_ins import WRAPPERS, patched, shipped, wrapped

free = functools.partial(seg, branch="free")
sag = functools.partial(guide, "SAG", scale=0.5)


# Predictions that were never made.


def test_a_cfg_that_falls_to_one_in_mid_run(caplog):
    @wrapped(WRAPPERS.PREDICT_NOISE, outside=True)
    def falls(executor, x, timestep, options, seed):
        executor.class_obj.cfg = 7.0 if timestep[0] > 5.0 else 1.0
        return executor(x, timestep, options, seed)

    model = shared_model()
    still = nothing(model, branch="unconditional")
    plain = sample(falls(model), steps=4)
    assert deviation(sample(falls(still), steps=4), plain) <= NOTHING
    assert torch.isfinite(sample(falls(free(model)), steps=4)).all()
    assert "pauses: cfg has fallen to 1" in caplog.text


# Blocks that are never reached.


def test_a_network_that_is_answered_for_in_every_call(caplog):
    """No block is reached, so there is no guidance, and a longer run pays no more for that."""

    @wrapped(WRAPPERS.DIFFUSION_MODEL)
    def neighbour(executor, x, *args, **kwargs):
        answers.append(len(x))
        return 0.3 * x

    answers, paid = [], []
    for steps in (5, 8):
        plain = sample(neighbour(shared_model()), steps=steps)
        calls, answers[:] = len(answers), []
        assert torch.equal(sample(neighbour(seg(shared_model())), steps=steps), plain)
        paid.append(len(answers) - calls)
        answers.clear()
    assert paid[0] == paid[1] <= 4
    assert sum("has no effect" in message for message in warned(caplog)) == 2, "once a run"


def test_a_node_that_runs_the_network_by_itself(caplog):
    """As caches of features do: nothing of ours is reached, and no pass is paid."""
    calls = []

    @patched("unet_function_wrapper")
    def by_itself(apply_model, args):
        network = apply_model.__self__.diffusion_model
        calls.append(len(args["input"]))
        x, context, y = (
            t.to(network.dtype) for t in (args["input"], args["c"]["c_crossattn"], args["c"]["y"])
        )
        return args["input"] - 0.1 * network(x, args["timestep"], context=context, y=y).float()

    model = by_itself(shared_model())
    plain = sample(model, steps=3)
    paid, calls[:] = len(calls), []
    assert torch.equal(sample(seg(model), steps=3), plain)
    assert len(calls) == paid
    (message,) = warned(caplog)
    assert "by itself" in message


@pytest.mark.parametrize("guided", [sag, free])
def test_what_acts_in_the_plain_pass_says_so_where_its_wrappers_are_gone(guided, caplog):
    model = wrappers_dropped(guided(shared_model()))
    assert torch.equal(sample(model, steps=3), sample(shared_model(), steps=3))
    assert "wrappers" in caplog.text
    assert "has no effect" in caplog.text


def test_lost_wrappers_are_not_mentioned_where_nothing_needs_them(caplog):
    sample(wrappers_dropped(seg(shared_model(), reuse=False)), steps=2)
    assert not warned(caplog)


def test_rows_that_nobody_asks_for_are_noticed_and_no_longer_made(caplog):
    """As beside a node that takes our function out of the list in mid-run."""

    @wrapped(WRAPPERS.PREDICT_NOISE)
    def without_ours(executor, x, timestep, options, seed):
        return executor(x, timestep, {**options, "sampler_post_cfg_function": []}, seed)

    models = without_ours(seg(shared_model())), shared_model()
    found, plain = (outcome(model, steps=4) for model in models)
    assert deviation(found.latents, plain.latents) <= NOTHING
    assert found.evaluated["output", 3] <= plain.evaluated["output", 3] + 1
    assert sum("nobody used it" in message for message in warned(caplog)) == 1


ATTENTION = {
    "flux": ("comfy.ldm.flux.layers", "attention"),
    "sd3": ("comfy.ldm.modules.diffusionmodules.mmdit", "optimized_attention"),
    "wan": ("comfy.ldm.wan.model", "optimized_attention"),
    "hidream": ("comfy.ldm.hidream.model", "optimized_attention"),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_transformer_that_no_longer_hands_its_options_on_warns(kind, monkeypatch, caplog):
    module, name = ATTENTION[kind]
    original = getattr(sys.modules[module], name)

    def attention(*args, transformer_options=None, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(sys.modules[module], name, attention)
    sampled(seg(tiny_dit(kind)), kind)
    assert sum("never reached" in message for message in warned(caplog)) == 1


def test_another_node_that_skips_the_block_is_a_warning(caplog):
    skipping = patched("patch_replace", "dit", "double_block", 1)(lambda args, extra: args)
    sampled(seg(skipping(tiny_dit("flux")), blocks="double.1"), "flux")
    assert "block double.1 was never reached" in caplog.text


# A network that looks different and is not.


def test_a_unet_whose_class_was_exchanged_is_known_by_its_parts():
    """As by libraries that wrap or quantise."""
    model = tiny_model()
    expected = sample(seg(model))
    network = model.model.diffusion_model
    own = ("__dict__", "__weakref__")
    kept = {name: part for name, part in vars(type(network)).items() if name not in own}
    network.__class__ = type("Exchanged", (torch.nn.Module,), kept)
    assert torch.equal(sample(seg(model)), expected)


# What SAG's mask cannot be made of.


@pytest.mark.parametrize("pieces", [in_pieces, regrouped])
def test_a_mask_from_attention_is_refused_where_the_latent_is_cut_in_pieces(pieces):
    with pytest.raises(ValueError, match="cuts the latent in tiles"):
        sample(pieces(sag(shared_model())), size=(8, 12), steps=1)
    everywhere = sag(shared_model(), mask="everywhere")
    assert torch.isfinite(sample(pieces(everywhere), size=(8, 12))).all()


@patched("unet_function_wrapper")
def each_prompt_alone(apply_model, args):
    """As nodes that save memory: each prompt in a call of its own, under the labels of all."""
    rows, parts = len(args["input"]), len(args["cond_or_uncond"])
    inputs = {"x": args["input"], "t": args["timestep"], **args["c"]}
    own = [
        {n: v.chunk(parts)[k] if torch.is_tensor(v) and len(v) == rows else v
         for n, v in inputs.items()}
        for k in range(parts)
    ]  # fmt: skip
    return torch.cat([apply_model(**one) for one in own])


@wrapped(WRAPPERS.DIFFUSION_MODEL)
def each_row_alone(executor, *args, **kwargs):
    """As nodes that save memory inside of the model call: the network runs row by row."""
    rows = len(args[0])

    def part(value, row):
        return value[row : row + 1] if torch.is_tensor(value) and len(value) == rows else value

    own = [([part(v, n) for v in args], {k: part(v, n) for k, v in kwargs.items()})
           for n in range(rows)]  # fmt: skip
    return torch.cat([executor(*some, **named) for some, named in own])


def test_a_network_that_runs_row_by_row_is_guided_by_whole_passes(caplog):
    caplog.set_level("INFO")
    found, whole = (
        sample(each_row_alone(seg(shared_model(), reuse=reuse)), size=(8, 12), steps=3)
        for reuse in (True, False)
    )
    assert deviation(found, whole) <= NOTHING
    assert "number of rows" in caplog.text
    alone = sample(each_row_alone(shared_model()), size=(8, 12))
    assert torch.equal(sample(each_row_alone(sag(shared_model())), size=(8, 12)), alone)
    assert [m for m in warned(caplog) if "cut its batch in parts" in m]


@pytest.mark.parametrize(
    "pieces", [each_prompt_alone, regrouped, each_row_alone, turned_outside, turned_inside]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_free_has_no_effect_where_rows_are_not_those_that_their_labels_say(pieces, batch, caplog):
    found = sample(pieces(free(shared_model())), size=(8, 12), batch=batch, steps=3)
    assert torch.equal(found, sample(pieces(shared_model()), size=(8, 12), batch=batch, steps=3))
    (message,) = warned(caplog)
    assert "cuts the batch" in message


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_mask_from_attention_is_refused_where_another_node_cuts_the_attention(order):
    tiles = shipped("hypertile", "HyperTile", 32, 1, 1, False)
    model = shared_model("sd15")
    guided = sag(tiles(model)) if order == "before" else tiles(sag(model))
    with pytest.raises(ValueError, match=r"^Self-Attention Guidance.*block m0.*HyperTile or ToMe"):
        sample(guided, size=(16, 16), steps=1)


def test_short_runs_of_one_prompt_say_their_line_once(monkeypatch, caplog):
    server = type("Server", (), {"instance": type("Instance", (), {"last_prompt_id": "a"})()})
    monkeypatch.setitem(sys.modules, "server", type("Module", (), {"PromptServer": server}))
    caplog.set_level("INFO")
    for prompt, lines in (("one", 1), ("one", 1), ("two", 2)):
        server.instance.last_prompt_id = prompt
        sample(seg(shared_model()), steps=1)
        assert sum("model evaluations guided" in m for m in caplog.messages) == lines
