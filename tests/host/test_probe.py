"""The probe: its numbers against independent ones, its cost, its bounds, what it leaves alone."""

from __future__ import annotations

import importlib
import math
import time

import pytest
import torch
from choice import each
from dit_models import latent_shape, sample_dit, tiny_dit
from family_oracle import guide
from host_models import PACK, conditioning, core_node, sample, seg, shared_model, tiny_model

SIZE = (6, 10)
HEADS = [1, 3]  # those of four that are measured


def part(name):
    return importlib.import_module(f"{PACK}.nodes.{name}")


def probed(model):
    """Return a watched clone and its probe, called as ComfyUI calls the node."""
    return part("report").SEGuidanceProbe.execute(model)[:2]


def recorded(model, **options):
    """Sample a watched model; return the record and the latents."""
    watched, probe = probed(model)
    samples = sample(watched, **options)
    record, made_it = probe.record(samples)
    assert made_it
    return record, samples


def watch_post_cfg(model, keep):
    clone = model.clone()

    def look(args):
        keep.append({k: v.clone() for k, v in args.items() if isinstance(v, torch.Tensor)})
        return args["denoised"]

    clone.set_model_sampler_post_cfg_function(look)
    return clone


def rms(tensor):
    return float(tensor.double().square().mean().sqrt())


# Numbers


@pytest.mark.parametrize("sigma", [1.3, math.inf])
def test_sizes_cosine_and_heat_equal_independent_ones(sigma):
    before, after = [], []
    model = watch_post_cfg(seg(watch_post_cfg(shared_model(), before), 2.5, sigma), after)
    record, _ = recorded(model, size=SIZE, cfg=4.0, steps=3, batch=2)
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


def attention_logits(model, sigma, **options):
    """Return the block's logits by head, without and with blur, from hooks of torch alone."""
    seen = {}
    attn = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1
    hook = attn.to_k.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], k=out))
    try:
        sample(seg(model, 3.0, sigma, blocks="m0.0", reuse=False), **options)
    finally:
        hook.remove()
    with torch.inference_mode():
        plain = attn.to_q(seen["x"][0]).double()
    key = seen["k"][0].double()
    height, width = (-(-side // 2) for side in options["size"])
    core = importlib.import_module(PACK + ".seg_core")
    kernels = [core.gaussian_matrix(n, sigma).double() for n in (height, width)]
    blur = torch.kron(*kernels)
    heads = [t.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for t in (plain, blur @ plain, key)]
    logits = [q @ heads[2].mT / math.sqrt(attn.dim_head) for q in heads[:2]]
    return logits, blur


def dense_measures(logits, matrix):
    """Return variance, mean log-sum-exp and curvature of `(heads, queries, keys)`."""
    lse = torch.logsumexp(logits, -1)
    variance = ((logits - logits.mean(1, keepdim=True)) ** 2).mean((1, 2)).mean()
    inner = 1 - logits.softmax(-1).square().sum(-1)
    curvature = (matrix.square().sum(1) * inner).mean()
    return [float(x) for x in (variance, lse.mean(), curvature)]


@pytest.mark.parametrize(
    ("sigma", "size", "queries", "off"),
    [
        (1.3, SIZE, 15, (1e-4, 1e-5, 1e-4)),  # all queries are measured
        (math.inf, SIZE, 15, (1e-4, 1e-5, 1e-4)),
        (2.0, (32, 48), 384, (0.4, 0.05, 0.1)),  # estimated from 64 queries
    ],
)
def test_block_quantities_equal_dense_ones_and_are_lowered_by_the_blur(sigma, size, queries, off):
    model, options = shared_model(), {"size": size, "steps": 1, "cfg": 1.0}
    logits, blur = attention_logits(model, sigma, **options)
    record, _ = recorded(seg(model, 3.0, sigma, blocks="m0.0"), **options)
    (block,) = record.steps[0].branches[0].blocks.values()
    assert block.queries == queries
    assert block.sampled == (2, min(queries, 64))
    for measures, dense, matrix in (
        (block.plain, logits[0], torch.eye(queries, dtype=torch.float64)),
        (block.blurred, logits[1], blur),
    ):
        ours = (measures.variance, measures.logsumexp, measures.curvature)
        theirs = dense_measures(dense[HEADS], matrix)
        for one, other, rel in zip(ours, theirs, off, strict=True):
            assert one == pytest.approx(other, rel=rel, abs=1e-8)
    assert block.blurred.variance < block.plain.variance
    assert block.blurred.logsumexp < block.plain.logsumexp
    assert block.blurred.curvature < block.plain.curvature


# What it counts


def test_passes_and_their_reasons_are_told_step_by_step():
    record, _ = recorded(seg(shared_model()), size=SIZE, steps=3)
    for step in record.steps:
        assert step.branches[0].joined + sum(step.branches[0].whole.values()) == 1
        assert step.milliseconds > 0
    record, _ = recorded(seg(shared_model(), reuse=False), size=SIZE, steps=2)
    assert [s.branches[0].whole for s in record.steps] == [{"reuse is off": 1}] * 2


def test_steps_without_guidance_are_watched_too():
    record, _ = recorded(seg(shared_model(), end=0.5), size=SIZE, steps=6)
    active = [bool(step.branches) for step in record.steps]
    assert active[0]
    assert not active[-1]
    assert record.heat.shape[0] == sum(active)
    record, samples = recorded(shared_model(), size=SIZE, steps=2)
    assert len(record.steps) == 2
    assert record.branches == ()
    assert record.heat is None
    assert torch.equal(samples, sample(shared_model(), size=SIZE, steps=2))


def test_chained_branches_of_every_side_are_told_apart():
    pag = part("pag").SEGuidancePAG
    both = seg(shared_model(), 2.0, branch="free")
    both = pag.execute(both, 1.0, 0.0, 1.0, branch="unconditional")[0]
    record, _ = recorded(both, size=SIZE, steps=1)
    labels = [b.perturbation.label for b in record.branches]
    assert labels == [part("seg").SEGuidance.LABEL, pag.LABEL]
    first, second = (record.steps[0].branches[i] for i in (0, 1))
    assert first.blocks
    assert not second.blocks
    assert first.cfg == second.cfg
    assert first.guidance > 0
    assert second.guidance > 0
    assert first.joined + sum(first.whole.values()) == 0
    assert second.joined + sum(second.whole.values()) == 1


# What it leaves alone


def test_a_probe_does_not_change_the_image():
    model = seg(shared_model(), 3.0, 1.3)
    plain = sample(model, size=SIZE, steps=2)
    _, watched = recorded(model, size=SIZE, steps=2)
    assert torch.equal(plain, watched)


def test_the_probe_may_stand_before_the_guidance_and_behind_another_one():
    watched, probe = probed(shared_model())
    guided = seg(watched)
    samples = sample(guided, size=SIZE, steps=1)
    assert probe.record(samples)[0].steps[0].branches
    again, second = probed(guided)
    samples = sample(guided, size=SIZE, steps=1)
    assert second.record(samples) == (None, False), "the model that came in is not watched by it"
    samples = sample(again, size=SIZE, steps=1)
    assert probe.record(samples)[1]
    assert second.record(samples)[1]
    assert (probe.runs, second.runs) == (3, 1)


# Several runs


def test_a_latent_is_found_among_the_last_runs_and_not_among_older_ones():
    watched, probe = probed(seg(shared_model()))
    latents = [sample(watched, size=SIZE, steps=n, seed=n) for n in (1, 2, 3)]
    for number, latent in enumerate(latents, 1):
        record, made_it = probe.record(latent)
        assert made_it
        assert record.number == len(record.steps) == number
    record, made_it = probe.record(torch.zeros(1, 4, *SIZE))
    assert not made_it
    assert record.number == 3
    for seed in (4, 5, 6):
        sample(watched, size=SIZE, steps=1, seed=seed)
    assert probe.record(latents[0])[1] is False
    assert probe.runs == 6


def test_a_run_that_fails_leaves_the_last_record():
    watched, probe = probed(seg(shared_model()))
    kept = sample(watched, size=SIZE, steps=1)
    broken = watched.clone()

    def fail(args):
        raise RuntimeError("stopped")

    broken.set_model_sampler_post_cfg_function(fail)
    with pytest.raises(RuntimeError, match="stopped"):
        sample(broken, size=SIZE, steps=1)
    assert probe.record(kept)[1]
    assert probe.runs == 1


# Cost


def test_the_probe_costs_at_most_a_twentieth_of_a_step(monkeypatch):
    """The time spent in the recorder's own functions, against that of the run they are part of."""
    recorder = importlib.import_module(PACK + ".nodes.host.probe.recorder")
    inside = []

    def timed(function):
        def run(*args, **kwargs):
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                inside.append(time.process_time() - begin)

        return run

    for owner, names in {
        recorder.Recorder: ("guided",),
        recorder.AttentionProbe: ("measure",),
    }.items():
        for name in names:
            monkeypatch.setattr(owner, name, timed(getattr(owner, name)))
    wide = tiny_model("sdxl", model_channels=128, num_head_channels=32)
    watched, _ = probed(seg(wide))
    options = {"size": (48, 48), "cfg": 4.0}
    sample(watched, steps=1, **options)
    inside.clear()
    begin = time.process_time()
    sample(watched, steps=1, **options)
    share = sum(inside) / (time.process_time() - begin)
    assert share <= 0.05, f"the probe took {share:.2%} of the run"


def test_area_conds_and_several_samplers_are_recorded():
    left = core_node("nodes", "ConditioningSetArea", conditioning(1), 32, 48, 0, 0, 1.0)
    record, _ = recorded(
        seg(shared_model()), positive=[*left, *conditioning(3)], size=SIZE, sampler="heun", steps=2
    )
    assert len(record.steps) == 3  # heun evaluates twice a step, but the last
    assert all(step.branches[0].guidance > 0 for step in record.steps)


# Diffusion transformers


def dit_attention(kind, model, shape):
    """Return queries, keys, layout and heads of each attention call of the plain model."""
    seen = []
    clone = model.clone()

    def keep(func, *args, **kwargs):
        heads = args[3] if len(args) > 3 else kwargs["heads"]
        seen.append((args[0].clone(), args[1].clone(), kwargs.get("skip_reshape", False), heads))
        return func(*args, **kwargs)

    clone.model_options["transformer_options"]["optimized_attention_override"] = keep
    sample_dit(clone, kind, shape, steps=1, cfg=1.0)
    return seen


@pytest.mark.parametrize(*each(kind=["flux", "sd3", "lumina2", "wan"], sigma=[1.3, math.inf]))
def test_transformers_are_measured_too(kind, sigma):
    shape, model = latent_shape(kind), seg(tiny_dit(kind), 1.0, sigma)
    plain = sample_dit(model, kind, shape, steps=1)
    watched, probe = probed(model)
    samples = sample_dit(watched, kind, shape, steps=1)
    torch.testing.assert_close(samples, plain, rtol=1e-5, atol=1e-5)
    record, made_it = probe.record(samples)
    assert made_it
    (branch,) = record.steps[0].branches.values()
    assert branch.guidance > 0
    assert branch.blocks
    for block in branch.blocks.values():
        assert block.queries == block.sampled[1] == 24
        assert block.blurred.variance < (1e-8 if sigma == math.inf else block.plain.variance)
        assert block.blurred.logsumexp < block.plain.logsumexp + 1e-6
        assert block.blurred.curvature < block.plain.curvature


def test_a_transformer_s_quantities_equal_dense_ones():
    kind, shape = "sd3", latent_shape("sd3")
    model = tiny_dit(kind, dtype=torch.float64)
    calls = dit_attention(kind, model, shape)
    watched, probe = probed(seg(model, 1.0, math.inf))
    record, _ = probe.record(sample_dit(watched, kind, shape, steps=1, cfg=1.0))
    block = next(iter(record.steps[0].branches[0].blocks.values()))
    found = []
    for query, key, split, heads in calls:  # whichever is the block's, wherever its image lies
        if not split:
            query, key = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
        for start in range(query.shape[2] - 24 + 1):
            rows = query[0, :, start : start + 24].double()
            logits = rows @ key[0].double().mT / math.sqrt(rows.shape[-1])
            variance = logits.var(dim=1, correction=0).mean()
            found.append((float(torch.logsumexp(logits, -1).mean()), float(variance)))
    measured = (block.plain.logsumexp, block.plain.variance)
    assert any(one == pytest.approx(measured, rel=1e-5) for one in found)


@pytest.mark.parametrize("kind", ["sdxl", "flux", "wan"])
def test_of_chosen_heads_those_alone_are_measured(kind):
    """Queries of one head differ from those of another, and so do the numbers."""
    found = {}
    for heads in ("0", "1", "0-1"):
        if kind == "sdxl":
            watched, probe = probed(seg(tiny_model(), blocks=f"m0.0:h{heads}"))
            samples = sample(watched, steps=1)
        else:
            block = "double.1" if kind == "flux" else "1"
            watched, probe = probed(seg(tiny_dit(kind), blocks=f"{block}:h{heads}"))
            samples = sample_dit(watched, kind, latent_shape(kind), steps=1)
        record, _ = probe.record(samples)
        (one,) = record.steps[0].branches[0].blocks.items()
        name, block = one
        assert name.endswith(f":h{heads}")
        assert block.blurred.variance < 1e-8
        found[heads] = block.plain.variance
    assert found["0"] != pytest.approx(found["1"], rel=1e-3)
    assert found["0-1"] == pytest.approx((found["0"] + found["1"]) / 2, rel=1e-5)


@pytest.mark.parametrize(*each(kind=["sdxl", "flux"], method=["TPG", "SLG", "PAG", "SAG"]))
def test_every_method_is_recorded(kind, method):
    model = tiny_model() if kind == "sdxl" else tiny_dit(kind)
    watched, probe = probed(guide(method, model, 2.0))
    if kind == "sdxl":
        samples = sample(watched, steps=2)
    else:
        samples = sample_dit(watched, kind, latent_shape(kind), steps=2)
    record, made_it = probe.record(samples)
    assert made_it
    for step in record.steps:
        (branch,) = step.branches.values()
        assert branch.guidance > 0
        assert (branch.joined, sum(branch.whole.values())) == (
            (0, 1) if method == "SAG" else (1, 0)
        )
