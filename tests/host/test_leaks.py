"""Nothing is left behind: on the model, after an error, in memory, between threads and devices."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import threading
import weakref

import pytest
import torch
from choice import each, some
from comfy.model_management import InterruptProcessingException
from family_oracle import guide
from host_models import PACK, sample, seg, shared_model, tiny_model
from host_oracle import deviation
from neighbours import momentum
from no_op import state
from stand_ins import WRAPPERS, patched, wrapped

SIZE = (6, 8)
sag = functools.partial(guide, "SAG", scale=0.5)


def chain(model, *, reuse=True):
    return guide("PAG", seg(model, sigma=1.3, blocks="u1", reuse=reuse), 2.0, reuse=reuse)


@functools.cache
def unguided():
    return sample(tiny_model(), size=SIZE)


SETTINGS = {
    "joined": chain,
    "whole": functools.partial(chain, reuse=False),
    "free": functools.partial(seg, branch="free"),
    "unconditional": functools.partial(seg, branch="unconditional"),
    "off": functools.partial(seg, scale=0.0),
    "late": functools.partial(seg, start=0.4),
    "SAG": sag,
}


@pytest.mark.floor
@pytest.mark.parametrize("settings", SETTINGS)
def test_model_that_came_in_is_unchanged(settings):
    model = tiny_model()
    sample(model, size=SIZE, steps=1)  # ComfyUI marks the layers that it has loaded
    before = state(model)
    guided = SETTINGS[settings](model)
    assert state(model) == before
    of_guided = state(guided)
    sample(guided, size=SIZE)
    assert state(model) == before
    assert state(guided) == of_guided
    assert torch.equal(sample(model, size=SIZE), unguided())


@pytest.mark.floor
@pytest.mark.parametrize(
    *each(
        error=[KeyError, InterruptProcessingException, torch.OutOfMemoryError],
        where=["the first call", "the second call", "another node", "the progress bar"],
        reuse=[True, False],
    )
)
def test_error_in_mid_run_leaves_the_next_run_as_a_fresh_one(where, error, reuse):
    model, calls = tiny_model(), []
    guided = broken = chain(model, reuse=reuse)
    expected = sample(guided, size=SIZE)
    before = state(guided)

    def fail(*_):
        calls.append(1)
        if len(calls) > (where == "the second call"):
            raise error

    layer = model.model.diffusion_model.output_blocks[0][0]
    handle = layer.register_forward_pre_hook(fail) if "call" in where else None
    if where == "another node":
        broken = patched("sampler_post_cfg_function")(fail)(guided)
    with pytest.raises(error):
        sample(broken, size=SIZE, callback=fail if where == "the progress bar" else None)
    if handle is not None:
        handle.remove()
    assert state(guided) == before
    assert torch.equal(sample(guided, size=SIZE), expected)
    assert torch.equal(sample(model, size=SIZE), unguided())


# State and settings in the model's options.


def test_what_others_write_into_the_options_stays_and_nothing_of_ours_does():
    seen = []

    @wrapped(WRAPPERS.PREDICT_NOISE, outside=True)
    def looking(executor, x, timestep, options, seed):
        seen.append((set(options), set(options["transformer_options"])))
        return executor(x, timestep, options, seed)

    sample(looking(seg(momentum(shared_model()))), steps=3)
    first, *later = seen
    assert all(options - first[0] == {"momentum"} for options, _ in later)
    assert all(options - first[1] == {"steps seen"} for _, options in later)


def test_a_deep_copy_of_the_options_copies_settings_and_no_network():
    def parameters():
        return sum(isinstance(thing, torch.nn.Parameter) for thing in gc.get_objects())

    model = chain(shared_model())
    before = parameters()
    clone = model.clone()
    clone.model_options = copy.deepcopy(model.model_options)
    assert parameters() == before
    assert torch.equal(sample(clone, steps=2), sample(model, steps=2))


# Memory.


@pytest.mark.filterwarnings("ignore")  # asking every live object for its type wakes deprecations
def test_no_prediction_is_kept_after_its_step():
    def latents_alive(model):
        alive = []

        @wrapped(WRAPPERS.PREDICT_NOISE, outside=True)
        def counting(executor, *args):
            out = executor(*args)
            tensors = (thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor))
            alive.append(sum(tensor.shape[1:] == (4, *SIZE) for tensor in tensors))
            return out

        sample(counting(model), size=SIZE, steps=3)
        return alive

    assert latents_alive(chain(shared_model())) == latents_alive(shared_model())


def growth(model, runs):
    """Return by how many objects, and how many tensors, some runs let memory grow."""
    for _ in range(2):
        sample(model, size=(4, 4), steps=1)
    gc.collect()
    gc.freeze()  # what is alive by now is neither counted nor looked at again
    for _ in range(runs):
        sample(model, size=(4, 4), steps=1)
    gc.collect()
    alive = gc.get_objects()
    return len(alive), sum(isinstance(thing, torch.Tensor) for thing in alive)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", some(SETTINGS, "joined", "SAG"))
def test_many_runs_do_not_grow_memory(settings):
    model = shared_model("sd15")
    runs = 20
    # The host itself keeps a few objects for each run of any clone.
    hosts_own, _ = growth(model.clone(), runs)
    objects, tensors = growth(SETTINGS[settings](model), runs)
    assert tensors == 0
    assert objects <= 1.5 * hosts_own + runs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("guided", [chain, sag])
def test_nothing_of_ours_waits_for_the_garbage_collector(guided):
    model = guided(shared_model())
    sample(model, steps=1)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        sample(model, steps=2)
        gc.collect()
        garbage = list(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    # The host leaves a class for each cond and step.
    assert not [thing for thing in garbage if isinstance(thing, torch.Tensor)]
    of = [thing.__module__ if inspect.isfunction(thing) else type(thing).__module__
          for thing in garbage]  # fmt: skip
    assert not [module for module in of if str(module).startswith(PACK)]


def test_a_guided_clone_is_gone_when_nobody_holds_it():
    guided = chain(tiny_model())
    sample(guided, steps=1)
    gone = weakref.ref(guided)
    del guided
    gc.collect()
    assert gone() is None


# Threads and devices.


def test_threads_give_what_runs_one_after_the_other_give():
    """One network each, as clones on two devices have; two share one guidance object."""
    shared, other = seg(tiny_model(), sigma=1.3), seg(tiny_model(), sigma=1.3)
    other.model_options["sampler_post_cfg_function"] = list(
        shared.model_options["sampler_post_cfg_function"]
    )
    runs = [(shared, (6, 8)), (other, (10, 4)), (chain(tiny_model("sd15")), (8, 6))]
    expected = [sample(model, size=size, steps=3) for model, size in runs]
    found = [None] * len(runs)
    start = threading.Barrier(len(runs))

    def work(i):
        start.wait()
        for _ in range(2):
            found[i] = sample(runs[i][0], size=runs[i][1], steps=3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        assert deviation(ours, theirs) <= 1e-6


@pytest.mark.current_only
@pytest.mark.parametrize("branch", ["conditional", "unconditional", "free"])
def test_work_split_over_two_devices_gives_what_one_device_gives(branch):
    """The host splits the conds over clones on two devices; here both are the same processor."""
    options = {"size": SIZE, "steps": 2, "cfg": 4.0}
    model = tiny_model("sdxl", dtype=torch.float64)
    expected = sample(seg(model, sigma=1.3, branch=branch), **options)
    model.cached_patcher_init = (lambda: tiny_model("sdxl", dtype=torch.float64), ())
    second = model.deepclone_multigpu(torch.device("cpu", 0))
    second.is_multigpu_base_clone = True
    split = model.clone()
    split.set_additional_models("multigpu", [second])
    devices = set()
    for part in (model, second):
        part.model.diffusion_model.register_forward_pre_hook(
            lambda _module, _args, part=part: devices.add(id(part))
        )
    found = sample(seg(split, sigma=1.3, branch=branch), **options)
    assert len(devices) == 2
    assert deviation(found, expected) <= 1e-6
