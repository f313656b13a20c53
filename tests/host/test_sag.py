"""Self-Attention Guidance: equal to core's node at its settings, right where that one is not."""

from __future__ import annotations

import functools
import math

import comfy.model_base
import pytest
import torch
from choice import each, some
from comfy.ldm.modules.attention import optimized_attention
from dit_models import sampled
from dit_oracle import CORE, exact_model
from family_oracle import blurred_where_attended, drawn, guide
from host_models import conditioning, counted_calls, sample, shared_model
from host_oracle import deviation, heads_apart
from stand_ins import context_windows, patched, shipped

sag = functools.partial(guide, "SAG", scale=0.5)
core_sag = shipped("sag", "SelfAttentionGuidance", 0.5, 2.0)
SIZE = (16, 16)


@pytest.mark.parametrize(*each(kind=["sd15", "sdxl"], batch=[1, 2]))
def test_core_settings_give_cores_result(kind, batch):
    model = shared_model(kind)
    options = {"size": SIZE, "batch": batch, "cfg": 7.0}
    theirs = sample(core_sag(model), **options)
    assert deviation(sample(sag(model, branch="unconditional"), **options), theirs) < 1e-5
    assert deviation(sample(model, **options), theirs) > 1e-3


@pytest.mark.parametrize(
    "wrong", [{"threshold": 1.1}, {"blur_sigma": 1.8}, {"kernel": "full"}, {"mask": "everywhere"}]
)
def test_the_comparison_with_core_notices_a_wrong_setting(wrong):
    options = {"size": SIZE, "cfg": 7.0}
    theirs = sample(core_sag(shared_model()), **options)
    ours = sample(sag(shared_model(), **{"branch": "unconditional"} | wrong), **options)
    assert deviation(ours, theirs) > 1e-4


@pytest.mark.parametrize("branch", ["conditional", "unconditional"])
def test_result_does_not_depend_on_how_the_host_splits_conds(branch, monkeypatch):
    model, options = shared_model(), {"size": (16, 10), "cfg": 7.0}
    whole = sample(sag(model, branch=branch), **options)
    # Every cond on its own, as when memory is short.
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_a, **_k: math.inf)
    with counted_calls(model) as calls:
        split = sample(sag(model, branch=branch), **options)
    assert set(calls) == {1}
    assert deviation(split, whole) < 1e-5


def test_cfg_one_costs_two_passes_and_no_effect_none(caplog):
    model = shared_model()
    plain = sample(model, cfg=1.0)
    with counted_calls(model) as calls:
        assert deviation(sample(sag(model), cfg=1.0), plain) > 1e-3
        assert calls == [1, 1, 1, 1]
        for setting in ({"scale": 0.0}, {"blur_sigma": 0.0}, {"blur_sigma": 0.1}):
            calls.clear()
            assert torch.equal(sample(sag(model, **setting), cfg=1.0), plain)
            assert calls == [1, 1]
    assert caplog.text.count("has no effect") == 3


# The formula written out, with a whole map.


def enlarged(mass, size):
    """Show each token of the middle grid at its place of the latent."""
    height, width = (-(-n // 2) for n in size)
    rows = [int(i * height / size[0]) for i in range(size[0])]
    columns = [int(i * width / size[1]) for i in range(size[1])]
    return mass.reshape(-1, 1, height, width)[:, :, rows][:, :, :, columns]


def recorded(model, seen):
    """Return a model that notes the attention of its middle block, and the window it was in."""

    @patched("attn1_replace", "middle", 0, 0)
    def record(q, k, v, extra):
        heads = extra["n_heads"]
        mass = drawn(heads_apart(q, heads), heads_apart(k, heads))
        seen.append((mass, extra.get("context_window")))
        return optimized_attention(q, k, v, heads)

    return record(model)


@pytest.mark.parametrize("size", [(16, 16), (36, 4), (9, 13)])
def test_one_step_equals_the_formula_written_out(size):
    seen, one = [], {"size": size, "steps": 1, "cfg": 1.0}
    reference = blurred_where_attended(
        recorded(shared_model(), seen), lambda: enlarged(seen[-1][0], size), 0.7, 1.5
    )
    expected = sample(reference, **one)
    found, other = (sample(sag(shared_model(), scale=0.7, blur_sigma=s), **one) for s in (1.5, 1.4))
    assert deviation(found, expected) < 1e-5 < deviation(other, expected)


def test_areas_use_the_mask_of_their_own_prompt():
    """Two prompts side by side: each half is guided as if the mask were its own prompt's."""
    seen = []
    pair = conditioning(1, area=(16, 8, 0, 0)) + conditioning(3, area=(16, 8, 0, 8))

    def attention():
        masses = torch.cat([mass for mass, _ in seen])[:2]  # the host begins with the last prompt
        return torch.cat([enlarged(mass[None], (16, 8)) for mass in masses.flip(0)], -1)

    reference = blurred_where_attended(recorded(shared_model(), seen), attention, 0.5, 2.0)
    one = {"positive": pair, "size": SIZE, "steps": 1, "cfg": 1.0}
    assert deviation(sample(sag(shared_model()), **one), sample(reference, **one)) < 1e-5


@pytest.mark.parametrize("kind", ["sdxl", *CORE])
def test_a_threshold_of_nothing_blurs_everywhere_and_a_high_one_nowhere(kind, caplog):
    model = exact_model(kind)
    everywhere, low, middle, high, plain = (
        sampled(guided, kind, steps=1, cfg=1.0)
        for guided in (
            sag(model, mask="everywhere"), sag(model, threshold=0.0), sag(model),
            sag(model, threshold=100.0), model,
        )
    )  # fmt: skip
    assert deviation(low, everywhere) < 1e-5
    assert deviation(middle, everywhere) > 1e-3
    assert torch.equal(high, plain)
    assert caplog.text.count("Lower threshold") == 1


def test_an_unknown_mask_is_an_error_that_lists_what_there_is():
    with pytest.raises(ValueError, match=r"attention.*everywhere"):
        sag(shared_model(), mask="nowhere")


def test_a_batch_mate_does_not_change_an_image():
    noise = torch.randn(2, 4, *SIZE, generator=torch.Generator().manual_seed(5))
    both, alone = (
        sample(sag(shared_model()), noise=n, latent=torch.zeros_like(n), size=SIZE, cfg=1.0)
        for n in (noise, noise[:1])
    )
    assert deviation(both[:1], alone) < 1e-5


# Windows of a clip.


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


@patched("attn1_patch")
def sharper_later(n, context, value, extra):
    """A patch of another node by which windows disagree on the frames that they share."""
    return n * (1.0 + 2.0 * extra["context_window"].index_list[0]), context, value


@pytest.mark.parametrize("fuse", some(SHARES, "pyramid", "overlap-linear"))
def test_each_windows_attention_is_weighed_as_its_prediction(fuse):
    """The attention to a clip is what the host makes of the windows' attention."""
    seen, frames, model = [], 7, sharper_later(shared_model())

    def attention():
        total, weights = torch.zeros(frames, 1, *SIZE), torch.zeros(frames, 1, 1, 1)
        for mass, window in seen[:3]:
            shares = SHARES[fuse](window.index_list, frames - 1)
            maps = enlarged(mass, SIZE)
            for place, (frame, share) in enumerate(zip(window.index_list, shares, strict=True)):
                total[frame] += share * maps[place]
                weights[frame] += share
        return total / weights

    reference = blurred_where_attended(recorded(model, seen), attention, 0.5, 2.0)
    one = {"batch": frames, "size": SIZE, "steps": 1, "cfg": 1.0}
    expected = sample(context_windows(reference, fuse), **one)
    assert deviation(sample(context_windows(sag(model), fuse), **one), expected) < 1e-4
    wrong = {"flat": "relative"}.get(fuse, "flat")
    assert deviation(sample(context_windows(sag(model), wrong), **one), expected) > 1e-3
