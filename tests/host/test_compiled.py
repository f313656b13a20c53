"""Compiled networks: as wholes they are guided eagerly, and block by block they lose nothing."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from choice import each, some
from dit_models import available, sampled, tiny_dit
from dit_oracle import block_modules, selector
from family_oracle import guide
from host_models import sample, tiny_model
from host_oracle import deviation
from reuse_checks import ROUNDING, reported

pytestmark = pytest.mark.filterwarnings("ignore")


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self):
        torch._dynamo.reset()
        self.made = self.runs = 0
        self.in_steps = []

    def __call__(self, graph, inputs):
        self.made += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


def by_the_host(model, names, graphs):
    """As nodes that compile by ComfyUI's own means."""
    node = importlib.import_module("comfy_extras.nodes_torch_compile")
    helpers = importlib.import_module("comfy_api.torch_helpers")
    model = model.clone()
    guards = {"guard_filter_fn": node.skip_torch_compile_dict}
    helpers.set_torch_compile_wrapper(model, backend=graphs, options=guards, keys=names)
    return model


def by_objects(model, names, graphs):
    """As nodes that put compiled parts in the place of the model's."""
    model = model.clone()
    for name in names:
        block = model.get_model_object(name)
        model.add_object_patch(name, torch.compile(block, backend=graphs))
    return model


def in_place(model, names, graphs):
    """As nodes that compile parts where they are."""
    for name in names:
        model.get_model_object(name).compile(backend=graphs)
    return model


WAYS = {"by the host": by_the_host, "by objects": by_objects, "in place": in_place}
METHODS = {
    "SEG": functools.partial(guide, "SEG", scale=3.0),
    "TPG": functools.partial(guide, "TPG", scale=3.0),
    "SLG": functools.partial(guide, "SLG", scale=3.0),
    "SAG": functools.partial(guide, "SAG", scale=0.5),
    "free": functools.partial(guide, "SEG", scale=3.0, branch="free"),
    "whole": functools.partial(guide, "SEG", scale=3.0, reuse=False),
}
CHANGED = 1
"""The block that guidance changes; this one and the next are compiled."""
STEPS = 3


def run(kind, method, way, *, order="before", cfg=4.0, first=CHANGED):
    """Return the latents of a tiny transformer, what its run did, and its graphs."""
    model, graphs = tiny_dit(kind), Graphs()
    modules = block_modules(model)[first : CHANGED + 2]
    names = [name for name, module in model.model.named_modules() if module in modules]
    guided = lambda model: model  # noqa: E731
    if method:
        guided = functools.partial(METHODS[method], blocks=selector(model, kind, [CHANGED]))
    compiled = (lambda model: WAYS[way](model, names, graphs)) if way else lambda model: model
    model = guided(compiled(model)) if order == "before" else compiled(guided(model))
    model.set_model_sampler_post_cfg_function(
        lambda args: graphs.in_steps.append(graphs.made) or args["denoised"]
    )
    with reported() as counts:
        latents = sampled(model, kind, steps=STEPS, cfg=cfg)
    return latents, counts, graphs


CASES = [
    ("flux", "SEG", "by the host", "before", 4.0),
    ("flux", "SEG", "in place", "after", 1.0),
    ("flux", "TPG", "by objects", "after", 4.0),
    ("flux", "SLG", "by the host", "after", 1.0),
    ("flux", "SAG", "by the host", "before", 4.0),
    ("flux", "whole", "by the host", "before", 4.0),
    ("wan", "SEG", "by the host", "before", 4.0),
    ("zimage", "SLG", "by the host", "before", 4.0),
    ("ltxv", "free", "by objects", "before", 4.0),
]


@pytest.mark.current_only
@pytest.mark.parametrize("case", some([c for c in CASES if available(c[0])], *CASES[:3]), ids=str)
def test_blocks_stay_compiled_but_for_those_that_are_changed(case):
    kind, method, way, order, cfg = case
    expected, _, _ = run(kind, method, None, cfg=cfg)
    plain, _, others = run(kind, None, way, cfg=cfg, first=CHANGED + 1)
    found, counts, graphs = run(kind, method, way, cfg=cfg, order=order)
    assert deviation(found, expected) <= ROUNDING
    assert deviation(expected, plain) > 1e-3
    first, *later = graphs.in_steps
    assert first > 0
    assert later[:-1] == later[1:], "nothing is compiled anew in later steps"
    if method in ("SEG", "TPG", "SLG"):
        assert (counts.shared, counts.reasons) == (STEPS, set())
        assert graphs.runs == others.runs > 0


def test_an_interruption_leaves_compiled_blocks_as_they_were():
    model = tiny_dit("flux")
    blocks = block_modules(model)
    names = [f"diffusion_model.{name}" for name in ("double_blocks.0", "single_blocks.1")]
    guided = guide("SEG", in_place(model, names, Graphs()), blocks="single.1")
    compiled = [block._compiled_call_impl for block in blocks]

    def interrupt(*_):
        raise RuntimeError("interrupted")

    hook = blocks[4].register_forward_pre_hook(interrupt)
    with pytest.raises(RuntimeError, match="interrupted"):
        sampled(guided, "flux")
    hook.remove()
    assert [block._compiled_call_impl for block in blocks] == compiled
    assert torch._dynamo.eval_frame._stance.stance == "default"


# Networks that are compiled as wholes.

UNET = {"num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [0],
        "transformer_depth_output": [0, 0]}  # fmt: skip
SMALL = {
    "UNet": (lambda: tiny_model("sd15", dtype=torch.float64, **UNET), sample, "m0"),
    "Flux": (
        lambda: tiny_dit("flux", depth=1, depth_single_blocks=1),
        functools.partial(sampled, kind="flux"),
        "single.0",
    ),
}


def compiled_run(way, name, network, order, method="SEG"):
    """Return latents beside a compiled part and without one, what the run did, and its graphs."""
    build, run, blocks = SMALL[network]
    graphs = Graphs()
    guided = functools.partial(METHODS[method], blocks=blocks)
    compiled = functools.partial(WAYS[way], names=[name], graphs=graphs)
    expected, plain = run(guided(build())), run(build())
    assert deviation(expected, plain) > 1e-3
    model = guided(compiled(build())) if order == "before" else compiled(guided(build()))
    with reported() as counts:
        found = run(model)
    return found, expected, counts, graphs


@pytest.mark.parametrize(*each(way=WAYS, network=SMALL, order=["after", "before"]))
def test_what_is_compiled_as_a_whole_is_guided_eagerly(way, network, order):
    found, expected, counts, graphs = compiled_run(way, "diffusion_model", network, order)
    assert deviation(found, expected) <= ROUNDING
    assert counts.because("compiled") == counts.full.total() > 0
    assert graphs.runs > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_part_of_a_changed_layer_is_no_reason_against_one_call(way):
    part = "diffusion_model.middle_block.1.transformer_blocks.0"
    found, expected, counts, _ = compiled_run(way, part, "UNet", "after", "SLG")
    assert deviation(found, expected) <= ROUNDING
    assert counts.reasons == set()
