"""A joined call never makes a run fail: it is repeated as the host made it."""

from __future__ import annotations

import functools

import comfy.model_management
import pytest
import torch
from choice import each
from dit_models import sample_dit, tiny_dit
from dit_oracle import shape_of
from family_oracle import guide
from host_models import sample, seg, shared_model, tiny_model
from no_op import CFG, NOTHING, STEPS, network_runs, run, warnings_of
from reuse_checks import difference, outcome
from surroundings import patched, raises_beyond

OOM = functools.partial(comfy.model_management.OOM_EXCEPTION, "out of memory, says the allocator")


class Foreign(Exception):
    """An error that no library knows."""


ERRORS = {
    "RuntimeError": lambda: RuntimeError("the size of tensor a must match"),
    "AssertionError": lambda: AssertionError("the size of tensor a must match"),
    "IndexError": lambda: IndexError("the size of tensor a must match"),
    "an error of its own": lambda: Foreign("the size of tensor a must match"),
}


def modules_state(network):
    """Return what hooks, forwards and attributes each module of a network has."""
    return {
        name: (
            sorted(set(vars(m)) - {"_forward"}),  # stands for the length of a call
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            type(m),
        )
        for name, m in network.named_modules()
    }


# A joined call that raises.


@pytest.mark.parametrize(*each(error=ERRORS, cfg=CFG))
def test_a_joined_call_that_raises_is_repeated_as_the_host_made_it(error, cfg, caplog):
    around = raises_beyond(CFG[cfg], ERRORS[error])
    whole, _ = run(around(seg(shared_model(), reuse=False)), cfg)
    caplog.clear()
    found, rows = run(around(seg(shared_model())), cfg)
    assert torch.equal(found, whole)
    (warning,) = warnings_of(caplog)
    assert "the size of tensor a must match" in warning
    assert len([n for n in rows if n > CFG[cfg]]) == 1, "one call was tried, then no more"
    assert len(rows) == 2 * STEPS + 1, "each later step makes the plain call and a whole pass"


def test_a_joined_call_that_raises_with_two_branches_is_repeated_once(caplog):
    def guided(reuse):
        model = guide("PAG", seg(shared_model(), reuse=reuse), 2.0, reuse=reuse)
        return raises_beyond(2, ERRORS["RuntimeError"])(model)

    whole, _ = run(guided(False))
    caplog.clear()
    found, rows = run(guided(True))
    assert difference(found, whole) <= NOTHING
    assert len([m for m in warnings_of(caplog) if "the size of tensor a" in m]) == 1
    assert len([n for n in rows if n > 2]) == 1


@pytest.mark.parametrize("name", ["double_block", "single_block"])
def test_a_joined_call_of_a_transformer_that_raises_is_repeated(name, caplog):
    def around(model):
        def bounded(args, extra):
            if len(args["img"]) > 1:
                raise RuntimeError("made for one image")
            return extra["original_block"](args)

        model = model.clone()
        model.set_model_patch_replace(bounded, "dit", name, 1)
        return model

    def sampled(reuse):
        model = around(seg(tiny_dit("flux", guidance_embed=False), reuse=reuse, blocks="double.0"))
        with network_runs("flux") as rows:
            latents = sample_dit(model, "flux", shape_of("flux", (3, 4)), cfg=1.0, steps=STEPS)
        return latents, rows

    whole, each = sampled(False)
    assert len(each) == 2 * STEPS
    caplog.clear()
    found, rows = sampled(True)
    assert torch.equal(found, whole)
    assert len(rows) == 2 * STEPS + 1
    (warning,) = warnings_of(caplog)
    assert "made for one image" in warning


def test_hooks_are_gone_before_a_call_of_a_later_step_is_repeated_and_after_it(caplog):
    model = tiny_model(dtype=torch.float64)
    network = model.model.diffusion_model
    whole, _ = run(seg(model, reuse=False), steps=4)  # ComfyUI marks the layers that it has loaded
    caplog.clear()
    before, at_repeat = modules_state(network), []

    def bounded(h, hsp, options):
        if len(h) > 2 and float(options["sigmas"][0]) < 3 and not at_repeat:
            at_repeat.append(None)
            raise RuntimeError("stop")
        if at_repeat == [None]:
            at_repeat.append(modules_state(network))
        return h, hsp

    found, _ = run(patched("output_block_patch", bounded)(seg(model)), steps=4)
    assert difference(found, whole) <= NOTHING
    assert len(warnings_of(caplog)) == 1
    assert at_repeat == [None, before]
    assert modules_state(network) == before
    assert "_forward" not in vars(network)


def test_what_a_failed_call_had_reached_is_not_counted(caplog):
    """The blocks were changed in rows that nobody saw: the report counts whole passes alone."""
    caplog.set_level("INFO")
    found = outcome(raises_beyond(2, ERRORS["RuntimeError"])(seg(shared_model())))
    assert found.shared == 0
    assert sum(found.full.values()) == STEPS
    assert f"{STEPS} of {STEPS} model evaluations guided" in caplog.text


@pytest.mark.parametrize("cfg", CFG)
def test_a_joined_call_that_runs_out_of_memory_is_repeated_unjoined(cfg, caplog):
    around = raises_beyond(CFG[cfg], OOM)
    whole, _ = run(around(seg(shared_model(), reuse=False)), cfg)
    caplog.clear()
    found, rows = run(around(seg(shared_model())), cfg)
    assert torch.equal(found, whole)
    assert len(rows) >= 2 * STEPS + 1
    assert [m for m in warnings_of(caplog) if "memory" in m]


@pytest.mark.parametrize("reuse", [True, False])
def test_a_plain_call_that_runs_out_of_memory_is_the_host_s_business(reuse):
    with network_runs() as rows, pytest.raises(comfy.model_management.OOM_EXCEPTION):
        sample(raises_beyond(0, OOM)(seg(shared_model(), reuse=reuse)), size=(6, 8))
    assert len(rows) <= 2, "and a joined one is tried again once"


def test_an_error_of_the_plain_call_comes_out_as_it_was():
    def sampled(model):
        with pytest.raises(KeyError, match="not for anybody"):
            run(raises_beyond(0, lambda: KeyError("not for anybody"))(model))

    sampled(shared_model())
    sampled(seg(shared_model()))
    sampled(seg(shared_model(), reuse=False))


def test_a_user_who_interrupts_is_obeyed_at_once():
    interrupt = comfy.model_management.InterruptProcessingException
    with network_runs() as rows, pytest.raises(interrupt):
        sample(raises_beyond(2, interrupt)(seg(shared_model())), size=(6, 8))
    assert len([n for n in rows if n > 2]) == 1, "and nothing follows"
    assert len(rows) <= 2
    assert all(not m._forward_hooks for m in shared_model().model.diffusion_model.modules())
