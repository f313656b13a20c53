"""A joined call never makes a run fail: it is repeated as the host made it."""

from __future__ import annotations

import functools

import comfy.model_management
import pytest
import torch
from choice import each
from dit_models import tiny_dit
from family_oracle import guide
from host_models import sample, seg, shared_model, tiny_model
from host_oracle import deviation
from no_op import ACTS, CFG, NOTHING, STEPS, network_runs, network_state, run
from reuse_checks import outcome, warned
from stand_ins import patched
from surroundings import raises_beyond

OOM = functools.partial(comfy.model_management.OOM_EXCEPTION, "out of memory, says the allocator")


class Foreign(Exception):
    """An error that no library knows."""


MISMATCH = "the size of tensor a must match"
ERRORS = {
    "RuntimeError": functools.partial(RuntimeError, MISMATCH),
    "AssertionError": functools.partial(AssertionError, MISMATCH),
    "an error of its own": functools.partial(Foreign, MISMATCH),
    "out of memory": OOM,
}


# A joined call that raises.


@functools.cache
def whole_pass(cfg):
    """Return what whole passes give beside code that cannot run with more rows."""
    return run(raises_beyond(CFG[cfg], OOM)(seg(shared_model(), reuse=False)), cfg)[0]


@pytest.mark.parametrize(*each(error=ERRORS, cfg=CFG))
def test_a_joined_call_that_raises_is_repeated_as_the_host_made_it(error, cfg, caplog):
    """The blocks of the failed call were changed in rows that nobody saw: they do not count."""
    caplog.set_level("INFO")
    around = raises_beyond(CFG[cfg], ERRORS[error])
    found, rows = run(around(seg(shared_model())), cfg)
    assert torch.equal(found, whole_pass(cfg))
    (warning,) = warned(caplog)
    assert ("memory" if error == "out of memory" else MISMATCH) in warning
    assert "other node" not in warning, "nobody knows whose fault it is"
    assert len([n for n in rows if n > CFG[cfg]]) == 1, "one call was tried, then no more"
    assert len(rows) == 2 * STEPS + 1, "each later step makes the plain call and a whole pass"
    assert f"{STEPS} of {STEPS} model evaluations guided" in caplog.text
    counts = outcome(around(seg(shared_model())), cfg=cfg)
    assert (counts.shared, counts.full.total()) == (0, STEPS)


def test_a_joined_call_that_raises_with_two_branches_is_repeated_once(caplog):
    two = guide("PAG", seg(shared_model()), 2.0)
    found, rows = run(raises_beyond(2, ERRORS["RuntimeError"])(two))
    unbroken, _ = run(raises_beyond(9, OOM)(two))
    assert deviation(found, unbroken) <= NOTHING
    assert len([m for m in warned(caplog) if MISMATCH in m]) == 1
    assert len([n for n in rows if n > 2]) == 1


@pytest.mark.parametrize("name", ["double_block", "single_block"])
def test_a_joined_call_of_a_transformer_that_raises_is_repeated(name, caplog):
    @patched("patch_replace", "dit", name, 1)
    def bounded(args, extra):
        if len(args["img"]) > 1:
            raise RuntimeError("made for one image")
        return extra["original_block"](args)

    def sampled(reuse):
        model = seg(tiny_dit("flux", guidance_embed=False), reuse=reuse, blocks="double.0")
        return run(bounded(model), cfg=1.0, kind="flux")

    (found, rows), (whole, each_alone) = sampled(True), sampled(False)
    assert torch.equal(found, whole)
    assert len(rows) == 2 * STEPS + 1 == len(each_alone) + 1
    (warning,) = warned(caplog)
    assert "made for one image" in warning


def test_a_joined_call_of_a_later_step_that_raises_leaves_nothing_on_the_network(caplog):
    model, failed = tiny_model(dtype=torch.float64), []
    whole, _ = run(seg(model, reuse=False), steps=4)  # ComfyUI marks the layers that it has loaded
    before = network_state(model)

    @patched("output_block_patch")
    def bounded(h, hsp, options):
        if len(h) > 2 and float(options["sigmas"][0]) < 3 and not failed:
            failed.append(network_state(model))
            raise RuntimeError("stop")
        return h, hsp

    found, _ = run(bounded(seg(model)), steps=4)
    assert deviation(found, whole) <= NOTHING
    assert len(warned(caplog)) == 1
    assert failed != [before], "while a call lasts, there is something on it"
    assert network_state(model) == before


def averaging():
    """Return code that averages attention over the steps, whichever rows it is given."""
    known = {}

    @patched("attn1_output_patch")
    def averaged(out, options):
        place = (*options["block"], options["block_index"])
        known[place] = 0.7 * out + 0.3 * known.get(place, out)
        return known[place]

    return averaged


def test_code_that_has_kept_perturbed_rows_is_named_with_advice():
    with pytest.raises(ValueError, match=r"kept those of perturbed rows.*Switch reuse off"):
        run(averaging()(seg(shared_model())), cfg=1.0)
    found, _ = run(averaging()(seg(shared_model(), reuse=False)), cfg=1.0)
    assert deviation(found, run(averaging()(shared_model()), cfg=1.0)[0]) > ACTS


def test_an_error_of_a_later_plain_call_comes_out_as_it_was():
    @patched("output_block_patch")
    def fails_late(h, hsp, options):
        if float(options["sigmas"][0]) < 3:
            raise KeyError("mine")
        return h, hsp

    with pytest.raises(KeyError, match="mine"):
        run(fails_late(seg(shared_model())))


# Errors of the plain call, which are the host's business.


@pytest.mark.parametrize(
    *each(guided=[seg, functools.partial(seg, reuse=False)], error=[OOM, lambda: KeyError("mine")])
)
def test_an_error_of_the_plain_call_comes_out_as_it_was(guided, error):
    broken = raises_beyond(0, error)(guided(shared_model()))
    with network_runs() as rows, pytest.raises(type(error()), match=str(error())):
        sample(broken, size=(6, 8))
    assert len(rows) <= 2, "a joined one is tried again once"


def test_memory_that_runs_out_in_an_extra_pass_is_no_fault_of_another_node():
    runs = []

    @patched("output_block_patch")
    def second_run_is_too_large(h, hsp, options):
        runs.append(options["block"])
        if runs.count(options["block"]) == 2:
            raise OOM()
        return h, hsp

    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match="the allocator"):
        sample(second_run_is_too_large(seg(shared_model(), reuse=False)), size=(6, 8))


def test_a_user_who_interrupts_is_obeyed_at_once():
    interrupt = comfy.model_management.InterruptProcessingException
    with network_runs() as rows, pytest.raises(interrupt):
        sample(raises_beyond(2, interrupt)(seg(shared_model())), size=(6, 8))
    assert len([n for n in rows if n > 2]) == 1, "and nothing follows"
    assert len(rows) <= 2
