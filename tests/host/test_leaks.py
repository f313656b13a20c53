"""Nothing is left behind: on the model, after an error, in memory, between threads."""

from __future__ import annotations

import gc
import threading

import comfy.model_management
import pytest
import torch
from host_models import sample, seg, shared_model, tiny_model
from host_oracle import deviation

SIZE = (6, 8)


def fingerprint(thing, seen=()):
    """Describe nested dictionaries and lists by structure and the identity of what they hold."""
    if id(thing) in seen:
        return "again"
    seen = (*seen, id(thing))
    if isinstance(thing, dict):
        return {str(key): fingerprint(value, seen) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [fingerprint(value, seen) for value in thing]
    return id(thing)


def state(model):
    parts = ("model_options", "wrappers", "callbacks", "patches", "object_patches", "attachments",
             "additional_models", "injections", "hook_patches", "forced_hooks")  # fmt: skip
    described = {name: fingerprint(getattr(model, name)) for name in parts if hasattr(model, name)}
    weights = model.model.state_dict()
    network = model.model.diffusion_model
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for m in network.modules()
    ]
    return described, {k: float(v.double().sum()) for k, v in weights.items()}, hooks


SETTINGS = [{}, {"sigma": 1.3}, {"branch": "free"}, {"branch": "unconditional"}, {"scale": 0.0},
            {"start": 0.4}, {"reuse": False}]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_model_that_came_in_is_unchanged(settings):
    model = tiny_model("sdxl")
    before = state(model)
    guided = seg(model, **settings)
    assert state(model) == before
    patched = state(guided)
    sample(guided, size=SIZE)
    assert state(model) == before
    assert state(guided) == patched
    assert torch.equal(sample(model, size=SIZE), sample(tiny_model("sdxl"), size=SIZE))


def test_nothing_of_a_run_is_kept_on_the_model_s_options():
    guided = seg(shared_model())
    keys = set(guided.model_options["transformer_options"])
    sample(guided, size=SIZE)
    assert set(guided.model_options["transformer_options"]) == keys


class Broken(RuntimeError):
    """Planted."""


def fail_at(model, call, error=Broken):
    """Raise in the middle of the network in its n-th evaluation."""
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == call:
            raise error

    return model.model.diffusion_model.output_blocks[0][0].register_forward_pre_hook(fail)


INTERRUPTED = comfy.model_management.InterruptProcessingException


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(
    ("call", "error"),
    [(1, Broken), (2, Broken), (1, INTERRUPTED), (2, INTERRUPTED), (2, torch.OutOfMemoryError)],
)
def test_error_in_mid_run_leaves_the_next_run_as_a_fresh_one(call, error, reuse):
    model = tiny_model("sdxl")
    guided = seg(model, sigma=1.3, reuse=reuse)
    before = state(guided)
    expected = sample(guided, size=SIZE)
    handle = fail_at(model, call, error)
    with pytest.raises(error):
        sample(guided, size=SIZE)
    handle.remove()
    assert state(guided) == before
    assert torch.equal(sample(guided, size=SIZE), expected)
    assert torch.equal(sample(model, size=SIZE), sample(tiny_model("sdxl"), size=SIZE))


def test_user_s_interruption_leaves_the_next_run_as_a_fresh_one():
    model = tiny_model("sdxl")
    guided = seg(model)
    expected = sample(guided, size=SIZE, steps=3)

    def interrupt(step, denoised, x, total):
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(guided, size=SIZE, steps=3, callback=interrupt)
    assert torch.equal(sample(guided, size=SIZE, steps=3), expected)


def test_error_of_another_node_s_hook_leaves_the_next_run_as_a_fresh_one():
    model = tiny_model("sdxl")
    guided = seg(model)
    expected = sample(guided, size=SIZE)
    broken = guided.clone()

    def fail(args):
        raise Broken

    broken.set_model_sampler_post_cfg_function(fail)
    with pytest.raises(Broken):
        sample(broken, size=SIZE)
    assert torch.equal(sample(guided, size=SIZE), expected)


def live_tensors():
    gc.collect()
    return sum(1 for thing in gc.get_objects() if isinstance(thing, torch.Tensor))


def growth(model, runs):
    """Return by how many objects, and how many tensors, some runs let memory grow."""
    for _ in range(3):
        sample(model, size=(4, 4), steps=1)
    gc.collect()
    gc.freeze()  # what is alive by now is neither counted nor looked at again
    tensors, objects = live_tensors(), len(gc.get_objects())
    for _ in range(runs):
        sample(model, size=(4, 4), steps=1)
    return len(gc.get_objects()) - objects, live_tensors() - tensors


@pytest.mark.filterwarnings("ignore")  # asking every live object for its type wakes deprecations
@pytest.mark.parametrize("settings", [{}, {"sigma": 1.3, "reuse": False}], ids=str)
def test_fifty_runs_do_not_grow_memory(settings):
    model = tiny_model("sd15")
    # The host itself keeps a few objects for each run of any clone.
    hosts_own, _ = growth(model.clone(), 10)
    objects, tensors = growth(seg(model, **settings), 50)
    assert tensors <= 0
    assert objects <= 5 * hosts_own + 25


@pytest.mark.filterwarnings("ignore")
def test_failed_runs_keep_no_tensor_alive():
    model = tiny_model("sd15")
    guided = seg(model)
    sample(guided, size=SIZE)

    def failed_run():
        handle = fail_at(model, 2)
        try:
            sample(guided, size=SIZE)
        except Broken:
            pass
        finally:
            handle.remove()

    failed_run()
    before = live_tensors()
    for _ in range(5):
        failed_run()
    assert live_tensors() <= before


def test_two_threads_with_clones_give_what_they_give_one_after_the_other():
    settings = [{"sigma": 1.3}, {"blocks": "u0", "scale": 2.0}]
    first = tiny_model("sdxl")
    guided = [seg(first, **settings[0]), seg(tiny_model("sdxl"), **settings[1])]
    expected = [sample(model, size=SIZE, steps=4, seed=i) for i, model in enumerate(guided)]
    found = [None, None]
    start = threading.Barrier(2)

    def work(i):
        start.wait()
        for _ in range(3):
            found[i] = sample(guided[i], size=SIZE, steps=4, seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        assert deviation(ours, theirs) <= 1e-6


def test_one_guidance_object_serves_two_threads_at_once():
    """Clones share the branch, so nothing of a run may lie on it."""
    one, two = tiny_model("sdxl"), tiny_model("sdxl")
    guided = seg(one, sigma=1.3)
    hooks = guided.model_options["sampler_post_cfg_function"]
    other = seg(two, sigma=1.3)
    other.model_options["sampler_post_cfg_function"] = list(hooks)
    runs = [(guided, (6, 8)), (other, (10, 4))]
    expected = [sample(model, size=size, steps=4) for model, size in runs]
    found = [None, None]

    def work(i):
        found[i] = sample(runs[i][0], size=runs[i][1], steps=4)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        assert deviation(ours, theirs) <= 1e-6


@pytest.mark.current_only
def test_work_split_over_two_devices_gives_what_one_device_gives():
    """The host splits the conds over clones on two devices; here both are the same processor."""
    options = {"size": SIZE, "steps": 2, "cfg": 4.0}
    for settings in ({"sigma": 1.3}, {"branch": "unconditional"}, {"branch": "free"}):
        model = tiny_model("sdxl", dtype=torch.float64)
        expected = sample(seg(model, **settings), **options)
        model.cached_patcher_init = (lambda: tiny_model("sdxl", dtype=torch.float64), ())
        second = model.deepclone_multigpu(torch.device("cpu", 0))
        second.is_multigpu_base_clone = True
        split = model.clone()
        split.set_additional_models("multigpu", [second])
        devices = set()
        for part in (model, second):
            part.model.diffusion_model.register_forward_pre_hook(
                lambda _module, _args, part=part, devices=devices: devices.add(id(part))
            )
        found = sample(seg(split, **settings), **options)
        assert len(devices) == 2
        assert deviation(found, expected) <= 1e-6
