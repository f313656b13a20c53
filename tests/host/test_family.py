"""The family on diffusion transformers against slow references, and all of it in one call."""

from __future__ import annotations

import functools
import importlib
import math

import pytest
import torch
from dit_models import TINY, available, sample_dit, tiny_dit
from dit_oracle import (
    DenseGuidance,
    block_modules,
    blur_of,
    entered,
    float64_rotary,
    found_rows,
    grid_size,
    selector,
    shape_of,
)
from family_oracle import guide, guided_by_hand, permutation_matrix, permuted, skipped
from host_models import PACK
from host_oracle import blur_map, deviation
from reuse_checks import part, reported

KINDS = [kind for kind in TINY if available(kind) and kind != "anima"]  # slow; as cosmos2
CORE = [kind for kind in KINDS if kind in ("flux", "sd3", "qwen", "lumina2", "wan")]
VIDEO = [
    kind
    for kind in KINDS
    if TINY[kind].frames and kind not in ("qwen", "krea2", "joyimage", "anima")
]
ONLY_FLOAT32 = {"cosmos1"}
SCALE = 1.0


@pytest.fixture(autouse=True)
def _float64():
    with float64_rotary():
        yield


def model_of(kind):
    return tiny_dit(kind, dtype=torch.float32 if kind in ONLY_FLOAT32 else torch.float64)


def bound(kind):
    """Return the largest deviation of latents that rounding explains."""
    return 1e-4 if kind in ONLY_FLOAT32 else 1e-6


@functools.cache
def rows_of(kind):
    """Return the image's rows in the first block's queries, and how many queries there are."""
    return found_rows(tiny_dit(kind), kind, shape_of(kind, (3, 4)))


def sampled(model, kind, *, cfg=1.0, steps=None, **options):
    steps = (1 if kind.startswith("wan") else 2) if steps is None else steps
    return sample_dit(model, kind, shape_of(kind, (3, 4)), cfg=cfg, steps=steps, **options)


def dense(model, kind, blocks, **changes):
    rows, length = rows_of(kind)
    return DenseGuidance(model, kind, rows, length, blocks=blocks, scale=SCALE, **changes).guided()


def compare(kind, ours, theirs, **options):
    """Return how far a node is from its reference, whose guidance is to be visible."""
    plain = sampled(model_of(kind), kind, **options)
    ours, theirs = (sampled(model, kind, **options) for model in (ours, theirs))
    assert torch.isfinite(ours).all()
    assert deviation(plain, theirs) > 1e-2, "the guidance of the reference is visible"
    return deviation(ours, theirs)


# Blocks that are passed over.


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_passed_over(kind):
    model = model_of(kind)
    modules = [block_modules(model, kind)[n] for n in (1, 2)]
    reference = guided_by_hand(model, lambda _: skipped(modules), SCALE)
    found = compare(kind, guide("SLG", model, blocks=selector(model, kind, [1, 2])), reference)
    assert found < bound(kind)


def test_the_comparison_notices_another_block():
    model = model_of("flux")
    modules = [block_modules(model, "flux")[n] for n in (1, 3)]
    reference = guided_by_hand(model, lambda _: skipped(modules), SCALE)
    assert compare("flux", guide("SLG", model, blocks="double.1,single.0"), reference) > 1e-4


@pytest.mark.parametrize(
    "kind",
    [k for k in KINDS if k in ("sd3", "flux", "chroma", "qwen", "hunyuan_video", "aura", "wan")],
)
def test_cores_node_gives_the_same_at_its_settings(kind):
    core = importlib.import_module("comfy_extras.nodes_slg").SkipLayerGuidanceDiT
    model = model_of(kind)
    numbers = [1, 2] if kind != "aura" else [0, 1]
    lists = {"double_layers": [], "single_layers": []}
    for name in selector(model, kind, numbers).split(","):
        *named, number = name.split(".")
        lists[f"{named[0] if named else 'double'}_layers"].append(number)
    theirs = core.execute(
        model,
        scale=SCALE,
        start_percent=0.0,
        end_percent=1.0,
        **{name: ", ".join(numbers) for name, numbers in lists.items()},
    )[0]
    ours = guide("SLG", model, SCALE, blocks=selector(model, kind, numbers))
    assert compare(kind, ours, theirs, cfg=1.5) < bound(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_that_gathers_nothing(kind):
    model = model_of(kind)
    reference = dense(model, kind, [1, 2], blur=None, zero=True)
    ours = guide("SLG", model, blocks=selector(model, kind, [1, 2]), what="attention")
    assert compare(kind, ours, reference) < bound(kind)


# Tokens in another order.


def orders(model, kind, numbers, *, seed=0, wrong=False):
    """Return a context for each step: permutation matrices before some blocks."""
    core = importlib.import_module(PACK + ".seg_core")
    rows, length = rows_of(kind)
    cells = math.prod(grid_size(kind, shape_of(kind, (3, 4)))[1:])
    modules = [block_modules(model, kind)[n] for n in numbers]

    def matrix(number, step):
        order = core.token_permutation(cells, seed, step, number + wrong)

        def whole(tokens):
            if tokens.shape[1] == length:
                return permutation_matrix(order, rows, length)
            if tokens.shape[1] == len(rows):
                return permutation_matrix(order, list(range(len(rows))), len(rows))
            return None

        return whole

    return lambda step: permuted(modules, [matrix(number, step) for number in numbers])


ROWS_ELSEWHERE = {
    "cosmos1": "the rows of the batch are its fourth axis",
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ROWS_ELSEWHERE])
def test_tokens_that_enter_in_another_order(kind):
    model = model_of(kind)
    last = len(block_modules(model, kind)) - 1
    numbers = [0, 1] if kind == "pixeldit" else [1, last]
    reference = guided_by_hand(model, orders(model, kind, numbers), SCALE)
    ours = guide("TPG", model, blocks=selector(model, kind, numbers))
    assert compare(kind, ours, reference) < bound(kind)
    wrong = guided_by_hand(model, orders(model, kind, numbers, wrong=True), SCALE)
    assert compare(kind, ours, wrong) > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in ROWS_ELSEWHERE if kind in KINDS])
def test_tokens_of_a_network_whose_rows_are_not_its_first_axis(kind):
    model = model_of(kind)
    core = importlib.import_module(PACK + ".seg_core")

    def before(step):
        def hook(_module, args, kwargs):
            order = core.token_permutation(12, 0, step, 1)
            shuffled = args[0].flatten(1, 2)[:, order].reshape(args[0].shape)
            return (shuffled, *args[1:]), kwargs

        return block_modules(model, kind)[1].register_forward_pre_hook(hook, with_kwargs=True)

    reference = guided_by_hand(model, before, SCALE)
    assert compare(kind, guide("TPG", model, blocks="1"), reference) < bound(kind)


def test_the_order_is_the_seeds_and_the_same_in_each_run():
    model = guide("TPG", model_of("flux"))
    first, again, other = (
        sampled(model, "flux", seed=seed, noise=torch.ones(shape_of("flux", (3, 4))))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert deviation(first, other) > 1e-3


@pytest.mark.skipif("pixeldit" not in KINDS, reason="this ComfyUI has no such network")
def test_blocks_that_the_image_does_not_enter_are_refused():
    with pytest.raises(ValueError, match=r"do not enter block pixel\.0"):
        guide("TPG", model_of("pixeldit"), blocks="pixel.0")


# Heads.


@pytest.mark.parametrize("kind", KINDS)
def test_one_head_is_smoothed(kind):
    model = model_of(kind)
    if kind == "sd3":
        pytest.skip("the tiny network has one head")
    blur = blur_of(grid_size(kind, shape_of(kind, (3, 4))), math.inf)
    reference = dense(model, kind, [1, 2], blur=blur, heads=[1])
    blocks = ",".join(f"{name}:h1" for name in selector(model, kind, [1, 2]).split(","))
    assert compare(kind, guide("SEG", model, blocks=blocks), reference) < bound(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_one_head_sees_itself(kind):
    model = model_of(kind)
    if kind == "sd3":
        pytest.skip("the tiny network has one head")
    reference = dense(model, kind, [1, 2], blur=None, heads=[0])
    blocks = ",".join(f"{name}:h0" for name in selector(model, kind, [1, 2]).split(","))
    assert compare(kind, guide("PAG", model, blocks=blocks), reference) < bound(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_do_not_exist_are_an_error_that_says_how_many_there_are(kind):
    model = model_of(kind)
    count = 1 if kind == "sd3" else 2
    name = selector(model, kind, [1])
    with pytest.raises(ValueError, match=rf"block {name} has {count} heads.*no head {count}"):
        guide("SEG", model, blocks=f"{name}:h{count}")


@pytest.mark.parametrize("method", ["SAG", "TPG", "SLG"])
def test_methods_without_heads_refuse_them(method):
    with pytest.raises(ValueError, match="heads cannot be chosen here"):
        guide(method, model_of("flux"), blocks="double.1:h0")


# Over time.


def over_time(kind, sigma, axes):
    """Return the dense blur of all tokens of a clip."""
    frames, height, width = grid_size(kind, shape_of(kind, (3, 4)))
    space = blur_map(height, width, sigma) if "space" in axes else torch.eye(height * width)
    return torch.kron(blur_map(frames, 1, sigma), space.double())


@pytest.mark.parametrize("sigma", [math.inf, 1.3])
@pytest.mark.parametrize("axes", ["time", "space and time"])
@pytest.mark.parametrize("kind", VIDEO)
def test_queries_are_smoothed_over_frames(kind, axes, sigma):
    model = model_of(kind)
    reference = dense(model, kind, [1, 2], blur=over_time(kind, sigma, axes))
    infinite = math.isinf(sigma)
    ours = guide(
        "SEG", model, blocks=selector(model, kind, [1, 2]), axes=axes, infinite_blur=infinite,
        blur_sigma=sigma if not infinite else 1.0,
    )  # fmt: skip
    assert compare(kind, ours, reference) < bound(kind)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in VIDEO])
def test_image_models_have_no_time_and_say_so(kind):
    with pytest.raises(ValueError, match=r"smooths over the frames of a video, and .* single pic"):
        guide("SEG", model_of(kind), axes="time")


def test_a_video_of_one_frame_says_so_once_and_costs_nothing(caplog):
    model = model_of("wan")
    shape = (1, 16, 1, 6, 8)
    with entered(model, "wan") as state:
        plain = sample_dit(model, "wan", shape, steps=2)
        runs = len(state["runs"])
        guided = sample_dit(guide("SEG", model, axes="time"), "wan", shape, steps=2)
        assert len(state["runs"]) == 2 * runs
    assert torch.equal(plain, guided)
    assert sum("here there is one frame" in message for message in caplog.messages) == 1
    assert not any("had no effect" in message for message in caplog.messages)


# Self-Attention Guidance.


def masses(kind, blocks):
    """Return the attention that SAG saw, and what a whole map of the joint logits gives."""
    model = model_of(kind)
    rows, length = rows_of(kind)
    seen, whole = [], []
    saliency = part("sampling.saliency")
    original = saliency._spread

    def spy(layers, shape):
        seen.extend(layers.values())
        return original(layers, shape)

    def attention(func, query, key, value, heads=None, *args, **kwargs):
        state["call"] += 1
        mask = kwargs.get("mask", args[0] if args else None)
        if state["block"] in blocks and state["call"] == 0:
            q, k = query, key
            if not kwargs.get("skip_reshape"):
                q, k = (
                    t.flatten(2)
                    .unflatten(2, (-1, query.flatten(2).shape[2] // heads))
                    .transpose(1, 2)
                    for t in (q, k)
                )
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            logits = q @ k.mT / math.sqrt(q.shape[-1])
            if mask is not None:
                mask = mask.reshape(-1, *[1] * (4 - mask.ndim), *mask.shape[1:])
                logits = (
                    logits.masked_fill(~mask, -math.inf)
                    if mask.dtype == torch.bool
                    else logits + mask
                )
            drawn = logits.softmax(-1)[:, :, rows][..., rows].sum(2).mean(1)
            frames = drawn.unflatten(1, (grid_size(kind, shape)[0], -1))
            whole.append((frames / frames.mean(2, keepdim=True)).flatten(1)[0])
        return func(query, key, value, heads, *args, **kwargs)

    shape = shape_of(kind, (3, 4))
    watched = guide("SAG", model, blocks=selector(model, kind, blocks))
    watched.model_options["transformer_options"]["optimized_attention_override"] = attention
    with pytest.MonkeyPatch.context() as patch, entered(model, kind) as state:
        patch.setattr(saliency, "_spread", spy)
        guided = sampled(watched, kind, steps=1)
    assert deviation(guided, sampled(model, kind, steps=1)) > 1e-3
    del length
    return seen, whole[: len(blocks)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_of_the_image_is_the_column_sums_of_a_whole_map(kind):
    blocks = [1] if kind == "pixeldit" else [1, 2]
    seen, whole = masses(kind, blocks)
    assert len(seen) == len(whole) == len(blocks)
    for ours, theirs in zip(seen, whole, strict=True):
        assert ours.mass.shape == (1, math.prod(grid_size(kind, shape_of(kind, (3, 4)))))
        assert torch.allclose(ours.mass[0].double(), theirs.double(), atol=1e-5)
        assert theirs.std() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_auto_watches_the_first_block_of_the_familys_range(kind):
    model = model_of(kind)
    with reported() as reports:
        sampled(guide("SAG", model), kind, steps=1)
    ((_, (branch,)),) = reports
    watched = branch.perturbation.watched
    attention = importlib.import_module(PACK + ".nodes.host").network_of(model, "x")
    assert watched.targets == attention.targets("auto")[:1]


@pytest.mark.parametrize("kind", CORE)
def test_the_mask_lies_over_the_cells_of_its_tokens_at_odd_sizes(kind):
    saliency, view = part("sampling.saliency"), part("networks.view")
    core = importlib.import_module(PACK + ".seg_core")
    grid = core.TokenGrid(1, 17, 3)
    mass = torch.arange(51.0)[None]
    seen = {None: view.Mass(mass, grid, (1, 4, 2))}
    spread = saliency._spread(seen, torch.Size((1, 1, 65, 6)))
    expected = mass.reshape(17, 3).repeat_interleave(4, 0).repeat_interleave(2, 1)[:65]
    assert torch.equal(spread[0, 0], expected)


# One call.

METHODS = {
    "TPG": lambda m, kind, numbers, **o: guide("TPG", m, blocks=selector(m, kind, numbers), **o),
    "SLG": lambda m, kind, numbers, **o: guide("SLG", m, blocks=selector(m, kind, numbers), **o),
    "SLG, attention": lambda m, kind, numbers, **o: guide(
        "SLG", m, blocks=selector(m, kind, numbers), what="attention", **o
    ),
}


def outputs(kind, build, **options):
    """Return the network's outputs in one step, the blocks that were entered, and the report."""
    model = model_of(kind)
    outs = []
    hook = model.model.diffusion_model.register_forward_hook(
        lambda _module, _args, out: outs.append(out.clone())
    )
    with reported() as reports, entered(model, kind) as state:
        sampled(build(model), kind, **{"steps": 1, "cfg": 4.0} | options)
    hook.remove()
    return outs, state["runs"], reports[0][0]


def require_one_call(kind, build, passes, **options):
    on, few, report = outputs(kind, functools.partial(build, reuse=True), **options)
    off, many, _ = outputs(kind, functools.partial(build, reuse=False), **options)
    assert not report.full, report.full
    assert len(on) == len(off)
    tolerance = 5e-6 if kind.startswith("wan") else 1e-5 if kind in ONLY_FLOAT32 else 1e-12
    for one, whole in zip(on, off, strict=True):
        assert deviation(one, whole) <= tolerance
    depth = len(block_modules(model_of(kind), kind))
    assert len(many) == len(few) + passes * depth


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_gives_what_whole_passes_give(kind, method):
    numbers = [0, 1] if kind == "pixeldit" else [1, 2]
    require_one_call(kind, lambda m, reuse: METHODS[method](m, kind, numbers, reuse=reuse), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_family_together_is_one_call(kind):
    """All on the same block, some on later ones: rows that pass by stand between others."""

    def build(model, reuse):
        blocks = functools.partial(selector, model, kind)
        model = guide(
            "SLG", model, blocks=blocks([1, 3] if kind != "pixeldit" else [1]), reuse=reuse
        )
        model = guide("SEG", model, blocks=blocks([1]), reuse=reuse)
        model = guide("TPG", model, blocks=blocks([0, 1]), reuse=reuse)
        model = guide("SEG", model, blocks=blocks([3]), reuse=reuse, branch="unconditional")
        return guide("PAG", model, blocks=blocks([2]), strength=0.5, reuse=reuse)

    require_one_call(kind, build, 5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CORE)
def test_free_changes_the_unconditional_prediction_itself(kind, method):
    numbers = [1, 2]
    model = model_of(kind)
    free = METHODS[method](model, kind, numbers, branch="free")
    seen = {}
    for name, one in (
        ("free", free),
        (
            "unconditional",
            METHODS[method](model, kind, numbers, branch="unconditional", reuse=False),
        ),
    ):
        outs = []
        hook = model.model.diffusion_model.register_forward_hook(
            lambda _module, _args, out, outs=outs: outs.append(out.clone())
        )
        sampled(one, kind, steps=1, cfg=4.0)
        hook.remove()
        seen[name] = outs
    (free,), (plain, worse) = seen["free"], seen["unconditional"]
    tolerance = 5e-6 if kind == "wan" else 1e-12
    rows = [deviation(free[n : n + 1], worse) for n in range(2)]
    kept = rows.index(max(rows))
    assert min(rows) <= tolerance
    assert deviation(free[kept : kept + 1], plain[kept : kept + 1]) <= tolerance


@pytest.mark.parametrize("steps", [8])
def test_the_defaults_are_those_of_cores_node_on_sd35(steps, caplog):
    """A network as deep as SD3.5: blocks 7 to 9, scale 3, the window from 0.01 to 0.15."""
    core = importlib.import_module("comfy_extras.nodes_slg").SkipLayerGuidanceDiT
    slg = importlib.import_module(PACK + ".nodes.slg").SEGuidanceSLG
    model = tiny_dit("sd3", num_blocks=12, dtype=torch.float64)
    widgets = {one.id: one.default for one in core.define_schema().inputs if one.id != "model"}
    ours = {
        one.id: one.default
        for one in slg.define_schema().inputs
        if getattr(one, "default", None) is not None
    }
    guided = slg.execute(model, **ours)[0]
    branch = guided.model_options["sampler_post_cfg_function"][-1].branch
    assert branch.perturbation.where == "7-9"
    with reported() as reports:
        mine = sampled(guided, "sd3", steps=steps, cfg=1.5)
    ((report, _),) = reports
    assert 0 < sum(report.guided.values()) < steps
    theirs = sampled(core.execute(model, **widgets)[0], "sd3", steps=steps, cfg=1.5)
    assert deviation(mine, theirs) < bound("sd3")
    assert deviation(mine, sampled(model, "sd3", steps=steps, cfg=1.5)) > 1e-2


@pytest.mark.parametrize(
    ("kind", "depth", "expected"),
    [
        ("ltxv", 28, "14, 19"),
        ("wan", 30, "10"),
        ("ltxv", 10, "3-4"),
        ("flux", 0, "double.1, single.0"),
    ],
)
def test_auto_of_skipped_blocks(kind, depth, expected):
    model = tiny_dit(kind, **({"num_layers": depth} if depth else {}))
    branch = guide("SLG", model).model_options["sampler_post_cfg_function"][-1].branch
    assert branch.perturbation.where == expected


@pytest.mark.parametrize("kind", CORE)
def test_a_threshold_of_nothing_blurs_everywhere(kind):
    model = model_of(kind)
    everywhere = sampled(guide("SAG", model, 0.5, mask="everywhere"), kind)
    assert deviation(sampled(guide("SAG", model, 0.5, threshold=0.0), kind), everywhere) < 1e-6
    assert deviation(sampled(guide("SAG", model, 0.5, threshold=1.0), kind), everywhere) > 1e-3
    nothing = sampled(guide("SAG", model, 0.5, threshold=100.0), kind)
    assert deviation(nothing, sampled(model, kind)) < 1e-6


@pytest.mark.parametrize("kind", CORE)
def test_all_heads_by_name_are_all_heads(kind):
    model = model_of(kind)
    heads = 1 if kind == "sd3" else 2
    name = selector(model, kind, [1])
    for method in ("SEG", "PAG"):
        some = sampled(guide(method, model, blocks=f"{name}:h0-{heads - 1}"), kind)
        assert deviation(some, sampled(guide(method, model, blocks=name), kind)) < 1e-6


@pytest.mark.parametrize("kind", CORE)
def test_tokens_in_their_own_order_push_nothing(kind, monkeypatch):
    """The least that shuffling can do, and what it is measured against."""
    tpg = importlib.import_module(PACK + ".nodes.tpg")
    model = model_of(kind)
    plain, shuffled = sampled(model, kind), sampled(guide("TPG", model), kind)
    monkeypatch.setattr(tpg, "token_permutation", lambda tokens, *_: torch.arange(tokens))
    assert deviation(sampled(guide("TPG", model), kind), plain) < bound(kind)
    assert deviation(shuffled, plain) > 1e-2
