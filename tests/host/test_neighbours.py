"""A good guest: guidance beside the kinds of things that other packs do, before and after it."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import inspect
import re
import weakref
from pathlib import Path

import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from dit_models import TINY, available, sample_dit, tiny_dit
from dit_oracle import float64_rotary, shape_of
from family_oracle import guide
from host_models import PACK, conditioning, noise_like, sample, seg, tiny_model
from neighbours import (
    KINDS,
    WRAPPERS,
    ActsThroughOptions,
    cache_around_blocks,
    cache_in_a_closure,
    in_pieces,
    momentum,
    regrouped,
    wrapped,
)
from reuse_checks import (
    control_net,
    controlled_pair,
    core_node,
    difference,
    exact_model,
    outcome,
    part,
    require_equal,
)

NOTHING = 1e-6
SETTINGS = {"size": (8, 12), "steps": 4}


def node(name):
    module = {"SEGuidancePAG": "pag", "SEGuidanceSAG": "sag"}[name]
    return getattr(importlib.import_module(f"{PACK}.nodes.{module}"), name)


def pag(model, strength=1.0, scale=3.0, **settings):
    return node("SEGuidancePAG").execute(model, scale, 0.0, 1.0, strength=strength, **settings)[0]


def sag(model, sigma=2.0, **settings):
    return node("SEGuidanceSAG").execute(model, 0.5, sigma, 0.0, 1.0, **settings)[0]


def orders(neighbour, guidance):
    """Return the model with a neighbour before, and after our node."""
    yield guidance(neighbour(exact_model()))
    yield neighbour(guidance(exact_model()))


def sampled_by(guider, model):
    """Return the latents that a guider samples."""
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 3)
    sampler = comfy.samplers.sampler_object("euler")
    latent = torch.zeros(1, 4, 8, 8)
    with torch.inference_mode():
        return guider.sample(noise_like(latent.shape), latent, sampler, sigmas)


@pytest.mark.parametrize("cfg", [7.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_perturbation_that_changes_nothing_pushes_nothing(kind, cfg):
    neighbour = KINDS[kind]
    settings = {**SETTINGS, "cfg": cfg, "steps": 6 if "cache" in kind else 3}
    alone = outcome(neighbour(exact_model()), **settings).latents
    plain = outcome(exact_model(), **settings).latents
    for reuse in (True, False):
        for side in ("conditional", "unconditional")[: 1 + (cfg > 1)]:
            for model in orders(neighbour, lambda m: pag(m, 1e-12, branch=side, reuse=reuse)):  # noqa: B023
                found = outcome(model, **settings).latents
                assert difference(found, alone) <= NOTHING, (reuse, side)
    assert difference(alone, plain) > 1e-3 or kind in (
        "wrappers dropped", "functions in conditions", "two evaluations in a step",
        "tangential damping", "adaptive projected guidance",
    )  # fmt: skip


@pytest.mark.parametrize("side", ["conditional", "unconditional"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_blur_of_the_input_that_changes_nothing_pushes_nothing(kind, side):
    neighbour = KINDS[kind]
    settings = {**SETTINGS, "steps": 6 if "cache" in kind else 3}
    alone = outcome(neighbour(exact_model()), **settings).latents
    node_settings = {"branch": side, "mask": "everywhere"}
    for model in orders(neighbour, lambda m: sag(m, 1e-3, **node_settings)):
        assert difference(outcome(model, **settings).latents, alone) <= NOTHING


FAMILY = {
    "SEG": lambda model, reuse: seg(model, sigma=2.0, reuse=reuse),
    "TPG": lambda model, reuse: guide("TPG", model, 3.0, reuse=reuse),
    "SLG": lambda model, reuse: guide("SLG", model, 3.0, blocks="d0.1,m0", reuse=reuse),
    "heads": lambda model, reuse: guide("PAG", model, 3.0, blocks="m0:h1-2", reuse=reuse),
}


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_beside_it_gives_what_whole_passes_give(kind, method):
    neighbour = KINDS[kind]
    plain = outcome(neighbour(exact_model()), **SETTINGS).latents
    for on, off in zip(
        orders(neighbour, lambda m: FAMILY[method](m, True)),
        orders(neighbour, lambda m: FAMILY[method](m, False)),
        strict=True,
    ):
        one, whole = outcome(on, **SETTINGS), outcome(off, **SETTINGS)
        require_equal(one, whole)
        assert difference(one.latents, plain) > 1e-3, "it acts"


@pytest.mark.parametrize("method", FAMILY)
def test_a_cache_inside_the_network_remembers_each_prediction_by_itself(method):
    """As if the perturbed prediction had a network, and a cache, of its own."""
    cached = KINDS["a cache inside the network"]
    settings = {**SETTINGS, "cfg": 1.0}
    ours = outcome(cached(FAMILY[method](exact_model(), True)), **settings)

    def predictions(model):
        seen = []
        model = model.clone()
        model.set_model_sampler_post_cfg_function(
            lambda args: seen.append(args["cond_denoised"]) or args["denoised"]
        )
        outcome(model, **settings)
        return seen

    alone, plain = cached(exact_model()), exact_model()
    assert difference(ours.latents, outcome(plain, **settings).latents) > 1e-3
    guided = FAMILY[method](exact_model(), True)
    seen = predictions(cached(guided))
    known = vars(guided.model.diffusion_model)["known"]
    assert set(known) == {0}, "what is left behind is the plain prediction's"
    assert known[0]["calls"] == len(seen), "and counts the plain calls alone"
    assert difference(seen[0], predictions(alone)[0]) <= NOTHING


@pytest.mark.parametrize("cfg", [4.0, 1.0])
@pytest.mark.parametrize("blocks", ["double.1", "single.1"])
def test_a_cache_around_the_blocks_answers_both_predictions_or_neither(blocks, cfg):
    def run(guided):
        state = {}
        model = cache_around_blocks(guided(tiny_dit("flux", dtype=torch.float64)), state)
        with float64_rotary():
            shape = shape_of("flux", (3, 4))
            return sample_dit(model, "flux", shape, cfg=cfg, steps=5), state["hits"]

    plain, hits = run(lambda m: m)
    same, as_often = run(lambda m: pag(m, 1e-12, blocks=blocks))
    assert difference(same, plain) <= NOTHING
    assert hits == as_often == 2
    acts, as_often = run(lambda m: seg(m, blocks=blocks))
    assert difference(acts, plain) > 1e-3
    assert as_often == 2


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_a_cache_in_a_closure_answers_both_predictions_or_neither(cfg, caplog):
    def run(scale, guided=pag, **widgets):
        state = {}
        model = cache_in_a_closure(guided(exact_model(), scale=scale, **widgets), state)
        return outcome(model, **{**SETTINGS, "cfg": cfg, "steps": 6}).latents, state["hits"]

    still, hits = run(1e-9, strength=1e-12)
    assert hits > 1
    assert difference(run(3.0, strength=1e-12)[0], still) <= NOTHING
    assert difference(run(3.0, seg)[0], still) > 1e-3
    assert "has no effect" not in caplog.text


def test_conds_on_three_sides_under_a_nested_guider():
    def run(model):
        module = importlib.import_module("comfy_extras.nodes_custom_sampler")
        guider = module.Guider_DualCFG(model)
        guider.set_conds(conditioning(1), conditioning(3), conditioning(2))
        guider.set_cfg(4.0, 3.0)
        return sampled_by(guider, model)

    reads = KINDS["effects by side"]
    plain = run(reads(exact_model()))
    for reuse in (True, False):
        for side in ("conditional", "unconditional"):
            model = pag(reads(exact_model()), 1e-12, branch=side, reuse=reuse)
            assert difference(run(model), plain) <= NOTHING


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_a_controlnet_that_acts_through_the_options(cfg):
    pair = [
        [[e, {**v, "control": ActsThroughOptions()}] for e, v in conditioning(s)] for s in (1, 2)
    ]
    settings = {"positive": pair[0], "negative": pair[1], "cfg": cfg}
    plain = outcome(exact_model(), **settings).latents
    for reuse in (True, False):
        found = outcome(pag(exact_model(), 1e-12, reuse=reuse), **settings).latents
        assert difference(found, plain) <= NOTHING


def test_the_table_of_neighbours_has_a_row_for_each():
    page = Path(__file__).resolve().parents[2] / "docs" / "neighbours.md"
    rows = re.findall(r"^\| ([^|]+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows[0] == "Kind"
    assert rows[1:] == list(KINDS)


NAG = KINDS["attention made of both sides"]


@pytest.mark.parametrize("cfg", [4.0, 1.0])
@pytest.mark.parametrize("kind", [kind for kind in ("flux", "chroma", "krea2") if available(kind)])
def test_attention_made_of_both_sides_of_a_transformer(kind, cfg):
    def run(model):
        with float64_rotary():
            return sample_dit(model, kind, shape_of(kind, (3, 4), batch=2), cfg=cfg)

    def model():
        return tiny_dit(kind, dtype=torch.float64)

    plain = run(NAG(model()))
    assert difference(plain, run(model())) > 1e-3
    guided = {}
    for reuse in (True, False):
        for side in ("conditional", "unconditional"):
            for found in (
                pag(NAG(model()), 1e-12, branch=side, reuse=reuse),
                NAG(pag(model(), 1e-12, branch=side, reuse=reuse)),
            ):
                assert difference(run(found), plain) <= NOTHING
        guided[reuse] = run(NAG(pag(seg(model(), sigma=1.0, reuse=reuse), reuse=reuse)))
    assert difference(guided[True], guided[False]) <= NOTHING
    assert difference(guided[True], plain) > 1e-3


@pytest.mark.parametrize("controlled", [False, True])
def test_several_prompts_and_perturbations_beside_attention_made_of_both_sides(controlled):
    positive = conditioning(1, area=(8, 6, 0, 0)) + conditioning(3)
    negative = conditioning(2)
    if controlled:
        positive, negative = controlled_pair(positive, negative, control_net()[0], size=(8, 12))
    settings = {**SETTINGS, "positive": positive, "negative": negative}
    plain = outcome(NAG(exact_model()), **settings)
    for reuse in (True, False):
        model = seg(pag(exact_model(), 1e-12, reuse=reuse), sigma=1e-3, reuse=reuse)
        assert difference(outcome(NAG(model), **settings).latents, plain.latents) <= NOTHING
    one, whole = (
        outcome(NAG(pag(seg(exact_model(), reuse=reuse), reuse=reuse)), **settings)
        for reuse in (True, False)
    )
    assert one.reasons == set()
    require_equal(one, whole)
    assert difference(one.latents, plain.latents) > 1e-3


def test_patches_that_ask_for_no_labels_cost_no_further_rows():
    """HyperTile, ToMe and their like keep one state for all rows, and mix none of them."""

    class Object:
        def __call__(self, out, extra):
            return out * len(extra["cond_or_uncond"]) ** 0

    def scaled(factor, out, extra):
        del extra
        return factor * out

    mates = part("calls.mates")
    asks = Object()
    held = functools.partial(scaled, 1.1)
    for patch, mixes in ((asks, True), (held, False), (lambda o, e: asks(o, e), True)):
        assert mates.see_mates({"patches": {"attn1_output_patch": [patch]}}) is mixes
    model = exact_model()
    model.set_model_attn1_output_patch(held)
    found, bare = outcome(seg(model)), outcome(seg(exact_model()))
    assert found.evaluated == bare.evaluated
    assert difference(found.latents, bare.latents) > 1e-3


class Objects(torch.nn.Module):
    """As GLIGEN: objects at places of the image, for as many rows as the prompt has."""

    def set_position(self, shape, params, device):
        places = noise_like((shape[0], 1, 1), 9).to(device) + params[0]
        return lambda x, extra: x + 0.3 * places.to(x.dtype) * (len(x) == len(places) or 1 / 0)

    def set_empty(self, shape, device):
        return self.set_position(shape, [0.0], device)


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_objects_that_a_prompt_places(cfg):
    cpu = torch.device("cpu")
    gligen = comfy.model_patcher.ModelPatcher(Objects(), load_device=cpu, offload_device=cpu)
    positive = conditioning(1, gligen=("position", gligen, [1.0]))
    settings = {"positive": positive, "cfg": cfg, "batch": 2}
    plain = outcome(exact_model(), **settings).latents
    for reuse in (True, False):
        found = outcome(pag(exact_model(), 1e-12, reuse=reuse), **settings)
        assert difference(found.latents, plain) <= NOTHING
    assert outcome(seg(exact_model()), **settings).reasons == {
        "GLIGEN places objects for its prompt's own rows alone"
    }


def test_attention_that_is_shared_over_the_batch_is_left_alone_by_whole_passes():
    """Nothing is exact there; with `reuse` off the plain predictions keep their own mates."""

    def shared(q, k, v, extra):
        del extra
        return q, k, 0.5 * (v + v.mean(0, keepdim=True))

    model = exact_model()
    model.set_model_attn1_patch(shared)
    plain = outcome(model, cfg=1.0, batch=2).latents
    found = outcome(pag(model, 1e-12, reuse=False), cfg=1.0, batch=2).latents
    assert difference(found, plain) <= NOTHING
    assert torch.isfinite(outcome(seg(model), cfg=7.0, batch=2).latents).all()


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

    model = exact_model()
    model.set_model_unet_function_wrapper(by_itself)
    plain = outcome(model, steps=3).latents
    paid, calls[:] = len(calls), []
    assert torch.equal(outcome(seg(model), steps=3).latents, plain)
    assert len(calls) == paid
    assert caplog.text.count("ran the network by itself") == 1


def test_blocks_that_another_node_s_code_runs_without_all_of_the_host_s_keys(monkeypatch):
    """As older code for the host's transformer blocks: it tells patches less than the host does."""
    attention = importlib.import_module("comfy.ldm.modules.attention")

    def forward(self, x, context=None, transformer_options=None):
        options = transformer_options
        patches = options.get("patches", {})
        told = ("cond_or_uncond", "block", "block_index", "original_shape")
        extra = {name: options[name] for name in told if name in options}
        extra |= {"n_heads": self.n_heads, "dim_head": self.d_head}
        n = self.norm1(x)
        of_keys = of_values = n
        for patch in patches.get("attn1_patch", ()):
            n, of_keys, of_values = patch(n, of_keys, of_values, extra)
        replace = options.get("patches_replace", {}).get("attn1", {})
        block = replace.get((*options["block"], options["block_index"]))
        if block is None:
            n = self.attn1(n, context=of_keys, value=of_values)
        else:
            q, k, v = self.attn1.to_q(n), self.attn1.to_k(of_keys), self.attn1.to_v(of_values)
            n = self.attn1.to_out(block(q, k, v, extra))
        for patch in patches.get("attn1_output_patch", ()):
            n = patch(n, extra)
        x = n + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x

    guided = [seg, pag, sag, *(functools.partial(FAMILY[m], reuse=True) for m in FAMILY)]
    expected = [outcome(one(exact_model())).latents for one in guided]
    monkeypatch.setattr(attention.BasicTransformerBlock, "forward", forward)
    for one, known in zip(guided, expected, strict=True):
        assert difference(outcome(one(exact_model())).latents, known) <= NOTHING


# State and settings.


def test_what_others_write_into_the_options_stays_and_nothing_of_ours_does():
    seen = []

    def look(executor, x, timestep, options, seed):
        seen.append((set(options), set(options["transformer_options"])))
        return executor(x, timestep, options, seed)

    model = wrapped(WRAPPERS.PREDICT_NOISE, look, outside=True)(seg(momentum(tiny_model())))
    sample(model, steps=3)
    first, *later = seen
    assert all(options - first[0] == {"momentum"} for options, _ in later)
    assert all(options - first[1] == {"steps seen"} for _, options in later)


def test_a_deep_copy_of_the_options_copies_settings_and_no_network():
    model = pag(seg(tiny_model()))
    weights = sum(w.numel() for w in model.model.diffusion_model.parameters())
    copied = copy.deepcopy(model.model_options)
    before = len(gc.get_objects())
    kept = [copy.deepcopy(model.model_options) for _ in range(10)]
    assert len(gc.get_objects()) - before < 10 * 200
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.nn.Parameter)]
    assert sum(t.numel() for t in tensors if t.numel() and t.shape) < 1e9
    assert weights
    clone = model.clone()
    clone.model_options = copied
    assert torch.equal(sample(clone, steps=2), sample(model, steps=2))
    del kept


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("guided", [seg, pag, sag, lambda m: pag(seg(m, reuse=False))])
def test_nothing_of_ours_waits_for_the_garbage_collector(guided):
    model = guided(tiny_model())
    sample(model, steps=1)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        sample(model, steps=3)
        gc.collect()
        garbage = list(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    # The host leaves a class for each cond and step.
    assert not [thing for thing in garbage if isinstance(thing, torch.Tensor)]
    assert not [thing for thing in garbage if str(type(thing).__module__).startswith(PACK)]
    modules = [thing.__module__ for thing in garbage if inspect.isfunction(thing)]
    assert not [module for module in modules if str(module).startswith(PACK)]


def test_a_guided_clone_is_gone_when_nobody_holds_it():
    base = tiny_model()
    sample(base, steps=1)
    gc.collect()
    gc.disable()
    try:
        guided = seg(base)
        sample(guided, steps=1)
        options = weakref.ref(guided.model_options["sampler_post_cfg_function"][0])
        del guided
        gc.enable()
        gc.collect()
        assert options() is None
    finally:
        gc.enable()


# Predictions that were never made, blocks that are never reached.


def test_a_cfg_that_falls_to_one_in_mid_run(caplog):
    def falling(executor, x, timestep, options, seed):
        executor.class_obj.cfg = 7.0 if timestep[0] > 5.0 else 1.0
        return executor(x, timestep, options, seed)

    falls = wrapped(WRAPPERS.PREDICT_NOISE, falling, outside=True)
    plain = outcome(falls(exact_model()), **SETTINGS).latents
    found = outcome(falls(pag(exact_model(), 1e-12, branch="unconditional")), **SETTINGS).latents
    assert difference(found, plain) <= NOTHING
    free = outcome(falls(seg(exact_model(), branch="free")), **SETTINGS)
    assert torch.isfinite(free.latents).all()
    assert "pauses there" in caplog.text


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

    assert torch.equal(run(seg(tiny_model(), branch=side)), run(tiny_model()))
    assert caplog.text.count("made no uncond prediction") == 1


def test_where_no_block_is_reached_there_is_no_guidance_one_warning_and_no_further_pass(caplog):
    answers = []

    def answer(executor, x, *args, **kwargs):
        del executor, args, kwargs
        answers.append(len(x))
        return 0.3 * x + len(answers)  # a cache that answers for the network, not the same twice

    neighbour = wrapped(WRAPPERS.DIFFUSION_MODEL, answer)
    plain = outcome(neighbour(tiny_model()), steps=4).latents
    calls, answers[:] = len(answers), []

    def steady(executor, x, *args, **kwargs):
        del executor, args, kwargs
        answers.append(len(x))
        return 0.3 * x + sum(rows == 2 for rows in answers)

    guided = outcome(wrapped(WRAPPERS.DIFFUSION_MODEL, steady)(seg(tiny_model())), steps=4)
    assert torch.equal(guided.latents, plain)
    assert len(answers) == calls + 1, "one pass to find out"
    assert caplog.text.count("has no effect in this run") == 1


@pytest.mark.parametrize("guided", [sag, lambda m: seg(m, branch="free")])
def test_what_acts_in_the_plain_pass_says_so_where_its_wrappers_are_gone(guided, caplog):
    model = guided(tiny_model())
    model.wrappers = {}
    assert torch.equal(sample(model, steps=3), sample(tiny_model(), steps=3))
    assert caplog.text.count("taken this pack's sampling wrappers off") == 1
    assert "has no effect" in caplog.text


def test_a_network_whose_class_was_exchanged_is_known_by_its_parts():
    model = tiny_model()
    network = model.model.diffusion_model
    expected = sample(seg(model), steps=2)
    members = {"forward": type(network).forward, "_forward": type(network)._forward}
    network.__class__ = type("Exchanged", (torch.nn.Module,), members)
    assert torch.equal(sample(seg(model), steps=2), expected)


@pytest.mark.parametrize("kind", [kind for kind in TINY if available(kind)])
def test_a_transformer_whose_class_was_exchanged_is_known_by_its_model(kind):
    families = part("networks.dit.known")
    model = tiny_dit(kind)
    known = families.family_of(model.model.diffusion_model, None)
    network = model.model.diffusion_model
    network.__class__ = type("Exchanged", (torch.nn.Module,), {})
    assert known is not None
    assert families.family_of(network, model.model) is known


# Messages.


def test_each_node_speaks_under_its_own_name():
    from types import SimpleNamespace

    stranger = SimpleNamespace(
        model=SimpleNamespace(), get_model_object=lambda _name: torch.nn.Linear(2, 2)
    )
    for guided, name in ((seg, "Smoothed Energy"), (pag, "Perturbed-Attention"), (sag, "Self-Att")):
        with pytest.raises(ValueError, match=f"^{name}.*does not know the network Linear"):
            guided(stranger)


@pytest.mark.parametrize("pieces", [in_pieces, regrouped])
def test_a_mask_from_attention_is_refused_where_the_latent_is_cut_in_pieces(pieces):
    with pytest.raises(ValueError, match="cuts the latent in tiles"):
        sample(pieces(sag(tiny_model())), size=(8, 12), steps=1)
    everywhere = sag(tiny_model(), mask="everywhere")
    assert torch.isfinite(sample(pieces(everywhere), size=(8, 12))).all()


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_mask_from_attention_is_refused_where_another_node_cuts_the_attention(order):
    def tiles(model):
        widgets = {"tile_size": 32, "swap_size": 1, "max_depth": 1, "scale_depth": False}
        return core_node("nodes_hypertile", "HyperTile", model, **widgets)

    model = tiny_model("sd15")
    guided = sag(tiles(model)) if order == "before" else tiles(sag(model))
    with pytest.raises(ValueError, match=r"^Self-Attention Guidance.*block m0.*HyperTile or ToMe"):
        sample(guided, size=(16, 16), steps=1)


def test_short_runs_of_one_prompt_say_their_line_once(monkeypatch, caplog):
    server = type("Server", (), {"instance": type("Instance", (), {"last_prompt_id": "a"})()})
    module = type("Module", (), {"PromptServer": server})
    monkeypatch.setitem(__import__("sys").modules, "server", module)
    caplog.set_level("INFO")
    for prompt, lines in (("one", 1), ("one", 1), ("two", 2)):
        server.instance.last_prompt_id = prompt
        sample(seg(tiny_model()), steps=1)
        assert sum("model evaluations guided" in m for m in caplog.messages) == lines


# What depends on the rest of the batch, or on a draw: what is promised, and what is not.


def shares_within_a_side(model):
    """As style aligned within each prompt's images: what all attend to is drawn to the first's."""

    def share(n, context, value, options):
        size = len(context) // len(options["cond_or_uncond"])
        first = context.unflatten(0, (-1, size))[:, :1].expand(-1, size, -1, -1).flatten(0, 1)
        return n, (context + first) / 2, (value + first) / 2

    model = model.clone()
    model.set_model_attn1_patch(share)
    return model


def draws_in_each_call(model):
    """As merging of tokens at random: every call of the model draws anew."""

    def shifted(n, context, value, options):
        shift = int(torch.randint(1, 9, ()))
        return n, context.roll(shift, 1), value

    model = model.clone()
    model.set_model_attn1_patch(shifted)
    return model


def test_images_that_attend_to_each_other_keep_their_own_mates():
    settings = {**SETTINGS, "batch": 2}
    alone = outcome(shares_within_a_side(exact_model()), **settings).latents
    assert difference(alone, outcome(exact_model(), **settings).latents) > 1e-3
    for reuse in (True, False):
        for model in orders(shares_within_a_side, lambda m: pag(m, 1e-12, reuse=reuse)):  # noqa: B023
            assert difference(outcome(model, **settings).latents, alone) <= NOTHING
    one, whole = (
        outcome(shares_within_a_side(seg(exact_model(), sigma=2.0, reuse=reuse)), **settings)
        for reuse in (True, False)
    )
    require_equal(one, whole)


def test_a_random_draw_is_the_same_for_both_predictions_of_one_call():
    """In one call nothing else differs; a whole pass draws anew, and its draw is pushed too."""
    alone = outcome(draws_in_each_call(exact_model()), **SETTINGS).latents
    joined = outcome(draws_in_each_call(pag(exact_model(), 1e-12)), **SETTINGS).latents
    apart = outcome(draws_in_each_call(pag(exact_model(), 1e-12, reuse=False)), **SETTINGS).latents
    assert difference(joined, alone) <= NOTHING
    assert difference(apart, alone) > 1e-3
