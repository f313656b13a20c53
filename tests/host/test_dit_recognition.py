"""A network is what its code is: strange subclasses and strange tokens are refused by name."""

from __future__ import annotations

import dit_variants as more
import pytest
import torch
from dit_models import KINDS, sampled, shape_of, tiny_dit
from dit_oracle import dense_guidance, found_rows, without_refiners
from host_models import part, seg
from host_oracle import blur_map, deviation


def as_subclass(model, kept=None, **members):
    """Make a network one of a subclass, of which the table knows nothing."""
    network = kept or model.model.diffusion_model
    network.__class__ = type("Stranger", (type(network),), members)
    return model


def blocks_by_another_way(self, x, *_args, **_kwargs):
    """Run blocks as Wan Animate 2 does: they are never called."""
    for block in self.blocks:
        x = x + 0.1 * block.self_attn.norm_q.weight.mean()
    return x


REPLACED = {"wan": "forward_orig", "lumina2": "patchify_and_embed", "flux": "_forward"}


@pytest.mark.parametrize("kind", REPLACED)
def test_a_subclass_that_runs_or_arranges_its_blocks_otherwise_is_refused_by_name(kind):
    model = as_subclass(tiny_dit(kind), **{REPLACED[kind]: blocks_by_another_way})
    names = rf"network Stranger \({__name__}.*report .*ComfyUI \d+\.\d+\.\d+ at "
    with pytest.raises(ValueError, match=names):
        seg(model)


def derived(cls):
    """Return the networks of ComfyUI that are derived from one; ControlNets are never guided."""
    below = [one for child in cls.__subclasses__() for one in (child, *derived(child))]
    ours = [one for one in below if one.__module__.startswith("comfy.")]
    return [one for one in ours if not one.__module__.endswith(".controlnet")]


def test_every_subclass_that_comfyui_has_of_a_network_of_the_table_is_in_it():
    family_of = part("host.networks.dit.recognition").family_of
    networks = {type(tiny_dit(kind).model.diffusion_model) for kind in KINDS}
    found = {one for cls in networks for one in derived(cls)}
    missing = [cls for cls in found if family_of(cls.__new__(cls)) is None]
    assert found
    assert not missing


def test_a_subclass_with_blocks_of_its_own_is_refused_by_name():
    model = as_subclass(tiny_dit("wan"))
    as_subclass(model, model.model.diffusion_model.blocks[1])
    with pytest.raises(ValueError, match="network Stranger"):
        seg(model)


def test_a_subclass_that_only_adds_something_belongs_to_its_family():
    model = as_subclass(tiny_dit("wan"), added=lambda self: self.blocks, dim_of_text=24)
    assert torch.equal(sampled(seg(model), "wan"), sampled(seg(tiny_dit("wan")), "wan"))


@pytest.mark.parametrize("branch", ["conditional", "free"])
def test_blocks_that_are_never_called_leave_the_result_as_it_was(branch, monkeypatch, caplog):
    """In the branch `free` a perturbation that is not there would look like a higher cfg."""
    model = tiny_dit("wan")
    network = type(model.model.diffusion_model)
    monkeypatch.setattr(network, "forward_orig", blocks_by_another_way)
    caplog.set_level("INFO")
    assert torch.equal(sampled(seg(model, branch=branch), "wan"), sampled(model, "wan"))
    assert sum("was never reached" in message for message in caplog.messages) == 1
    assert not any("evaluations guided" in message for message in caplog.messages)


@pytest.mark.parametrize("name", ["ref_frames", "frames_of_tomorrow"])
@pytest.mark.parametrize("kind", ["lumina2", "zimage"])
def test_tokens_behind_the_image_are_explained_or_refused(kind, name, monkeypatch):
    model, shape = without_refiners(tiny_dit(kind)), shape_of(kind)
    cond = {"model_conds": {name: more.frames_behind(model, shape, monkeypatch)}}
    guided = seg(model, sigma=0.7, blocks="0-1")
    if name != "ref_frames":
        with pytest.raises(ValueError, match=r"NextDiT .* beside .* report these names and Comfy"):
            sampled(guided, kind, shape, cond=cond)
        return
    rows, length = found_rows(model, kind, shape, cond)
    assert rows[-1] < length - more.BEHIND
    expected = dense_guidance(
        model, kind, rows, length, [0, 1], scale=3.0, blur=blur_map(3, 4, 0.7)
    )
    found, reference = (sampled(m, kind, shape, cond=cond) for m in (guided, expected))
    assert deviation(found, reference) < 1e-4


def test_an_image_that_no_longer_attends_to_itself_alone_is_refused(monkeypatch):
    model = tiny_dit("cosmos2")
    attention = model.model.diffusion_model.blocks[0].self_attn
    compute = type(attention).compute_attention

    def with_another(self, q, k, v, **kwargs):
        q, k, v = (torch.cat([tensor[:, :3], tensor], dim=1) for tensor in (q, k, v))
        return compute(self, q, k, v, **kwargs)[:, 3:]

    monkeypatch.setattr(type(attention), "compute_attention", with_another)
    with pytest.raises(ValueError, match=r"MiniTrainDIT .* has 3 tokens beside .* and 0 were"):
        sampled(seg(model), "cosmos2")
