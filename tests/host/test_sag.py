"""Self-Attention Guidance: equal to core's node at its settings, right where that one is not."""

from __future__ import annotations

import importlib
import math

import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras.nodes_sag import SelfAttentionGuidance
from host_models import PACK, conditioning, counted_calls, sample, seg, tiny_model


def sag(model, scale=0.5, sigma=2.0, start=0.0, end=1.0, **advanced):
    node = importlib.import_module(PACK + ".nodes.sag").SEGuidanceSAG
    return node.execute(model, scale, sigma, start, end, **advanced)[0]


def core_sag(model, scale=0.5, sigma=2.0):
    return SelfAttentionGuidance.execute(model, scale, sigma)[0]


def distance(a, b):
    return float((a - b).abs().max() / b.std())


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("batch", [1, 2])
def test_core_settings_give_cores_result(kind, batch):
    model = tiny_model(kind)
    options = {"size": (16, 16), "batch": batch, "cfg": 7.0}
    theirs = sample(core_sag(model), **options)
    assert distance(sample(sag(model, branch="unconditional"), **options), theirs) < 1e-5
    assert distance(sample(model, **options), theirs) > 1e-3


@pytest.mark.parametrize(
    "wrong", [{"threshold": 1.1}, {"sigma": 1.8}, {"kernel": "full"}, {"mask": "everywhere"}]
)
def test_the_comparison_with_core_notices_a_wrong_setting(wrong):
    model = tiny_model()
    options = {"size": (16, 16), "cfg": 7.0}
    theirs = sample(core_sag(model), **options)
    ours = sample(sag(model, **{"branch": "unconditional"} | wrong), **options)
    assert distance(ours, theirs) > 1e-4


def split_chunks(monkeypatch):
    """Let every cond run on its own, as when memory is short."""
    import comfy.model_base

    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_a, **_k: math.inf)


@pytest.mark.parametrize("branch", ["conditional", "unconditional"])
def test_result_does_not_depend_on_how_the_host_splits_conds(branch, monkeypatch):
    model = tiny_model()
    options = {"size": (16, 10), "cfg": 7.0}
    whole = sample(sag(model, branch=branch), **options)
    split_chunks(monkeypatch)
    with counted_calls(model) as calls:
        split = sample(sag(model, branch=branch), **options)
    assert set(calls) == {1}
    assert distance(split, whole) < 1e-5


def test_cfg_one_costs_two_passes():
    model = tiny_model()
    with counted_calls(model) as calls:
        guided = sample(sag(model), cfg=1.0)
    assert calls == [1, 1, 1, 1]
    assert distance(guided, sample(model, cfg=1.0)) > 1e-3


def dense_mass(q, k, heads):
    """Column sums of a whole softmax map, averaged over heads."""
    q, k = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
    attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return attention.mean(1).sum(1)


def written_out(model, scale, sigma):
    """The oracle: a dense map at the true grid, a blur by loops, the formula of the paper."""
    seen = []

    def record(q, k, v, extra):
        seen.append((q, k, extra["n_heads"]))
        return optimized_attention(q, k, v, extra["n_heads"])

    def guide(args):
        x0, x = args["cond_denoised"].double(), args["input"].double()
        size = x.shape[-2:]
        height, width = (-(-n // 2) for n in size)
        mass = dense_mass(*seen[-1]).reshape(1, 1, height, width)
        rows = [int(i * height / size[0]) for i in range(size[0])]
        columns = [int(i * width / size[1]) for i in range(size[1])]
        mask = (mass > 1.0).double()[:, :, rows][:, :, :, columns]
        assert 0 < mask.mean() < 1
        degraded = mask * blur_by_loops(x0, sigma) + (1 - mask) * x0
        (again,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], (x + degraded - x0).float(), args["sigma"],
            args["model_options"],
        )  # fmt: skip
        return (x0 + scale * (degraded - again)).float()

    model = model.clone()
    model.set_model_attn1_replace(record, "middle", 0, 0)
    model.set_model_sampler_post_cfg_function(guide)
    return model


@pytest.mark.parametrize("size", [(16, 16), (18, 8), (36, 4), (9, 13)])
def test_one_step_equals_the_formula_written_out(size):
    model = tiny_model()
    one = {"size": size, "steps": 1, "cfg": 1.0}
    expected = sample(written_out(model, 0.7, 1.5), **one)
    assert distance(sample(sag(model, 0.7, 1.5), **one), expected) < 1e-5
    assert distance(sample(sag(model, 0.7, 1.4), **one), expected) > 1e-5


def blur_by_loops(image, sigma):
    """A Gaussian of 9 taps, fewer on short axes, reflected at the border."""
    for axis in (-2, -1):
        n = image.shape[axis]
        taps = min(9, n - (n % 2 - 1))
        half = taps // 2
        weights = [math.exp(-0.5 * ((t - half) / sigma) ** 2) for t in range(taps)]
        lines = []
        for i in range(n):
            total = 0
            for t, weight in enumerate(weights):
                j = i + t - half
                j = -j if j < 0 else 2 * (n - 1) - j if j >= n else j
                total = total + weight * image.select(axis, j)
            lines.append(total / sum(weights))
        image = torch.stack(lines, axis)
    return image


def test_areas_use_the_mask_of_their_own_prompt():
    """Two prompts side by side: each half is guided as if the mask were its own prompt's."""
    model = tiny_model()
    left = conditioning(1, area=(16, 8, 0, 0), strength=1.0)
    right = conditioning(3, area=(16, 8, 0, 8), strength=1.0)
    masses = {}
    saliency = importlib.import_module(PACK + ".nodes.host.sampling.saliency")
    original = saliency.attention_over_latent

    def spy(blur, run, x, sigma, conds, model_options):
        result = original(blur, run, x, sigma, conds, model_options)
        masses["whole"] = result
        for cond in conds:
            ((_, layers),) = run.masses[(blur, cond["uuid"])].parts.values()
            (mass,) = layers.values()
            grid = mass.grid
            masses[cond["area"][3]] = mass.mass.reshape(1, 1, grid.height, grid.width)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saliency, "attention_over_latent", spy)
        guided = sample(sag(model), positive=left + right, size=(16, 16), steps=1, cfg=1.0)
    assert torch.isfinite(guided).all()
    for offset in (0, 8):
        ours = masses["whole"][..., offset : offset + 8]
        nearest = masses[offset].repeat_interleave(2, -2).repeat_interleave(2, -1)
        assert torch.allclose(ours, nearest, atol=1e-5)


def test_a_mask_everywhere_needs_no_attention_and_blurs_all():
    model = tiny_model()
    everywhere = sample(sag(model, mask="everywhere"), size=(16, 16))
    threshold_zero = sample(sag(model, threshold=0.0), size=(16, 16))
    assert distance(everywhere, threshold_zero) < 1e-5


@pytest.mark.parametrize("setting", [{"scale": 0.0}, {"sigma": 0.0}])
def test_without_effect_it_is_free_and_says_so(setting, caplog):
    model = tiny_model()
    with counted_calls(model) as calls:
        assert torch.equal(sample(sag(model, **setting)), sample(model))
    assert calls == [2, 2, 2, 2]
    assert "has no effect" in caplog.text


def test_a_batch_mate_does_not_change_an_image():
    model = tiny_model()
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    options = {"size": (16, 16), "cfg": 1.0, "steps": 2}
    both = sample(sag(model), noise=noise, latent=torch.zeros_like(noise), **options)
    alone = sample(sag(model), noise=noise[:1], latent=torch.zeros_like(noise[:1]), **options)
    assert distance(both[:1], alone) < 1e-5


@pytest.mark.parametrize("cfg", [7.0, 1.0])
@pytest.mark.parametrize("order", ["seg first", "sag first"])
def test_beside_seg_the_guidances_add(order, cfg):
    model = tiny_model()
    one = {"cfg": cfg, "steps": 1, "size": (16, 16)}
    off = sample(model, **one)
    both = sag(seg(model)) if order == "seg first" else seg(sag(model))
    apart = (sample(seg(model), **one) - off) + (sample(sag(model), **one) - off) + off
    assert distance(sample(both, **one), apart) < 1e-5


def test_beside_cores_own_nodes_every_guidance_stays():
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    model = tiny_model()
    one = {"cfg": 7.0, "steps": 1, "size": (16, 16)}
    off = sample(model, **one)
    core = core_sag(PerturbedAttentionGuidance.execute(model, 2.0)[0])
    added = sample(sag(core), **one) - sample(core, **one)
    assert distance(added, sample(sag(model), **one) - off) < 1e-4


def test_an_unknown_mask_is_refused():
    with pytest.raises(ValueError, match="attention or everywhere"):
        sag(tiny_model(), mask="nowhere")
