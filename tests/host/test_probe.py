"""The probe: its numbers against independent ones, its cost, its bounds, what it leaves alone."""

from __future__ import annotations

import math

import host_oracle
import pytest
import torch
from choice import each
from comfy.samplers import KSAMPLER, CFGGuider
from dit_models import sampled, shape_of
from dit_oracle import exact_model
from family_oracle import guide
from host_models import conditioning, part, sample, seg, shared_model, tiny_model
from host_oracle import blur_map, by_head, deviation, halved
from stand_ins import attention_override, noted
from strange_guiders import sampled_by

SIZE = (6, 10)


def probed(model):
    """Return a watched clone and its probe, called as ComfyUI calls the node."""
    return part("report").SEGuidanceProbe.execute(model)[:2]


def recorded(model, kind="sdxl", **options):
    """Sample a watched model; return the record and the latents."""
    watched, probe = probed(model)
    samples = sampled(watched, kind, **options)
    record, made_it = probe.record(samples)
    assert made_it
    return record, samples


def rms(tensor):
    return float(tensor.double().square().mean().sqrt())


# Numbers


@pytest.mark.parametrize("sigma", [1.3, math.inf])
def test_sizes_cosine_and_heat_equal_independent_ones(sigma):
    before, after = [], []
    model = noted(seg(noted(shared_model(), before), 2.5, sigma), after)
    record, _ = recorded(model, cfg=4.0, steps=3, batch=2)
    assert len(record.steps) == len(record.heat) == 3
    assert record.heat.device.type == "cpu"
    held = [v for step in record.steps for b in step.branches.values() for v in vars(b).values()]
    assert not any(isinstance(value, torch.Tensor) for value in held), "nothing stays on a device"
    for step, heat, plain, guided in zip(record.steps, record.heat, before, after, strict=True):
        change = (guided["denoised"] - plain["denoised"]).double()
        cfg = (plain["denoised"] - plain["cond_denoised"]).double()
        branch = step.branches[0]
        assert branch.guidance == pytest.approx(rms(change), rel=1e-5)
        assert branch.cfg == pytest.approx(rms(cfg), rel=1e-5)
        assert branch.prediction == pytest.approx(rms(plain["cond_denoised"]), rel=1e-5)
        cosine = (change * cfg).sum() / (change.norm() * cfg.norm())
        assert branch.cosine == pytest.approx(float(cosine), rel=1e-4, abs=1e-6)
        assert step.noise_sigma == pytest.approx(float(plain["sigma"].flatten()[0]), rel=1e-6)
        torch.testing.assert_close(heat, change.square().mean(1).float(), rtol=1e-5, atol=1e-8)


def attention_logits(model, kind, call, tokens, **options):
    """Return the image's logits in one attention call of the plain model, by head."""
    seen = []

    def keep(func, query, key, value, heads, *args, **kwargs):
        apart = by_head((query.double(), key.double()), heads, kwargs)
        seen.append(host_oracle.attention_logits(*apart))
        return func(query, key, value, heads, *args, **kwargs)

    sampled(attention_override(keep)(model), kind, **options)
    return seen[call][0, :, -tokens:]


def dense_measures(logits, blur):
    """Return variance, mean log-sum-exp and curvature of `(heads, queries, keys)`, blurred."""
    logits = blur @ logits
    variance = logits.var(dim=1, correction=0).mean()
    inner = 1 - logits.softmax(-1).square().sum(-1)
    curvature = (blur.square().sum(1) * inner).mean()
    return [float(x) for x in (variance, torch.logsumexp(logits, -1).mean(), curvature)]


EXACT = (1e-4, 1e-5, 1e-4)


@pytest.mark.parametrize(
    ("kind", "block", "call", "heads", "sigma", "size", "off"),
    [
        ("sdxl", "m0.0", 4, [1, 3], 1.3, SIZE, EXACT),
        ("sdxl", "m0.0", 4, [1, 3], math.inf, SIZE, EXACT),
        ("sdxl", "m0.0", 4, [1, 3], 2.0, (32, 48), (0.4, 0.05, 0.1)),  # by 64 queries
        ("sdxl", "m0.0:h2", 4, [2], 1.3, SIZE, EXACT),
        ("sd3", "1", 2, [0], 1.3, (8, 12), EXACT),
        ("flux", "double.1:h1", 1, [1], math.inf, (8, 12), EXACT),
        ("wan", "1:h0-1", 2, [0, 1], 1.3, (8, 12), EXACT),
    ],
)
def test_block_quantities_equal_dense_ones_and_are_lowered_by_the_blur(
    kind, block, call, heads, sigma, size, off
):
    """Of four heads two are measured, of chosen ones those alone."""
    latent = {"size": size} if kind == "sdxl" else {"shape": shape_of(kind, (4, 6), frames=1)}
    options = {"steps": 1, "cfg": 1.0, **latent}
    model, grid = exact_model(kind), halved(size, 1)
    queries = math.prod(grid)
    logits = attention_logits(model, kind, call, queries, **options)[heads]
    record, _ = recorded(seg(model, 3.0, sigma, blocks=block), kind, **options)
    ((name, measured),) = record.steps[0].branches[0].blocks.items()
    assert name == block
    assert measured.queries == queries
    plain, blurred = (
        [measures.variance, measures.logsumexp, measures.curvature]
        for measures in (measured.plain, measured.blurred)
    )
    identity = torch.eye(queries, dtype=torch.float64)
    for found, blur in ((plain, identity), (blurred, blur_map(*grid, sigma))):
        dense = dense_measures(logits, blur)
        for one, other, rel in zip(found, dense, off, strict=True):
            assert one == pytest.approx(other, rel=rel, abs=1e-8)
    assert all(after < before for after, before in zip(blurred, plain, strict=True))


# What it counts


def test_passes_are_told_step_by_step():
    record, _ = recorded(seg(shared_model()), steps=3)
    for step in record.steps:
        assert step.branches[0].joined + step.branches[0].whole == 1
        assert step.milliseconds > 0
    record, _ = recorded(seg(shared_model(), reuse=False), steps=2)
    assert [(s.branches[0].joined, s.branches[0].whole) for s in record.steps] == [(0, 1)] * 2


def test_steps_without_guidance_are_watched_too():
    record, _ = recorded(seg(shared_model(), end=0.5), steps=6)
    active = [bool(step.branches) for step in record.steps]
    assert active[0]
    assert not active[-1]
    assert record.heat.shape[0] == sum(active)
    record, samples = recorded(shared_model(), steps=2)
    assert len(record.steps) == 2
    assert record.branches == ()
    assert record.heat is None
    assert torch.equal(samples, sampled(shared_model(), "sdxl", steps=2))


def test_noise_levels_are_kept_where_a_sampler_writes_them_into_one_tensor():
    def step(model, x, sigmas, extra_args=None, **_):
        level = x.new_ones([len(x)])
        for sigma in sigmas[:-1]:
            x = model(x, level.fill_(float(sigma)), **extra_args)
        return x

    watched, probe = probed(shared_model())
    samples = sampled_by(
        CFGGuider, watched, sampler=KSAMPLER(step), sigmas=torch.tensor([3.0, 2, 1, 0])
    )
    record, _ = probe.record(samples)
    assert [one.noise_sigma for one in record.steps] == [3, 2, 1]


def test_area_conds_and_several_samplers_are_recorded():
    prompts = conditioning(1, area=(6, 4, 0, 0)) + conditioning(3)
    record, _ = recorded(seg(shared_model()), positive=prompts, sampler="heun", steps=2)
    assert len(record.steps) == 3  # heun evaluates twice a step, but the last
    assert all(step.branches[0].guidance > 0 for step in record.steps)


def test_chained_branches_of_every_side_are_told_apart():
    both = guide("PAG", seg(shared_model(), 2.0, branch="free"), branch="unconditional")
    record, _ = recorded(both, steps=1)
    labels = [b.perturbation.label for b in record.branches]
    assert labels == [part("seg").SEGuidance.LABEL, part("pag").SEGuidancePAG.LABEL]
    first, second = (record.steps[0].branches[i] for i in (0, 1))
    assert first.blocks
    assert not second.blocks
    assert first.cfg == second.cfg
    assert first.guidance > 0
    assert second.guidance > 0
    assert first.joined + first.whole == 0
    assert second.joined + second.whole == 1


@pytest.mark.parametrize(*each(kind=["sdxl", "flux", "lumina2", "wan"], sigma=[1.3, math.inf]))
def test_every_model_is_measured_and_left_as_it_is(kind, sigma):
    model = seg(exact_model(kind), 1.0, sigma)
    record, samples = recorded(model, kind, steps=1)
    assert torch.equal(samples, sampled(model, kind, steps=1))
    (branch,) = record.steps[0].branches.values()
    assert branch.guidance > 0
    assert branch.blocks
    flat = math.isinf(sigma) and kind != "wan"  # whose two frames have a mean each
    for block in branch.blocks.values():
        assert block.blurred.variance < (1e-8 if flat else block.plain.variance)


@pytest.mark.parametrize(*each(kind=["sdxl", "flux"], method=["TPG", "SLG", "PAG", "SAG"]))
def test_every_method_is_recorded(kind, method):
    record, _ = recorded(guide(method, exact_model(kind), 2.0), kind, steps=2)
    passes = (0, 1) if method == "SAG" else (1, 0)
    for step in record.steps:
        (branch,) = step.branches.values()
        assert branch.guidance > 0
        assert (branch.joined, branch.whole) == passes


# How much of a push a higher cfg would have done.


def only_cross_attention(model):
    """Let a tiny UNet's middle block do nothing but read the prompt, and no other block."""
    with torch.no_grad():
        for name, weight in model.model.diffusion_model.named_parameters():
            writes = any(part in name for part in ("attn1.to_out", "attn2.to_out", ".ff.net.2"))
            reads_the_prompt = name.startswith("middle_block") and "attn2" in name
            if writes and (not reads_the_prompt or name.endswith("bias")):
                weight.zero_()
    return model


def test_guidance_that_is_a_higher_cfg_is_known_as_one(caplog):
    """Without its middle block the model does not see the prompt: SLG is cfg itself."""
    caplog.set_level("INFO")
    model = only_cross_attention(tiny_model("sdxl", dtype=torch.float64))
    nothing = conditioning(2)
    nothing[0][0] = torch.zeros_like(nothing[0][0])
    nothing[0][1]["pooled_output"] = conditioning(1)[0][1]["pooled_output"]
    options = {"negative": nothing, "steps": 3}
    guided = sample(guide("SLG", model, scale=2.0), cfg=4.0, **options)
    assert deviation(guided, sample(model, cfg=6.0, **options)) < 1e-6
    assert "effective cfg 6 (0% of the push is beside cfg)" in caplog.text
    caplog.clear()
    sample(guide("SEG", model, blocks="d0", scale=2.0), cfg=1.0, **options)
    assert "effective cfg" not in caplog.text, "there is no cfg to compare with"


@pytest.mark.parametrize(*each(method=["SEG", "PAG", "SLG"]))
def test_the_rest_of_the_push_is_reported(method, caplog):
    caplog.set_level("INFO")
    sample(guide(method, shared_model()), cfg=4.0)
    (line,) = (m for m in caplog.messages if "effective cfg" in m)
    share = float(line.partition("(")[2].partition("%")[0])
    assert 20 < share <= 100
