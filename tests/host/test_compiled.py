"""Compiled networks: as wholes they are guided eagerly, and block by block they lose nothing."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from dit_models import available, sample_dit, tiny_dit
from dit_oracle import block_modules, selector, shape_of
from family_oracle import guide
from host_oracle import deviation
from reuse_checks import ROUNDING, difference, exact_model, outcome, reported

pytestmark = pytest.mark.filterwarnings("ignore")


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self):
        torch._dynamo.reset()
        self.made = self.runs = 0
        self.in_steps = []

    def __call__(self, graph, inputs):
        del inputs
        self.made += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


def names_of(model, blocks):
    """Return the names of some modules below the host's model."""
    return [name for name, module in model.model.named_modules() if module in blocks]


def by_the_host(model, names, graphs):
    """As nodes that compile blocks by ComfyUI's own means."""
    node = importlib.import_module("comfy_extras.nodes_torch_compile")
    helpers = importlib.import_module("comfy_api.torch_helpers")
    model = model.clone()
    guards = {"guard_filter_fn": node.skip_torch_compile_dict}
    helpers.set_torch_compile_wrapper(model, backend=graphs, options=guards, keys=names)
    return model


def by_objects(model, names, graphs):
    """As nodes that put compiled blocks in the place of the model's."""
    model = model.clone()
    for name in names:
        block = model.get_model_object(name)
        model.add_object_patch(name, torch.compile(block, backend=graphs))
    return model


def blocks_in_place(model, names, graphs):
    """As nodes that compile blocks where they are."""
    for name in names:
        model.get_model_object(name).compile(backend=graphs)
    return model


METHODS = {
    "SEG": lambda model, blocks, **own: guide("SEG", model, 3.0, blocks=blocks, **own),
    "TPG": lambda model, blocks, **own: guide("TPG", model, 3.0, blocks=blocks, **own),
    "SLG": lambda model, blocks, **own: guide("SLG", model, 3.0, blocks=blocks, **own),
    "SAG": lambda model, blocks, **own: guide("SAG", model, 0.5, blocks=blocks, **own),
    "free": lambda model, blocks, **own: guide(
        "SEG", model, 3.0, blocks=blocks, branch="free", **own
    ),
}


CHANGED = 1


def run(kind, method, way, *, order="before", steps=2, cfg=4.0, reuse=True, all_blocks=True):
    """Return the latents of a tiny transformer, its report, and its graphs.

    Two blocks are compiled, or the one of them that guidance does not change.
    """
    model, graphs = tiny_dit(kind), Graphs()
    blocks = selector(model, kind, [CHANGED])
    modules = block_modules(model, kind)[CHANGED if all_blocks else CHANGED + 1 : CHANGED + 2]
    names = names_of(model, modules)
    own = {"reuse": False} if not reuse and method != "SAG" else {}
    guided = functools.partial(METHODS[method], blocks=blocks, **own) if method else lambda m: m
    if way and order == "before":
        model = guided(way(model, names, graphs))
    else:
        model = way(guided(model), names, graphs) if way else guided(model)
    model.set_model_sampler_post_cfg_function(
        lambda args: graphs.in_steps.append(graphs.made) or args["denoised"]
    )
    with reported() as reports:
        latents = sample_dit(model, kind, shape_of(kind, (3, 4)), steps=steps, cfg=cfg)
    return latents, reports[0][0] if reports else None, graphs


@pytest.mark.parametrize(
    ("way", "method", "order", "cfg"),
    [
        (by_the_host, "SEG", "before", 4.0),
        (by_the_host, "SLG", "after", 1.0),
        (by_objects, "TPG", "after", 4.0),
        (blocks_in_place, "SEG", "after", 1.0),
    ],
)
def test_compiled_blocks_stay_compiled_but_for_those_that_are_changed(way, method, order, cfg):
    expected, _, _ = run("flux", method, None, cfg=cfg)
    plain, _, others = run("flux", None, way, cfg=cfg, all_blocks=False)
    found, report, graphs = run("flux", method, way, cfg=cfg, order=order)
    assert not report.full, report.full
    assert sum(report.shared.values()) == 2
    assert graphs.runs == others.runs > 0
    assert deviation(found, expected) <= ROUNDING
    assert deviation(expected, plain) > 1e-3


@pytest.mark.current_only
@pytest.mark.parametrize(
    ("kind", "method", "way"),
    [
        ("flux", "SEG", by_objects),
        ("flux", "SAG", by_the_host),
        ("wan", "SEG", by_the_host),
        ("zimage", "SLG", by_the_host),
        ("ltxv", "free", by_objects),
    ],
)
def test_nothing_is_compiled_anew_in_later_steps(kind, method, way):
    if not available(kind):
        pytest.skip("not in this ComfyUI")
    expected, _, _ = run(kind, method, None, steps=3)
    found, _, graphs = run(kind, method, way, steps=3)
    assert deviation(found, expected) <= ROUNDING
    first, second, third = graphs.in_steps
    assert 0 < first <= second == third


@pytest.mark.current_only
def test_blocks_before_the_change_run_the_graphs_that_the_plain_model_made():
    model, graphs = tiny_dit("flux"), Graphs()
    first = block_modules(model, "flux")[:CHANGED]
    model = by_objects(model, names_of(model, first), graphs)
    shape = shape_of("flux", (3, 4))
    sample_dit(model, "flux", shape)
    made, runs = graphs.made, graphs.runs
    sample_dit(guide("SEG", model, blocks=f"double.{CHANGED}"), "flux", shape)
    assert (graphs.made, graphs.runs) == (made, 2 * runs)


@pytest.mark.current_only
def test_a_whole_pass_keeps_the_compiled_blocks_too():
    expected, _, _ = run("flux", "SEG", None, reuse=False)
    found, _, graphs = run("flux", "SEG", by_the_host, reuse=False)
    assert deviation(found, expected) <= ROUNDING
    plain, others = (
        run("flux", None, by_the_host, all_blocks=every)[2].runs for every in (True, False)
    )
    assert graphs.runs == plain + others


def test_an_interruption_leaves_compiled_blocks_as_they_were():
    model, graphs = tiny_dit("flux"), Graphs()
    blocks = block_modules(model, "flux")
    guided = guide(
        "SEG", blocks_in_place(model, names_of(model, blocks), graphs), blocks="single.1"
    )
    compiled = [block._compiled_call_impl for block in blocks]

    def interrupt(*_):
        raise RuntimeError("interrupted")

    hook = blocks[3].register_forward_pre_hook(interrupt)
    with pytest.raises(RuntimeError, match="interrupted"):
        sample_dit(guided, "flux", shape_of("flux", (3, 4)))
    hook.remove()
    assert [block._compiled_call_impl for block in blocks] == compiled
    assert torch._dynamo.eval_frame._stance.stance == "default"


def in_place(model):
    model.model.diffusion_model.compile(backend="eager")
    return model


def as_an_object(model):
    return by_objects(model, ["diffusion_model"], "eager")


def part_of_a_layer(model):
    return by_objects(model, ["diffusion_model.middle_block.1.transformer_blocks.0"], "eager")


@pytest.mark.parametrize(("method", "order"), [("SEG", "before"), ("SEG", "after"),
                                               ("TPG", "before"), ("SLG", "after")])  # fmt: skip
@pytest.mark.parametrize(
    ("compiled", "reasons"),
    [
        (in_place, {"the model is compiled"}),
        (as_an_object, {"the model is compiled"}),
        (part_of_a_layer, set()),
    ],
)
def test_what_is_compiled_of_a_unet_is_guided_eagerly(compiled, reasons, order, method):
    torch._dynamo.reset()
    small = {"num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [0],
             "transformer_depth_output": [0, 0]}  # fmt: skip
    guided = functools.partial(guide, method, scale=2.0, blocks="m0")
    expected = outcome(guided(model=exact_model("sd15", **small)), steps=2)
    model = exact_model("sd15", **small)
    found = outcome(
        guided(model=compiled(model)) if order == "before" else compiled(guided(model=model)),
        steps=2,
    )
    assert found.reasons == reasons
    assert difference(found.latents, expected.latents) < 1e-5
    plain = outcome(exact_model("sd15", **small), steps=2)
    assert difference(expected.latents, plain.latents) > 1e-3
