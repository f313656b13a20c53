"""The family on UNets against slow references, and all of it in one call."""

from __future__ import annotations

import functools
import importlib
import inspect
import math

import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from family_oracle import (
    guide,
    guided_by_hand,
    permutation_matrix,
    permuted,
    skipped,
    transformer_blocks,
)
from host_models import PACK, conditioning, noise_like, sample, shared_model, tiny_model
from host_oracle import blur_map, deviation, halved
from reuse_checks import part

from benchmarks import models
from benchmarks.step import on_meta

EXACT = 1e-6  # of latents; the sampler is in float32
SIZE = (8, 6)


def compare(ours, theirs, *, run=sample, **options):
    """Return how far a node is from its reference, whose guidance is to be visible."""
    plain = run(shared_model(options.pop("kind", "sdxl")), **options)
    ours, theirs = run(ours, **options), run(theirs, **options)
    assert torch.isfinite(ours).all()
    assert deviation(plain, theirs) > 1e-3, "the guidance of the reference is visible"
    return deviation(ours, theirs)


def clip(model, **options):
    return sample(model, **{"batch": 3, "scheduler": "karras", "positive": prompt(1),
                            "negative": prompt(2)} | options)  # fmt: skip


def prompt(seed):
    return [[noise_like((1, 1, 64), seed), {"pooled_output": noise_like((1, 64), seed)}]]


PLACES = {"m0": [("m", 0, 0), ("m", 0, 1)], "d0.1,u1.0": [("d", 0, 1), ("u", 1, 0)]}


@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("blocks", PLACES)
def test_blocks_that_are_passed_over(blocks, cfg):
    model = shared_model()
    modules = transformer_blocks(model, *PLACES[blocks])
    reference = guided_by_hand(model, lambda _: skipped(modules))
    assert compare(guide("SLG", model, blocks=blocks), reference, size=SIZE, cfg=cfg) < EXACT


def with_attention(model, replace, blocks, side="cond"):
    """Return a model guided away from predictions with other self-attention in some blocks."""

    def guide(args):
        options = args["model_options"].copy()
        for block in blocks:
            options = comfy.model_patcher.set_model_options_patch_replace(
                options, replace, "attn1", *block
            )
        (bad,) = comfy.samplers.calc_cond_batch(
            args["model"], [args[side]], args["input"], args["sigma"], options
        )
        return args["denoised"] + args[side + "_denoised"] - bad

    guided = model.clone()
    guided.set_model_sampler_post_cfg_function(guide)
    return guided


def attended(q, k, v, heads, change=None):
    """Return plain attention; `change(q, k, v, out)` sees heads apart and returns the output."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    logits = lambda query: (query @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v  # noqa: E731
    out = logits(q) if change is None else change(q, k, v, logits)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("reuse", [True, False])
def test_attention_that_gathers_nothing(reuse):
    model = shared_model()
    reference = with_attention(model, lambda q, *_a, **_k: torch.zeros_like(q), [("middle", 0)])
    ours = guide("SLG", model, what="attention", reuse=reuse)
    assert compare(ours, reference, size=SIZE) < EXACT


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("sigma", [math.inf, 1.3])
def test_one_head_is_smoothed(sigma, reuse):
    model = shared_model()
    blur = blur_map(*halved(SIZE, 1), sigma)

    def replace(q, k, v, extra, **_):
        def change(q, k, v, attend):
            q = q.clone()
            q[:, 1] = torch.einsum("ij,bjc->bic", blur.to(q), q[:, 1])
            return attend(q)

        return attended(q, k, v, extra["n_heads"], change)

    infinite = math.isinf(sigma)
    ours = guide("SEG", model, blocks="m0:h1", infinite_blur=infinite, reuse=reuse,
                 blur_sigma=1.0 if infinite else sigma)  # fmt: skip
    reference = with_attention(model, replace, [("middle", 0)])
    assert compare(ours, reference, size=SIZE) < EXACT


@pytest.mark.parametrize("reuse", [True, False])
def test_heads_see_themselves(reuse):
    model = shared_model()

    def replace(q, k, v, extra, **_):
        def change(q, k, v, attend):
            out = attend(q)
            out[:, 2:4] = torch.lerp(out[:, 2:4], v[:, 2:4], 0.6)
            return out

        return attended(q, k, v, extra["n_heads"], change)

    ours = guide("PAG", model, blocks="m0:h2-3", strength=0.6, reuse=reuse)
    reference = with_attention(model, replace, [("middle", 0)])
    assert compare(ours, reference, size=SIZE) < EXACT


def test_all_heads_by_name_are_all_heads():
    model = shared_model()
    for method in ("SEG", "PAG"):
        some = sample(guide(method, model, blocks="m0:h0-3"))
        assert deviation(some, sample(guide(method, model, blocks="m0"))) < EXACT


def test_heads_that_do_not_exist_are_an_error_that_says_how_many_there_are():
    with pytest.raises(ValueError, match=r"block m0.0 has 4 heads, 0 to 3, .* no head 4"):
        guide("PAG", shared_model(), blocks="m0:h2,4")


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_tokens_that_enter_in_another_order(kind):
    model = shared_model(kind)
    core = importlib.import_module(PACK + ".seg_core")
    places = {"sdxl": [("d", 0, 0), ("d", 0, 1)], "sd15": [("d", 0, 0), ("u", 3, 0)]}[kind]
    numbers = {"sdxl": [0, 1], "sd15": [0, 6]}[kind]
    blocks = {"sdxl": "d0", "sd15": "d0,u3"}[kind]
    level = 1 if kind == "sdxl" else 0
    height, width = halved(SIZE, level)

    def worse(step, shift=0):
        def matrix(number):
            tokens = height * width
            order = core.token_permutation(tokens, 3, step, number + shift)
            whole = permutation_matrix(order, list(range(tokens)), tokens)
            return lambda rows: whole if rows.shape[1] == tokens else None

        return permuted(transformer_blocks(model, *places), [matrix(n) for n in numbers])

    options = {"kind": kind, "size": SIZE, "seed": 3}
    ours = guide("TPG", model, blocks=blocks)
    assert compare(ours, guided_by_hand(model, worse), **options) < EXACT
    wrong = guided_by_hand(model, functools.partial(worse, shift=1))
    assert compare(ours, wrong, **options) > 1e-3


def test_auto_of_tokens_is_the_encoder_without_its_first_quarter():
    """On SDXL the layers of the released code: d6 to d23 of its count, d2.2-9 and d3 of ours."""
    with on_meta():
        sdxl = models.unet(models.KINDS["sdxl"], torch.device("meta"), torch.float16)
    assert where("TPG", sdxl) == "d2.2-9, d3"
    assert where("TPG", shared_model("sdxl")) == "d0"
    assert where("SLG", sdxl) == where("SEG", sdxl) == "m0"


def where(method, model):
    function = guide(method, model).model_options["sampler_post_cfg_function"][-1]
    return function.branch.perturbation.where


# Over time.


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("sigma", [math.inf, 1.3])
@pytest.mark.parametrize("axes", ["time", "space and time"])
@pytest.mark.parametrize("size", [(8, 6), (4, 4)])  # four frames of four tokens look alike
def test_svd_smooths_its_attention_over_time_at_each_place(axes, sigma, size, reuse):
    model = shared_model("svd")
    frames = 4
    calls = []

    def replace(q, k, v, extra, **_):
        calls.append(None)
        over_time = len(calls) % 2 == 0
        blur = blur_map(frames, 1, sigma) if over_time else blur_map(*halved(size, 1), sigma)
        if not over_time and axes == "time":
            blur = torch.eye(q.shape[1])

        def change(q, k, v, attend):
            return attend(torch.einsum("ij,bhjc->bhic", blur.to(q), q))

        return attended(q, k, v, extra["n_heads"], change)

    infinite = math.isinf(sigma)
    ours = guide("SEG", model, axes=axes, infinite_blur=infinite, reuse=reuse,
                 blur_sigma=1.0 if infinite else sigma)  # fmt: skip
    reference = with_attention(model, replace, [("middle", 0)])
    run = functools.partial(clip, batch=frames, size=size, cfg=2.5)
    assert compare(ours, reference, run=run, kind="svd") < EXACT


def test_a_unet_for_images_has_no_time_and_says_so():
    with pytest.raises(ValueError, match="this UNet makes single pictures"):
        guide("SEG", shared_model(), axes="space and time")


def test_unknown_axes_and_parts_are_errors():
    with pytest.raises(ValueError, match="axes must be one of space, time, space and time"):
        guide("SEG", shared_model(), axes="spacetime")
    with pytest.raises(ValueError, match="what must be one of block, attention"):
        guide("SLG", shared_model(), what="layer")


def test_a_clip_of_one_frame_says_so_once_and_costs_nothing(caplog):
    model = shared_model("svd")
    ours = clip(guide("SEG", model, axes="time"), batch=1)
    assert torch.equal(ours, clip(model, batch=1))
    assert sum("here there is one frame" in message for message in caplog.messages) == 1


# Self-Attention Guidance in windows.


def windows(model, *, fuse="pyramid", length=4, overlap=2, dim=0):
    """Return a model under the host's node that cuts a clip in windows."""
    node = importlib.import_module("comfy_extras.nodes_context_windows").ContextWindowsManualNode
    known = inspect.signature(node.execute).parameters
    extra = {"causal_window_fix": False} if "causal_window_fix" in known else {}
    return node.execute(
        model, length, overlap, "standard_static", 1, False, fuse, dim, False, **extra
    )[0]


def nearness(frames, _last):
    """The share of each frame by how near it is to the middle of its window."""
    middle, half = (frames[0] + frames[-1]) / 2, (frames[-1] - frames[0] + 1e-2) / 2
    return [max(1e-2, 1 - abs(frame - middle) / half) for frame in frames]


def ramps(frames, last):
    """Two frames of overlap, rising from nothing, but not at the ends of the clip."""
    begins = [1e-37, 1.0] if frames[0] > 0 else [1.0, 1.0]
    return begins + ([1.0, 1e-37] if frames[-1] < last else [1.0, 1.0])


SHARES = {
    "flat": lambda *_: [1.0] * 4,
    "pyramid": lambda *_: [1.0, 2.0, 2.0, 1.0],
    "relative": nearness,
    "overlap-linear": ramps,
}


@pytest.mark.parametrize("fuse", SHARES)
def test_each_windows_attention_is_weighed_as_its_prediction(fuse):
    """The same weights by hand: a map of a clip is what the host makes of the windows' maps."""
    saliency = part("sampling.saliency")
    original = saliency._gathered
    seen = []

    def spy(masses, like, options, sigma):
        found = original(masses, like, options, sigma)
        seen.append((masses, found, like))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saliency, "_gathered", spy)
        guided = windows(guide("SAG", tiny_model()), fuse=fuse)
        assert torch.isfinite(sample(guided, batch=7, steps=1, cfg=1.0)).all()
    ((masses, found, like),) = seen
    parts = list(masses.parts.values())
    assert len(parts) == 3
    total, weights = torch.zeros_like(like), torch.zeros_like(like)
    for window, layers in parts:
        (mass,) = layers.values()
        own = mass.mass.reshape(-1, 1, mass.grid.height, mass.grid.width)
        own = own.repeat_interleave(2, -1).repeat_interleave(2, -2)
        shares = SHARES[fuse](window.index_list, len(like) - 1)
        for place, (frame, share) in enumerate(zip(window.index_list, shares, strict=True)):
            total[frame] += own[place] * share
            weights[frame] += share
    assert torch.allclose(found, total / weights, atol=1e-4)


def test_a_window_as_long_as_the_clip_is_no_window():
    whole = sample(guide("SAG", tiny_model()), batch=4, size=(16, 16))
    cut = sample(windows(guide("SAG", tiny_model()), length=4), batch=4, size=(16, 16))
    assert torch.equal(whole, cut)


def test_windows_that_agree_change_nothing():
    """Where each frame's attention is its own, windows of whatever shape find the same mask."""
    found = {}
    for name, around in (("whole", lambda m: m), ("windows", windows)):
        saliency = part("sampling.saliency")
        original = saliency.attention_over_latent

        def spy(*args, name=name, original=original):
            found[name] = original(*args)
            return found[name]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saliency, "attention_over_latent", spy)
            sample(around(guide("SAG", tiny_model())), batch=7, size=(16, 16), steps=1)
    assert found["whole"].std() > 0.1
    assert torch.allclose(found["windows"], found["whole"], atol=1e-4)


def test_windows_on_svd():
    ours = clip(windows(guide("SAG", shared_model("svd"))), batch=7, size=(8, 6), cfg=2.5)
    assert torch.isfinite(ours).all()
    plain = clip(windows(shared_model("svd")), batch=7, size=(8, 6), cfg=2.5)
    assert deviation(ours, plain) > 1e-3


# One call.

FAMILY = {
    "TPG": lambda m, **o: guide("TPG", m, **o),
    "SLG": lambda m, **o: guide("SLG", m, **o),
    "SLG, one layer": lambda m, **o: guide("SLG", m, blocks="d0.1,u0.0", **o),
    "SLG, attention": lambda m, **o: guide("SLG", m, what="attention", **o),
    "SEG in heads": lambda m, **o: guide("SEG", m, blocks="m0:h1,u0", **o),
    "PAG in heads": lambda m, **o: guide("PAG", m, blocks="m0:h1-2", **o),
    "all": lambda m, **o: functools.reduce(
        lambda model, one: guide(one[0], model, blocks=one[1], **o, **one[2]),
        [
            ("SLG", "m0.0,u0.1", {}),
            ("SEG", "m0", {}),
            ("TPG", "d0.1", {}),
            ("SEG", "m0.1:h1,u0", {"branch": "unconditional"}),
            ("PAG", "m0", {}),
            ("SLG", "m0", {"what": "attention"}),
        ],
        m,
    ),
}


def outputs(model, **settings):
    """Return what the network gives in one step, call by call, and how often each layer ran."""
    found, ran = [], []
    network = model.model.diffusion_model
    layers = [m for m in network.modules() if not list(m.children())]
    handles = [m.register_forward_hook(lambda m, _args, _out: ran.append(id(m))) for m in layers]
    handles.append(network.register_forward_hook(lambda _m, _a, out: found.append(out.clone())))
    try:
        sample(model, **{"steps": 1, "size": (6, 8), **settings})
    finally:
        for handle in handles:
            handle.remove()
    return found, max(map(ran.count, map(id, layers)))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("kind", "cfg", "batch"), [("sdxl", 7.0, 1), ("sdxl", 1.0, 2)])
def test_one_call_gives_what_whole_passes_give(name, kind, cfg, batch):
    model = shared_model(kind)
    if cfg == 1.0 and name == "all":
        pytest.skip("needs an unconditional prediction")
    options = {"cfg": cfg, "batch": batch, "positive": conditioning(1), "negative": conditioning(2)}
    (on, once), (off, often) = (
        outputs(FAMILY[name](model, reuse=reuse), **options) for reuse in (True, False)
    )
    assert once == 1
    assert often > 1
    assert len(on) == len(off) > 1
    for one, whole in zip(on, off, strict=True):
        assert float((one - whole).abs().max() / whole.std()) <= 1e-12


@pytest.mark.parametrize("axes", ["time", "space and time"])
def test_one_call_over_time(axes):
    model = shared_model("svd")
    (on, once), (off, _) = (
        outputs(guide("SEG", model, axes=axes, reuse=reuse), batch=3, scheduler="karras",
                positive=prompt(1), negative=prompt(2), cfg=2.5)
        for reuse in (True, False)
    )  # fmt: skip
    assert once == 1
    for one, whole in zip(on, off, strict=True):
        assert float((one - whole).abs().max() / whole.std()) <= 1e-12
