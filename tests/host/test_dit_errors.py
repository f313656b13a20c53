"""What cannot be guided says so and why; what was not reached is a warning, never silence."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from dit_models import TINY, available, sample_dit, tiny_dit
from dit_oracle import block_modules, shape_of
from host_models import seg
from reuse_checks import part, reported

KINDS = [kind for kind in TINY if available(kind)]
UNSUPPORTED = {
    "comfy.ldm.pixart.pixartms.PixArtMS": "PixArt",
    "comfy.ldm.hydit.models.HunYuanDiT": "HunyuanDiT",
    "comfy.ldm.ernie.model.ErnieImageModel": "ERNIE-Image",
    "comfy.ldm.seedvr.model.NaDiT": "SeedVR2",
    "comfy.ldm.minimax.model.MiniMaxH3Model": "MiniMax H3",
    "comfy.ldm.wan.ar_model.CausalWanModel": "Wan autoregressive",
}


def model_around(network):
    """Return what the node needs of a model whose network is never run."""
    return SimpleNamespace(model=SimpleNamespace(), get_model_object=lambda _name: network)


@pytest.mark.parametrize("path", UNSUPPORTED)
def test_a_family_out_of_reach_is_an_error_that_names_it_and_says_why(path):
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except ImportError:
        pytest.skip("this ComfyUI has no such family")
    network = cls.__new__(cls)
    torch.nn.Module.__init__(network)
    with pytest.raises(ValueError, match=f"{UNSUPPORTED[path]} models .*: ") as error:
        seg(model_around(network))
    assert name in str(error.value)


def test_an_unknown_network_is_an_error_that_says_how_to_report_it():
    with pytest.raises(ValueError, match=r"network Linear \(torch\.nn.*issues"):
        seg(model_around(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_and_the_blocks_of_every_row_exist(kind):
    model = tiny_dit(kind)
    network = part("networks").network_of(model, "SEG")
    assert len(network.catalogue) == len(block_modules(model, kind))
    assert network.targets("auto")
    assert network.targets(network.describe(network.targets("auto"))) == network.targets("auto")


def test_each_row_of_the_table_is_a_class_of_the_newest_comfyui(comfy_host):
    families = part("networks.dit.families").FAMILIES
    missing = []
    for family in families:
        module, _, name = ("comfy.ldm." + family.network).rpartition(".")
        try:
            found = hasattr(importlib.import_module(module), name)
        except ImportError:
            found = False
        missing += [] if found else [family.name]
    if comfy_host.version >= (0, 30):
        assert not missing
    assert len({family.network for family in families}) == len(families)


@pytest.mark.parametrize(
    ("depth", "blocks"), [(24, range(7, 10)), (38, range(11, 16)), (57, range(17, 23)), (1, [0])]
)
def test_auto_is_a_middle_range_of_the_depth(depth, blocks):
    table = part("networks.dit.families")
    assert list(table.auto_range(table.FAMILIES[0], depth)) == list(blocks)


def test_a_block_that_does_not_exist_is_an_error_that_lists_what_does():
    with pytest.raises(ValueError, match=r"double\.0-1, single\.0-2"):
        seg(tiny_dit("flux"), blocks="double.7-9")
    with pytest.raises(ValueError, match="this model has 0-4"):
        seg(tiny_dit("sd3"), blocks="7-9")


def without_options(monkeypatch, module, name):
    """Let a family's attention no longer pass on the host's options."""
    original = getattr(sys.modules[module], name)

    def attention(*args, transformer_options=None, **kwargs):
        del transformer_options
        return original(*args, **kwargs)

    monkeypatch.setattr(sys.modules[module], name, attention)


HOOKS = {
    "flux": ("comfy.ldm.flux.layers", "attention"),
    "sd3": ("comfy.ldm.modules.diffusionmodules.mmdit", "optimized_attention"),
    "wan": ("comfy.ldm.wan.model", "optimized_attention"),
    "hidream": ("comfy.ldm.hidream.model", "optimized_attention"),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_family_whose_hook_is_gone_warns(kind, monkeypatch, caplog):
    without_options(monkeypatch, *HOOKS[kind])
    with caplog.at_level(logging.WARNING):
        sample_dit(seg(tiny_dit(kind)), kind, shape_of(kind, (3, 4)))
    (message,) = [r.getMessage() for r in caplog.records if "never reached" in r.getMessage()]
    assert "was never reached" in message


def test_a_latent_that_does_not_fit_the_sequence_counts_as_a_miss(monkeypatch, caplog):
    """As when a network's tokens are no longer laid out as the table says."""
    view = part("networks.dit.dit").DiT
    original = view.layout
    monkeypatch.setattr(
        view, "layout", lambda *args: dataclasses.replace(original(*args), beside=10_000)
    )
    with caplog.at_level(logging.WARNING):
        sample_dit(seg(tiny_dit("wan")), "wan", shape_of("wan", (3, 4)))
    assert "was never reached" in caplog.text


def test_another_node_that_skips_the_block_is_a_warning(caplog):
    model = tiny_dit("flux").clone()
    model.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
    with caplog.at_level(logging.WARNING):
        sample_dit(seg(model, blocks="double.1"), "flux", shape_of("flux", (3, 4)))
    assert "block double.1 was never reached" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_every_targeted_block_is_hit_in_every_pass(kind):
    with reported() as reports:
        sample_dit(seg(tiny_dit(kind)), kind, shape_of(kind, (3, 4)))
    ((report, (branch,)),) = reports
    assert report.calls[branch] == 2
    assert {report.hits[branch, target] for target in branch.perturbation.targets} == {2}
