"""Where guidance cannot act: the plain result, little is paid, and one warning says why."""

from __future__ import annotations

import functools
import importlib
import sys
import types

import comfy.samplers
import pytest
import torch
from dit_models import sample_dit, tiny_dit
from dit_oracle import shape_of
from family_oracle import NODES, guide
from host_models import (
    PACK,
    conditioning,
    core_node,
    counted_calls,
    sample,
    seg,
    shared_model,
    tiny_model,
)
from neighbours import WRAPPERS, in_pieces, regrouped, wrapped
from reuse_checks import difference, outcome, sampled_by, warned

NOTHING = 1e-6
free = functools.partial(seg, branch="free")
sag = functools.partial(guide, "SAG", scale=0.5)


def outside(wrapper):
    """Return what puts a wrapper of a step around all that a model has."""
    return wrapped(WRAPPERS.PREDICT_NOISE, wrapper, outside=True)


# Predictions that were never made.


def test_a_cfg_that_falls_to_one_in_mid_run(caplog):
    def falling(executor, x, timestep, options, seed):
        executor.class_obj.cfg = 7.0 if timestep[0] > 5.0 else 1.0
        return executor(x, timestep, options, seed)

    falls, model = outside(falling), shared_model()
    still = guide("PAG", model, 3.0, strength=1e-12, branch="unconditional")
    plain = outcome(falls(model), steps=4).latents
    assert difference(outcome(falls(still), steps=4).latents, plain) <= NOTHING
    assert torch.isfinite(outcome(falls(free(model)), steps=4).latents).all()
    assert "pauses: cfg has fallen to 1" in caplog.text


@pytest.mark.parametrize("side", ["unconditional", "free"])
def test_a_guider_that_hands_on_an_uncond_that_it_never_evaluated(side, caplog):
    class Skipping(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            del seed
            cond = self.conds["positive"]
            (out,) = comfy.samplers.calc_cond_batch(
                self.inner_model, [cond], x, timestep, model_options
            )
            return comfy.samplers.cfg_function(
                self.inner_model, out, torch.zeros_like(out), 1.0, x, timestep,
                model_options=model_options, cond=cond, uncond=self.conds["negative"],
            )  # fmt: skip

    def run(model):
        guider = Skipping(model)
        guider.set_conds(conditioning(1), conditioning(2))
        return sampled_by(guider, model)

    model = shared_model()
    assert torch.equal(run(seg(model, branch=side)), run(model))
    assert len(warned(caplog)) == 1
    assert "uncond" in caplog.text


# Blocks that are never reached.


def test_a_network_that_is_answered_for_in_every_call(caplog):
    """No block is reached, so there is no guidance, and a longer run pays no more for that."""

    def answer(executor, x, *args, **kwargs):
        del executor, args, kwargs
        answers.append(len(x))
        return 0.3 * x

    neighbour, answers, paid = wrapped(WRAPPERS.DIFFUSION_MODEL, answer), [], []
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

    def by_itself(apply_model, args):
        network = apply_model.__self__.diffusion_model
        calls.append(len(args["input"]))
        x, context, y = (
            t.to(network.dtype) for t in (args["input"], args["c"]["c_crossattn"], args["c"]["y"])
        )
        out = network(x, args["timestep"], context=context, y=y)
        return args["input"] - 0.1 * out.float()

    model = shared_model().clone()
    model.set_model_unet_function_wrapper(by_itself)
    plain = sample(model, steps=3)
    paid, calls[:] = len(calls), []
    assert torch.equal(sample(seg(model), steps=3), plain)
    assert len(calls) == paid
    (message,) = warned(caplog)
    assert "by itself" in message


@pytest.mark.parametrize("guided", [sag, free])
def test_what_acts_in_the_plain_pass_says_so_where_its_wrappers_are_gone(guided, caplog):
    model = guided(shared_model())
    model.wrappers = {}
    assert torch.equal(sample(model, steps=3), sample(shared_model(), steps=3))
    assert "wrappers" in caplog.text
    assert "has no effect" in caplog.text


def test_rows_that_nobody_asks_for_are_noticed_and_no_longer_made(caplog):
    """As beside a node that takes our function out of the list in mid-run."""

    def without_ours(executor, x, timestep, options, seed):
        return executor(x, timestep, {**options, "sampler_post_cfg_function": []}, seed)

    model = wrapped(WRAPPERS.PREDICT_NOISE, without_ours)(seg(shared_model()))
    found, plain = outcome(model, steps=4), outcome(shared_model(), steps=4)
    assert difference(found.latents, plain.latents) <= NOTHING
    assert found.evaluated["output", 3] <= plain.evaluated["output", 3] + 1
    assert sum("nobody used it" in message for message in warned(caplog)) == 1


def without_options(monkeypatch, module, name):
    """Let a family's attention no longer pass on the host's options."""
    original = getattr(sys.modules[module], name)

    def attention(*args, transformer_options=None, **kwargs):
        del transformer_options
        return original(*args, **kwargs)

    monkeypatch.setattr(sys.modules[module], name, attention)


ATTENTION = {
    "flux": ("comfy.ldm.flux.layers", "attention"),
    "sd3": ("comfy.ldm.modules.diffusionmodules.mmdit", "optimized_attention"),
    "wan": ("comfy.ldm.wan.model", "optimized_attention"),
    "hidream": ("comfy.ldm.hidream.model", "optimized_attention"),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_transformer_that_no_longer_hands_its_options_on_warns(kind, monkeypatch, caplog):
    without_options(monkeypatch, *ATTENTION[kind])
    sample_dit(seg(tiny_dit(kind)), kind, shape_of(kind, (3, 4)))
    assert sum("never reached" in message for message in warned(caplog)) == 1


def test_another_node_that_skips_the_block_is_a_warning(caplog):
    model = tiny_dit("flux").clone()
    model.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
    sample_dit(seg(model, blocks="double.1"), "flux", shape_of("flux", (3, 4)))
    assert "block double.1 was never reached" in caplog.text


def test_every_block_that_a_run_reaches_is_quiet_about_it(caplog):
    sample(seg(shared_model(), blocks="d0, middle, u1"), steps=2)
    sample_dit(seg(tiny_dit("flux"), blocks="double, single"), "flux", shape_of("flux", (3, 4)))
    assert not warned(caplog)


# Networks and prompts that look different and are not.


def exchanged(network):
    """Give a network a class of another name, as libraries that wrap or quantise do."""
    kept = {n: m for n, m in vars(type(network)).items() if n not in ("__dict__", "__weakref__")}
    network.__class__ = type("Exchanged", (torch.nn.Module,), kept)


def test_a_unet_whose_class_was_exchanged_is_known_by_its_parts():
    model = tiny_model()
    expected = sample(seg(model))
    exchanged(model.model.diffusion_model)
    assert torch.equal(sample(seg(model)), expected)


def test_a_transformer_whose_class_was_exchanged_is_refused_by_name():
    model = tiny_dit("flux")
    exchanged(model.model.diffusion_model)
    with pytest.raises(ValueError, match="does not know the network Exchanged"):
        seg(model)


def test_a_prompt_that_is_never_active_costs_no_further_call():
    model = shared_model()
    never = conditioning(1, start_percent=0.0, end_percent=0.0)
    with counted_calls(model) as calls:
        assert torch.isfinite(sample(seg(model), positive=never, steps=4, cfg=1.0)).all()
    assert len(calls) <= 2


# Refusals and messages of every node.


def test_each_node_speaks_under_its_own_name():
    stranger = types.SimpleNamespace(
        model=types.SimpleNamespace(), get_model_object=lambda _name: torch.nn.Linear(2, 2)
    )
    for method in NODES:
        node = importlib.import_module(f"{PACK}.nodes.{NODES[method][0]}")
        name = getattr(node, NODES[method][1]).define_schema().display_name
        with pytest.raises(ValueError, match="does not know the network Linear") as error:
            guide(method, stranger)
        assert str(error.value).split(" Guidance")[0] in name


@pytest.mark.parametrize("pieces", [in_pieces, regrouped])
def test_a_mask_from_attention_is_refused_where_the_latent_is_cut_in_pieces(pieces):
    with pytest.raises(ValueError, match="cuts the latent in tiles"):
        sample(pieces(sag(shared_model())), size=(8, 12), steps=1)
    everywhere = sag(shared_model(), mask="everywhere")
    assert torch.isfinite(sample(pieces(everywhere), size=(8, 12))).all()


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_mask_from_attention_is_refused_where_another_node_cuts_the_attention(order):
    def tiles(model):
        return core_node("comfy_extras.nodes_hypertile", "HyperTile", model, 32, 1, 1, False)

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
