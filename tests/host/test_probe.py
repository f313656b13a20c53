"""The probe: its numbers against independent ones, its cost, its bounds, what it leaves alone."""

from __future__ import annotations

import importlib
import math
import time

import pytest
import torch
from dit_models import available, latent_shape, sample_dit, tiny_dit
from family_oracle import guide
from host_models import PACK, conditioning, core_node, sample, seg, shared_model, tiny_model

SIZE = (6, 10)


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
def test_sizes_and_cosine_equal_independent_ones(sigma):
    before, after = [], []
    model = watch_post_cfg(seg(watch_post_cfg(shared_model(), before), 2.5, sigma), after)
    record, _ = recorded(model, size=SIZE, cfg=4.0, steps=3)
    assert len(record.steps) == 3
    for step, plain, guided in zip(record.steps, before, after, strict=True):
        change = (guided["denoised"] - plain["denoised"]).double()
        cfg = (plain["denoised"] - plain["cond_denoised"]).double()
        branch = step.branches[0]
        assert branch.guidance == pytest.approx(rms(change), rel=1e-5)
        assert branch.cfg == pytest.approx(rms(cfg), rel=1e-5)
        assert branch.prediction == pytest.approx(rms(plain["cond_denoised"]), rel=1e-5)
        cosine = (change * cfg).sum() / (change.norm() * cfg.norm())
        assert branch.cosine == pytest.approx(float(cosine), rel=1e-4, abs=1e-6)
        assert step.noise_sigma == pytest.approx(float(plain["sigma"].flatten()[0]), rel=1e-6)


def test_heat_is_where_the_prediction_changed():
    before, after = [], []
    model = watch_post_cfg(seg(watch_post_cfg(shared_model(), before)), after)
    record, _ = recorded(model, size=SIZE, batch=2, steps=2)
    for heat, plain, guided in zip(record.heat, before, after, strict=True):
        change = guided["denoised"] - plain["denoised"]
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
    height, width = (-(-side // 2) for side in SIZE)
    core = importlib.import_module(PACK + ".seg_core")
    kernels = [core.gaussian_matrix(n, sigma).double() for n in (height, width)]
    blur = torch.kron(*kernels)
    heads = [t.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for t in (plain, blur @ plain, key)]
    logits = [q @ heads[2].mT / math.sqrt(attn.dim_head) for q in heads[:2]]
    return logits, blur


@pytest.mark.parametrize("sigma", [1.3, math.inf])
def test_block_quantities_equal_dense_ones(sigma):
    """All 15 queries of both sampled heads are measured here, so nothing is estimated."""
    model = shared_model()
    options = {"size": SIZE, "steps": 1, "cfg": 1.0}
    logits, blur = attention_logits(model, sigma, **options)
    record, _ = recorded(seg(model, 3.0, sigma, blocks="m0.0"), **options)
    (block,) = record.steps[0].branches[0].blocks.values()
    assert block.queries == 15
    assert block.sampled == (2, 15)
    heads = importlib.import_module(PACK + ".nodes.host.probe.look")._spread(logits[0].shape[0])
    for measures, dense, matrix in (
        (block.plain, logits[0][heads], torch.eye(15, dtype=torch.float64)),
        (block.blurred, logits[1][heads], blur),
    ):
        lse = torch.logsumexp(dense, -1)
        variance = ((dense - dense.mean(1, keepdim=True)) ** 2).mean((1, 2)).mean()
        inner = 1 - dense.softmax(-1).square().sum(-1)
        curvature = (matrix.square().sum(1) * inner).mean()
        assert measures.variance == pytest.approx(float(variance), rel=1e-4, abs=1e-8)
        assert measures.logsumexp == pytest.approx(float(lse.mean()), rel=1e-5)
        assert measures.curvature == pytest.approx(float(curvature), rel=1e-4)
        assert block.energy(measures) == pytest.approx(float(-lse.sum(-1).mean()), rel=1e-5)


def test_blur_lowers_variance_lse_and_curvature_as_the_paper_proves():
    record, _ = recorded(seg(shared_model(), 3.0, 2.0), size=SIZE, steps=2)
    blocks = [b for step in record.steps for b in step.branches[0].blocks.values()]
    assert len(blocks) == 4  # two transformers of the middle block, two steps
    for block in blocks:
        assert block.blurred.variance < block.plain.variance
        assert block.blurred.logsumexp < block.plain.logsumexp
        assert block.blurred.curvature < block.plain.curvature


# What it counts


def test_passes_and_their_reasons_are_told_step_by_step():
    record, _ = recorded(seg(shared_model()), size=SIZE, steps=3)
    for step in record.steps:
        assert step.branches[0].shared + sum(step.branches[0].full.values()) == 1
        assert step.branches[0].conds == 2
        assert 0 < step.branches[0].milliseconds < step.milliseconds
    record, _ = recorded(seg(shared_model(), reuse=False), size=SIZE, steps=2)
    assert [s.branches[0].full for s in record.steps] == [{"reuse is off": 1}] * 2


def test_steps_outside_the_window_are_recorded_as_not_active():
    record, _ = recorded(seg(shared_model(), end=0.5), size=SIZE, steps=6)
    active = [bool(step.branches) for step in record.steps]
    assert active[0]
    assert not active[-1]
    assert record.heat.shape[0] == sum(active)


def test_a_model_without_guidance_is_watched_too():
    record, samples = recorded(shared_model(), size=SIZE, steps=2)
    assert len(record.steps) == 2
    assert record.branches == ()
    assert record.heat is None
    assert torch.equal(samples, sample(shared_model(), size=SIZE, steps=2))


@pytest.mark.parametrize("branch", ["unconditional", "free"])
def test_other_branches_are_recorded(branch):
    record, _ = recorded(seg(shared_model(), branch=branch), size=SIZE, steps=1)
    (step,) = record.steps
    assert step.branches[0].guidance > 0
    assert step.branches[0].blocks
    assert bool(step.branches[0].shared + sum(step.branches[0].full.values())) == (branch != "free")


def test_chained_branches_are_told_apart():
    pag = part("pag").SEGuidancePAG
    both = pag.execute(seg(shared_model(), 2.0), 1.0, 0.0, 1.0)[0]
    record, _ = recorded(both, size=SIZE, steps=1)
    assert [b.perturbation.label for b in record.branches] == [part("seg").LABEL, part("pag").LABEL]
    first, second = (record.steps[0].branches[i] for i in (0, 1))
    assert first.blocks
    assert not second.blocks
    assert first.cfg == second.cfg


# What it leaves alone


@pytest.mark.parametrize("sigma", [1.3, math.inf])
def test_a_probe_does_not_change_the_image(sigma):
    model = seg(shared_model(), 3.0, sigma)
    plain = sample(model, size=SIZE, steps=2)
    record, watched = recorded(model, size=SIZE, steps=2)
    assert torch.equal(plain, watched)
    assert record.steps[0].branches[0].shared or record.steps[0].branches[0].full


def test_without_a_probe_nothing_is_recorded(monkeypatch):
    recorder = importlib.import_module(PACK + ".nodes.host.probe.recorder").Recorder

    def refuse(*_):
        raise AssertionError("a recorder was made")

    monkeypatch.setattr(recorder, "__init__", refuse)
    sample(seg(shared_model()), size=SIZE, steps=1)
    with pytest.raises(AssertionError):
        sample(probed(seg(shared_model()))[0], size=SIZE, steps=1)


def test_the_probe_may_stand_before_the_guidance_and_on_either_side_of_others():
    watched, probe = probed(shared_model())
    samples = sample(seg(watched), size=SIZE, steps=1)
    assert probe.record(samples)[0].steps[0].branches
    again, second = probed(seg(watched))
    samples = sample(again, size=SIZE, steps=1)
    assert probe.record(samples)[1]
    assert second.record(samples)[1]
    assert (probe.runs, second.runs) == (2, 1)


def test_the_model_that_comes_in_is_not_watched():
    model = seg(shared_model())
    _, probe = probed(model)
    sample(model, size=SIZE, steps=1)
    assert probe.runs == 0
    assert probe.record() == (None, False)


# Several runs


def test_the_record_of_a_latent_is_found_among_several_runs():
    watched, probe = probed(seg(shared_model()))
    latents = [sample(watched, size=SIZE, steps=n, seed=n) for n in (1, 2, 3)]
    for number, latent in enumerate(latents, 1):
        record, made_it = probe.record(latent)
        assert made_it
        assert record.number == number
        assert len(record.steps) == number
    record, made_it = probe.record(torch.zeros(1, 4, *SIZE))
    assert not made_it
    assert record.number == 3


def test_only_the_last_runs_are_kept():
    watched, probe = probed(seg(shared_model()))
    first = sample(watched, size=SIZE, steps=1, seed=0)
    for seed in range(1, 6):
        sample(watched, size=SIZE, steps=1, seed=seed)
    assert probe.record(first)[1] is False
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


def test_nothing_stays_on_the_device():
    watched, probe = probed(seg(shared_model()))
    record, _ = probe.record(sample(watched, size=SIZE, steps=2))
    assert record.heat.device.type == "cpu"
    held = [v for step in record.steps for b in step.branches.values() for v in vars(b).values()]
    assert not any(isinstance(value, torch.Tensor) for value in held)


# Bounds and cost


@pytest.mark.parametrize("keys", [15, 4096, 65536, 200_000])
def test_no_map_is_larger_than_4096_squared(keys):
    module = importlib.import_module(PACK + ".nodes.host.probe.look")
    picked = module.Picks().picked(20, keys, keys, torch.device("cpu"))
    assert 2 * module.HEADS * len(picked) * keys <= 2 * 4096**2
    assert module.HEADS * len(picked) * keys <= 4096**2
    assert 1 <= len(picked) <= 64
    assert picked.unique().numel() == len(picked)
    assert int(picked.max()) < keys


def test_sampled_queries_lie_on_many_rows_and_columns():
    module = importlib.import_module(PACK + ".nodes.host.probe.look")
    picked = module.Picks().picked(20, 1024, 1024, torch.device("cpu"))
    assert len((picked // 32).unique()) >= 28
    assert len((picked % 32).unique()) >= 16


def test_estimates_from_a_sample_are_close_to_the_whole(monkeypatch):
    """A grid of 16x24: 64 of its 384 queries against all of them."""
    module = importlib.import_module(PACK + ".nodes.host.probe.look")
    model, options = seg(shared_model(), 3.0, 2.0), {"size": (32, 48), "steps": 1}
    few = recorded(model, **options)[0].steps[0].branches[0].blocks
    monkeypatch.setattr(module, "QUERIES", 10**6)
    all_of_them = recorded(model, **options)[0].steps[0].branches[0].blocks
    for name, block in few.items():
        assert block.sampled == (2, 64)
        assert all_of_them[name].sampled == (2, 384)
        for which in ("plain", "blurred"):
            a, b = getattr(block, which), getattr(all_of_them[name], which)
            assert a.logsumexp == pytest.approx(b.logsumexp, rel=0.05)
            assert a.variance == pytest.approx(b.variance, rel=0.4)
            assert a.curvature == pytest.approx(b.curvature, rel=0.1)


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
        recorder.Recorder: ("begin", "guided"),
        recorder.Look: ("at_tokens",),
    }.items():
        for name in names:
            monkeypatch.setattr(owner, name, timed(getattr(owner, name)))
    wide = tiny_model("sdxl", model_channels=128, num_head_channels=32)
    watched, _ = probed(seg(wide))
    options = {"size": (48, 48), "cfg": 4.0}
    sample(watched, steps=1, **options)
    inside.clear()
    begin = time.process_time()
    sample(watched, steps=2, **options)
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


@pytest.mark.parametrize("kind", ["flux", "sd3", "lumina2", "wan"])
@pytest.mark.parametrize("sigma", [1.3, math.inf])
def test_transformers_are_measured_too(kind, sigma):
    if not available(kind):
        pytest.skip(f"this ComfyUI has no {kind}")
    shape = latent_shape(kind)
    model = seg(tiny_dit(kind), 1.0, sigma)
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
        assert block.queries == 24
        assert block.sampled[1] == 24
        assert block.blurred.variance < block.plain.variance
        assert block.blurred.logsumexp < block.plain.logsumexp + 1e-6
        assert block.blurred.curvature < block.plain.curvature
        if sigma == math.inf:
            assert block.blurred.variance < 1e-8


def test_a_transformer_s_quantities_equal_dense_ones():
    kind, shape = "sd3", latent_shape("sd3")
    model = tiny_dit(kind, dtype=torch.float64)
    calls = dit_attention(kind, model, shape)
    watched, probe = probed(seg(model, 1.0, math.inf))
    record, _ = probe.record(sample_dit(watched, kind, shape, steps=1, cfg=1.0))
    network = importlib.import_module(PACK + ".nodes.host").network_of(model, "SEG")
    first = network.targets("auto")[0]
    block = record.steps[0].branches[0].blocks[network.describe([first])]
    chosen = importlib.import_module(PACK + ".nodes.host.probe.look")._spread
    found = []
    for query, key, split, heads in calls:  # whichever is the block's, wherever its image lies
        if not split:
            query, key = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
        for start in range(query.shape[2] - 24 + 1):
            rows = query[0, chosen(heads), start : start + 24].double()
            logits = rows @ key[0, chosen(heads)].double().mT / math.sqrt(rows.shape[-1])
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


@pytest.mark.parametrize("method", ["TPG", "SLG", "PAG", "SAG"])
@pytest.mark.parametrize("kind", ["sdxl", "flux"])
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
        assert (branch.shared, sum(branch.full.values())) == ((0, 1) if method == "SAG" else (1, 0))
