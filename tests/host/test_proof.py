"""Joining is proved once where other code acts, costs nothing elsewhere, and fits into memory."""

from __future__ import annotations

import pytest
import torch
from dit_models import sample_dit, tiny_dit
from dit_oracle import shape_of
from family_oracle import guide
from host_models import seg, shared_model, tiny_model
from no_op import CFG, NOTHING, STEPS, network_runs, nothing, run, warnings_of
from reuse_checks import difference, outcome, set_free_memory
from surroundings import WRAPPERS, first_of_each_half, patched


def shared_keys(n, context, value, extra, share=0.5):
    """Draw keys and values to those of all rows."""
    return n, *(t + share * (t.mean(0, keepdim=True) - t) for t in (context, value))


def barely_shared(n, context, value, extra):
    return shared_keys(n, context, value, extra, share=0.01)


def late(patch):
    """Let a patch act from a noise level on, as nodes with a window of steps do."""

    def windowed(n, context, value, extra):
        if float(extra["sigmas"][0]) > 3:
            return n, context, value
        return patch(n, context, value, extra)

    return windowed


def scaled(q, k, v, extra):
    return 1.1 * q, k, v


def passed_on(executor, *args, **kwargs):
    return 1.05 * executor(*args, **kwargs)


def network_wrapped(model):
    model = model.clone()
    model.add_wrapper_with_key(WRAPPERS.DIFFUSION_MODEL, "test", passed_on)
    return model


def model_function(model):
    model = model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, args: 1.05 * apply(args["input"], args["timestep"], **args["c"])
    )
    return model


HARMLESS = {
    "attn2_patch": patched("attn2_patch", scaled),
    "input_block_patch": patched("input_block_patch", lambda h, options: 1.05 * h),
    "output_block_patch": patched("output_block_patch", lambda h, hsp, options: (h, 1.1 * hsp)),
    "a wrapper of the network": network_wrapped,
    "a wrapper of the model": model_function,
}


# What the proof costs, and when there is none.


@pytest.mark.parametrize("cfg", CFG)
@pytest.mark.parametrize("guided", [seg, lambda m: guide("PAG", seg(m), 2.0)])
def test_where_nothing_foreign_acts_a_step_is_one_run_of_the_network(guided, cfg):
    rows = run(guided(shared_model()), cfg)[1]
    assert len(rows) == STEPS
    assert min(rows) > CFG[cfg], "and all of them joined"


@pytest.mark.parametrize("name", HARMLESS)
def test_beside_code_that_takes_each_row_by_itself_a_run_has_two_further_calls_at_most(name):
    around, steps = HARMLESS[name], 5
    found, rows = run(around(seg(shared_model())), steps=steps)
    whole, _ = run(around(seg(shared_model(), reuse=False)), steps=steps)
    assert len(rows) <= steps + 2
    assert rows[-3:] == [3, 3, 3], "joined in the end"
    assert difference(found, whole) <= NOTHING


def flux_rows(model, steps):
    """Return the rows of each run of a Flux at cfg 1."""
    with network_runs("flux") as rows:
        sample_dit(model, "flux", shape_of("flux", (3, 4)), cfg=1.0, steps=steps)
    return rows


def test_where_nothing_foreign_acts_on_a_transformer_a_step_is_one_run_of_it():
    assert flux_rows(seg(tiny_dit("flux", guidance_embed=False)), STEPS) == [2] * STEPS


def test_beside_harmless_code_a_transformer_runs_twice_more_at_most():
    def override(function, q, k, v, *args, **kwargs):
        return function(q, k, 1.1 * v, *args, **kwargs)

    model = seg(tiny_dit("flux", guidance_embed=False))
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    rows = flux_rows(model, 5)
    assert len(rows) <= 7
    assert rows[-3:] == [2, 2, 2]


# What it finds.


def test_each_run_is_proved_anew_and_says_once_that_rows_would_move_it(caplog):
    """A model is sampled twice with other code beside it each time: one run vouches for itself."""
    model = seg(shared_model())
    run(model)
    moved = first_of_each_half(model)
    whole = first_of_each_half(seg(shared_model(), reuse=False))
    found = outcome(moved, batch=2, size=(6, 8))
    assert difference(found.latents, run(whole, batch=2)[0]) <= NOTHING
    assert sum(found.full.values()) == STEPS
    assert len(found.reasons) == 1
    assert len(warnings_of(caplog)) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rounding_of_a_precision_is_no_reason_against_joining(dtype):
    model = patched("attn2_patch", scaled)(seg(tiny_model(dtype=dtype)))
    assert run(model)[1][-2:] == [3, 3]


def test_rows_that_a_plain_prediction_feels_only_a_little_do_not_join():
    around = patched("attn1_patch", barely_shared)
    model = tiny_model()
    alone, _ = run(around(model))
    found, _ = run(around(nothing(model, True)))
    assert difference(found, alone) <= 1e-4


# Memory, by the host's rule.


def estimates(model):
    """Let a model note what it is asked to estimate: shapes of the latent and of its conds."""
    asked, original = [], model.model.memory_required

    def noted(shape, cond_shapes=None):
        asked.append((list(shape), {k: list(v) for k, v in (cond_shapes or {}).items()}))
        return original(shape, cond_shapes=cond_shapes or {})

    model.model.memory_required = noted
    return asked


def references(model, **settings):
    """Sample a Flux with reference images, and return the rows of each run of the network."""
    with network_runs("flux") as rows:
        shape = shape_of("flux", (3, 4))
        latents = [torch.ones(1, 16, 24, 32), torch.ones(1, 16, 16, 16)]
        cond = {"reference_latents": latents}
        sample_dit(model, "flux", shape, cond=cond, cfg=1.0, steps=1, **settings)
    return max(rows)


@pytest.mark.parametrize(("share", "rows"), [(0.97, 1), (1.03, 2)])
def test_rows_join_where_the_host_would_have_batched_as_many_conds(share, rows, monkeypatch):
    model = tiny_dit("flux", guidance_embed=False)
    model.model.memory_usage_factor_conds = ("ref_latents",)
    asked = estimates(model)
    references(model)
    shape, conds = asked[-1]  # of the one cond that is evaluated
    assert len(conds["ref_latents"]) == 1, "the host counts them"
    del model.model.memory_required
    doubled = {name: 2 * shapes for name, shapes in conds.items()}
    needed = 1.5 * model.model.memory_required([2, *shape[1:]], cond_shapes=doubled)
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
