"""Joining is proved once where other code acts, costs nothing elsewhere, and fits into memory."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from dit_models import tiny_dit
from family_oracle import guide
from host_models import seg, shared_model, tiny_model
from host_oracle import deviation
from no_op import CFG, NOTHING, STEPS, nothing, run
from reuse_checks import outcome, set_free_memory, warned
from stand_ins import WRAPPERS, attention_override, patched, wrapped
from surroundings import first_of_each_half


@patched("attn2_patch")
def scaled(q, k, v, extra):
    return 1.1 * q, k, v


@patched("attn2_patch")
def sorted_by_identity(q, k, v, extra):
    """As code that keeps something for each prompt, in the order of its identities."""
    own = dict(zip(extra["uuids"], v.chunk(len(extra["uuids"])), strict=True))
    scaled = {uuid.hex: 1.1 * own[uuid] for uuid in sorted(own)}
    return q, k, torch.cat([scaled[uuid.hex] for uuid in own])


@wrapped(WRAPPERS.DIFFUSION_MODEL)
def network_wrapped(executor, *args, **kwargs):
    return 1.05 * executor(*args, **kwargs)


@patched("unet_function_wrapper")
def model_function(apply, args):
    return 1.05 * apply(args["input"], args["timestep"], **args["c"])


@attention_override
def keys_scaled(function, q, k, v, *args, **kwargs):
    return function(q, 1.1 * k, v, *args, **kwargs)


HARMLESS = {
    "attn2_patch": scaled,
    "identities of prompts": sorted_by_identity,
    "input_block_patch": patched("input_block_patch")(lambda h, options: 1.05 * h),
    "output_block_patch": patched("output_block_patch")(lambda h, hsp, options: (h, 1.1 * hsp)),
    "a wrapper of the network": network_wrapped,
    "a wrapper of the model": model_function,
    "an attention override": keys_scaled,
}


# What the proof costs, and when there is none.


@pytest.mark.parametrize("cfg", CFG)
@pytest.mark.parametrize("guided", [seg, lambda m: guide("PAG", seg(m), 2.0)])
def test_where_nothing_foreign_acts_a_step_is_one_run_of_the_network(guided, cfg):
    rows = run(guided(shared_model()), cfg)[1]
    assert len(rows) == STEPS
    assert min(rows) > CFG[cfg], "and all of them joined"


def tiny_flux():
    return tiny_dit("flux", guidance_embed=False, dtype=torch.float64)


def test_where_nothing_foreign_acts_on_a_transformer_a_step_is_one_run_of_it():
    assert run(seg(tiny_flux()), cfg=1.0, kind="flux")[1] == [2] * STEPS


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "sdxl") for name in HARMLESS), ("an attention override", "flux")]
)
def test_beside_code_that_takes_each_row_by_itself_a_run_has_two_further_calls_at_most(name, kind):
    model = shared_model() if kind == "sdxl" else tiny_flux()
    (found, rows), (whole, _) = (
        run(HARMLESS[name](seg(model, reuse=reuse)), steps=5, kind=kind) for reuse in (True, False)
    )
    assert len(rows) <= 7
    assert rows[-3:] == [3, 3, 3], "joined in the end"
    assert deviation(found, whole) <= NOTHING


# What it finds.


def test_each_run_is_proved_anew_and_says_once_that_rows_would_move_it(caplog):
    """A model is sampled twice with other code beside it each time: one run vouches for itself."""
    model = seg(shared_model())
    run(model)
    moved = first_of_each_half(model)
    whole = first_of_each_half(seg(shared_model(), reuse=False))
    found = outcome(moved, batch=2, size=(6, 8))
    assert deviation(found.latents, run(whole, batch=2)[0]) <= NOTHING
    assert sum(found.full.values()) == STEPS
    assert len(found.reasons) == 1
    assert len(warned(caplog)) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rounding_of_a_precision_is_no_reason_against_joining(dtype):
    assert run(scaled(seg(tiny_model(dtype=dtype))))[1][-2:] == [3, 3]


def test_rows_that_a_plain_prediction_feels_only_a_little_do_not_join():
    @patched("attn1_patch")
    def barely_shared(n, context, value, extra):
        return n, *(t + 0.01 * (t.mean(0, keepdim=True) - t) for t in (context, value))

    model = tiny_model()
    alone, _ = run(barely_shared(model))
    found, _ = run(barely_shared(nothing(model)))
    assert deviation(found, alone) <= 1e-4


# Memory, by the host's rule.


def references(model):
    """Sample a Flux with reference images, and return the rows of the largest run."""
    latents = [torch.ones(1, 16, 24, 32), torch.ones(1, 16, 16, 16)]
    cond = {"reference_latents": latents}
    return max(run(model, cfg=1.0, kind="flux", steps=1, cond=cond)[1])


@pytest.mark.parametrize(("share", "rows"), [(0.97, 1), (1.03, 2)])
def test_rows_join_where_the_host_would_have_batched_as_many_conds(share, rows, monkeypatch):
    model = tiny_dit("flux", guidance_embed=False)
    model.model.memory_usage_factor_conds = ("ref_latents",)
    estimate = model.model.memory_required
    with mock.patch.object(model.model, "memory_required", wraps=estimate) as asked:
        references(model)
    (shape,), conds = asked.call_args.args, asked.call_args.kwargs["cond_shapes"]
    assert len(conds["ref_latents"]) == 1, "the host counts them"
    doubled = {name: 2 * list(shapes) for name, shapes in conds.items()}
    needed = 1.5 * estimate([2, *shape[1:]], cond_shapes=doubled)
    set_free_memory(monkeypatch, share * needed)
    assert references(seg(model)) == rows


@pytest.mark.parametrize(("share", "most"), [(0.97, 2), (1.03, 3)])
def test_rows_join_both_sides_of_cfg_where_three_conds_fit(share, most, monkeypatch):
    model = tiny_model()
    needed = 1.5 * model.model.memory_required([3, 4, 6, 8])
    set_free_memory(monkeypatch, share * needed)
    rows = run(seg(model), steps=1)[1]
    assert max(rows) == most
    assert sum(rows) == 3, "no row is computed twice"
