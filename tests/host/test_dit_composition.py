"""Guidance of diffusion transformers beside the other nodes of a graph."""

from __future__ import annotations

import importlib
import math
from unittest import mock

import pytest
import torch
from comfy.ldm.modules.attention import attention_basic
from dit_models import available, sample_dit, tiny_dit
from dit_oracle import OVERRIDE, shape_of
from host_models import noise_like, seg
from host_oracle import deviation
from reuse_checks import ROUNDING, core_node, part, reported

CORE = [k for k in ("flux", "sd3", "qwen", "lumina2", "wan", "ltxv") if available(k)]


def latents(model, kind="flux", **options):
    return sample_dit(model, kind, options.pop("shape", None) or shape_of(kind, (3, 4)), **options)


@pytest.mark.parametrize("kind", CORE)
@pytest.mark.parametrize("off", [{"sigma": 0.0}, {"scale": 0.0}])
def test_no_blur_and_no_scale_are_bitwise_off(kind, off):
    assert torch.equal(latents(seg(tiny_dit(kind), **off), kind), latents(tiny_dit(kind), kind))


@pytest.mark.parametrize("kind", CORE)
def test_a_wide_blur_grows_into_the_infinite_one(kind):
    wide = latents(seg(tiny_dit(kind), sigma=500.0, kernel="full"), kind)
    infinite = latents(seg(tiny_dit(kind)), kind)
    assert deviation(wide, infinite) < 1e-3


@pytest.mark.parametrize("kind", CORE)
def test_images_of_a_batch_do_not_see_each_other(kind):
    shape = shape_of(kind, (3, 4), batch=2)
    noise = noise_like(shape, 5)
    both = latents(seg(tiny_dit(kind)), kind, shape=shape, noise=noise)
    alone = latents(seg(tiny_dit(kind)), kind, noise=noise[1:])
    assert deviation(both[1:], alone) <= ROUNDING


@pytest.mark.parametrize("kind", CORE)
def test_an_override_of_another_node_runs_inside_ours(kind):
    plain = latents(seg(tiny_dit(kind)), kind)
    lengths = []

    def override(func, *args, **kwargs):
        lengths.append(args[0].shape[2 if kwargs.get("skip_reshape") else 1])
        return func(*args, **kwargs)

    model = tiny_dit(kind)
    model.model_options["transformer_options"][OVERRIDE] = override
    chained = latents(seg(model), kind)
    assert deviation(chained, plain) <= ROUNDING
    assert min(lengths) >= 7, "no query stands for others"
    assert model.model_options["transformer_options"][OVERRIDE] is override


@pytest.mark.parametrize("kind", CORE)
@pytest.mark.parametrize("reuse", [True, False])
def test_infinite_blur_attends_with_one_query_for_each_frame(kind, reuse):
    attention = part("networks.dit.attention")
    with mock.patch.object(attention, "one_query", wraps=attention.one_query) as short:
        fast = latents(seg(tiny_dit(kind), reuse=reuse), kind)
    assert short.call_count > 0
    with mock.patch.object(attention, "_is_one_query", return_value=False):
        slow = latents(seg(tiny_dit(kind), reuse=reuse), kind)
    assert deviation(fast, slow) <= ROUNDING


@pytest.mark.parametrize("skip_reshape", [True, False])
@pytest.mark.parametrize("per_query", [True, False])
def test_a_mask_for_each_query_is_honoured(per_query, skip_reshape):
    core = importlib.import_module("seg_pack_under_test.seg_core")
    grid = core.TokenGrid(1, 2, 3)
    q, k, v = (noise_like((3, 3, 9, 4), n) for n in range(3))
    mask = noise_like((3, 1, 9 if per_query else 1, 9), 4)
    smooth = importlib.import_module("seg_pack_under_test.nodes.seg").QueryBlur(math.inf, "full")
    change = part("settings.changes").SmoothQueries(smooth)
    perturbation = mock.Mock(change=change, smooth=smooth, heads=lambda _target: None)
    # The first row is a plain one.
    site = part("calls.site").Site(perturbation, (slice(1, 3),), core.BlurMatrices())
    inputs = (q, k, v) if skip_reshape else tuple(t.transpose(1, 2).flatten(2) for t in (q, k, v))
    seen = []

    def attend(*args, **kwargs):
        seen.append(tuple(args[0].shape[n] for n in (0, 2 if skip_reshape else 1)))
        return attention_basic.__wrapped__(*args, **kwargs)

    call = part("networks.dit.host_attention").Attention(
        attend, (*inputs, 3, mask), {"skip_reshape": skip_reshape}, False
    )
    parts = part("calls.site").parts_of([site], 3, 3)
    span = part("networks.span").Span(2, grid, 3)
    out = part("networks.dit.attention").changed(call, span, parts, None)
    blurred = q.clone()
    blurred[1:, :, 2:8] = q[1:, :, 2:8].mean(2, keepdim=True)
    logits = blurred @ k.mT / 2.0 + mask
    expected = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(out, expected, atol=1e-6)
    assert sorted(seen) == ([(3, 9)] if per_query else [(1, 9), (2, 4)])


def test_a_replacement_of_another_node_runs_inside_ours():
    plain = latents(seg(tiny_dit("flux"), blocks="double.1"))
    model = tiny_dit("flux").clone()
    seen = []

    def replacement(args, extra):
        seen.append(args["img"].shape)
        return extra["original_block"](args)

    for block in (("double_block", 0), ("double_block", 1), ("single_block", 0)):
        model.set_model_patch_replace(replacement, "dit", *block)
    assert torch.equal(latents(seg(model, blocks="double.1")), plain)
    assert seen


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_easy_cache_does_not_answer_for_the_perturbed_pass(kind):
    def cached(model):
        return core_node(
            "nodes_easycache", "EasyCacheNode", model,
            reuse_threshold=10.0, start_percent=0.0, end_percent=1.0, verbose=False,
        )  # fmt: skip

    options = {"steps": 5}
    plain = latents(cached(tiny_dit(kind)), kind, **options)
    with reported() as reports:
        guided = latents(cached(seg(tiny_dit(kind))), kind, **options)
    ((report, (branch,)),) = reports
    assert report.guided[branch] == 5
    assert report.calls[branch] > 0
    assert torch.isfinite(guided).all()
    assert deviation(guided, plain) > 1e-2


def test_the_perturbed_pass_of_a_compiled_model_is_not_compiled():
    compile_model = importlib.import_module("comfy_api.torch_helpers").set_torch_compile_wrapper
    plain = latents(seg(tiny_dit("flux")))
    model = seg(tiny_dit("flux"))
    compile_model(model, backend="eager")
    with reported() as reports:
        compiled = latents(model)
    ((report, (branch,)),) = reports
    assert {reason for _, reason in report.full} == {"the model is compiled"}
    assert {report.hits[branch, t] for t in branch.perturbation.targets} == {2}
    assert deviation(compiled, plain) < 1e-4


@pytest.mark.parametrize(
    ("kind", "node", "widgets"),
    [
        ("sd3", "ModelSamplingSD3", {"shift": 7.0}),
        ("flux", "ModelSamplingFlux",
         {"max_shift": 1.15, "base_shift": 0.5, "width": 512, "height": 512}),
        ("aura", "ModelSamplingAuraFlow", {"shift": 5.0}),
    ],
)  # fmt: skip
def test_flow_shift_nodes_before_and_after(kind, node, widgets):
    module = importlib.import_module("comfy_extras.nodes_model_advanced")
    shift = getattr(module, node)

    def shifted(model):
        name = getattr(shift, "FUNCTION", "execute")
        return getattr(shift(), name)(model, **widgets)[0]

    before = latents(seg(shifted(tiny_dit(kind))), kind)
    after = latents(shifted(seg(tiny_dit(kind))), kind)
    assert torch.equal(before, after)
    assert deviation(before, latents(seg(tiny_dit(kind)), kind)) > 1e-3


@pytest.mark.parametrize("kind", ["flux", "flux2", "qwen"])
def test_a_distilled_model_without_cfg_is_guided(kind):
    guided = latents(seg(tiny_dit(kind)), kind, cfg=1.0)
    assert deviation(guided, latents(tiny_dit(kind), kind, cfg=1.0)) > 1e-2


def test_context_windows_of_a_video():
    windows = importlib.import_module("comfy_extras.nodes_context_windows")
    shape = shape_of("wan", (2, 3), frames=7)
    results = {}
    for reuse in (True, False):
        model = windows.WanContextWindowsManualNode.execute(
            tiny_dit("wan"), 13, 4, "standard_static", 1, False, "pyramid", True, False
        )[0]
        results[reuse] = latents(seg(model, reuse=reuse), "wan", shape=shape)
    assert torch.isfinite(results[True]).all()
    assert deviation(results[True], results[False]) <= ROUNDING


def test_guide_frames_of_ltx_video_keep_their_queries():
    shape = (1, 128, 3, 3, 4)
    seen = []

    def spy(func, *args, **kwargs):
        seen.append(args[0].clone())
        return func(*args, **kwargs)

    model = tiny_dit("ltxv")
    model.model_options["transformer_options"][OVERRIDE] = spy
    guides = {
        "keyframe_idxs": torch.zeros(1, 3, 12, 2),
        "concat_mask": torch.ones(1, 1, 3, 3, 4),
    }
    guided = seg(model, blocks="1", reuse=False)
    latents(guided, "ltxv", shape=shape, steps=1, cfg=1.0, cond=guides)
    plain, smoothed = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    changed = (plain[2] - smoothed[2]).abs().amax(-1)[0]
    assert (changed[:24] > 0).all()
    assert (changed[24:] == 0).all()
