"""What reuse keeps, for how long, and where it does without."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import pytest
import torch
from host_models import conditioning, sample, seg, tiny_model
from reuse_checks import (
    MemoryShortage,
    both,
    control_net,
    controlled_pair,
    outcome,
    part,
    require_effect,
    require_equal,
    set_free_memory,
)

CURRENT = pytest.mark.current_only


class Watch:
    """Every tensor that is kept: how many, how large, and which of them still live."""

    def __init__(self):
        kept = part("prefix").Kept
        original = kept.keep
        self.names = []
        self.bytes = 0
        self.alive = []

        def keep(one, name, batch):
            original(one, name, batch)
            tensor = one.tensors[name]
            self.names.append(name)
            self.bytes += tensor.untyped_storage().nbytes()
            self.alive.append(weakref.ref(tensor))

        self.patch = mock.patch.object(kept, "keep", keep)

    def __enter__(self):
        self.patch.start()
        return self

    def __exit__(self, *_error):
        self.patch.stop()

    @property
    def living(self):
        gc.collect()
        return sum(ref() is not None for ref in self.alive)


SKIPS = [4 * 32 * 64, 4 * 32 * 64, 4 * 32 * 16, 4 * 64 * 16]  # bytes of each input block's output


@CURRENT
@pytest.mark.parametrize("cfg", [7.0, 1.0])
@pytest.mark.parametrize(
    ("blocks", "skips", "fork"),
    [("d0", 3, 4 * 64 * 16), ("middle", 4, 4 * 64 * 16), ("u0", 3, 4 * 64 * 16)],
)
def test_only_what_is_replayed_is_kept_and_only_for_the_conds_that_need_it(
    cfg, blocks, skips, fork
):
    with Watch() as watch:
        outcome(seg(tiny_model(), blocks=blocks), cfg=cfg, steps=1)
    assert len(watch.names) == skips + 1
    assert watch.bytes == sum(SKIPS[:skips]) + fork, "no row of the uncond, no part of the batch"


@CURRENT
def test_what_is_kept_is_within_the_bound_that_the_memory_check_adds():
    for kind, blocks in (("sdxl", "middle"), ("sd15", "middle"), ("sd15", "d1"), ("sd15", "u0")):
        with Watch() as watch:
            model = seg(tiny_model(kind), blocks=blocks)
            outcome(model, cfg=1.0, steps=1, size=(16, 16), batch=2)
        network = part("unet").UNet(model.model.diffusion_model)
        assert watch.bytes <= 2 * network.prefix_bytes(model.model, [2, 4, 16, 16])


@CURRENT
@pytest.mark.parametrize("blocks", ["middle", "u1"])
def test_nothing_is_kept_after_a_step(blocks):
    living = []

    def after_step(executor, *args):
        with torch.inference_mode():
            out = executor(*args)
        living.append(watch.living)
        return out

    model = seg(tiny_model(), blocks=blocks)
    patcher_extension = part("sampling").WrappersMP
    # Outside ours: it looks when our step is over.
    model.wrappers[patcher_extension.PREDICT_NOISE] = {
        "test": [after_step],
        **model.wrappers[patcher_extension.PREDICT_NOISE],
    }
    with Watch() as watch:
        sample(model, steps=3)
    assert living == [0, 0, 0]
    assert len(watch.names) >= 9


@CURRENT
def test_nothing_is_kept_outside_the_window_or_when_nothing_needs_it():
    cases = {
        "another part of sampling": (seg(tiny_model(), start=0.2, end=0.3), {"steps": 3}),
        "scale 0": (seg(tiny_model(), scale=0.0), {}),
        "sigma 0": (seg(tiny_model(), sigma=0.0), {}),
        "reuse off": (seg(tiny_model(), reuse=False), {}),
        "free": (seg(tiny_model(), branch="free"), {}),
    }
    for name, (model, settings) in cases.items():
        with Watch() as watch:
            outcome(model, **settings)
        assert not watch.names, name


@CURRENT
def test_steps_outside_the_window_are_the_plain_steps():
    plain = outcome(tiny_model(), steps=6)
    guided = outcome(seg(tiny_model(), start=0.5), steps=6)
    extra = guided.shared
    assert 0 < extra < 6
    assert guided.evaluated["input", 0] == plain.evaluated["input", 0]
    assert guided.evaluated["output", 3] == plain.evaluated["output", 3] + extra


@CURRENT
def test_nothing_is_kept_after_a_run_that_breaks_off():
    model = seg(tiny_model())

    def fail(_module, _args):
        raise RuntimeError("stop")

    handle = model.model.diffusion_model.output_blocks[2][0].register_forward_pre_hook(fail)
    with Watch() as watch, pytest.raises(RuntimeError, match="stop"):
        sample(model, steps=3)
    handle.remove()
    assert watch.names
    assert watch.living == 0


@CURRENT
@pytest.mark.parametrize("blocks", ["middle", "u1"])
def test_no_layer_carries_a_hook_or_another_forward_after_a_run(blocks):
    bare = tiny_model()
    model = seg(bare, blocks=blocks)
    network = model.model.diffusion_model
    sample(bare, steps=1)  # ComfyUI marks the layers that it has loaded

    def state():
        return {
            name: (sorted(vars(module)), len(module._forward_hooks), type(module))
            for name, module in network.named_modules()
        }

    before = state()
    sample(model, steps=2)
    assert state() == before


@CURRENT
@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_where_memory_is_short_the_pass_is_whole_and_the_same(monkeypatch, cfg):
    control, calls = control_net()
    pair = controlled_pair(conditioning(1), conditioning(2), control)
    settings = {"cfg": cfg, "positive": pair[0], "negative": pair[1]}
    with Watch() as watch:
        set_free_memory(monkeypatch, 1e6)
        on, off = both(**settings)
    assert on.shared == 0
    assert on.full == {"memory is short": 3}
    assert not watch.names
    assert on.controls == 0, "what a ControlNet gave is shared all the same: it costs nothing more"
    assert sum(calls) == 3 * (1 + (cfg > 1)) + 3 * (2 + (cfg > 1))
    require_equal(on, off, bitwise=True)
    require_effect(than=on, **settings)


@CURRENT
def test_memory_that_becomes_short_in_mid_run(monkeypatch):
    memory = MemoryShortage(monkeypatch, chunks=1)
    model = memory.reach(seg(tiny_model()))
    whole = outcome(seg(tiny_model(), reuse=False))
    steps = []

    def less_and_less(args):
        steps.append(1)
        if len(steps) == 2:
            set_free_memory(monkeypatch, 1e6)
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(less_and_less)
    result = outcome(model)
    assert result.shared == 2
    assert result.full == {"memory is short": 1}
    require_equal(result, whole)


@CURRENT
def test_a_network_whose_perturbed_layer_is_the_first_of_its_block(monkeypatch):
    monkeypatch.setattr(part("unet_prefix"), "fork_before", lambda *_: None)
    on, off = both()
    assert on.full == {"there is no place before its blocks to begin at": 3}
    require_equal(on, off, bitwise=True)


def test_a_transformer_before_the_first_perturbed_one_is_no_fork():
    prefix = part("unet_prefix")
    network = tiny_model().model.diffusion_model
    res, transformer = network.middle_block[0], network.middle_block[1]
    target = mock.Mock(part="middle", index=0)
    assert prefix.fork_before({"middle": [[transformer]]}, target) is None
    assert prefix.fork_before({"middle": [[res]]}, target) is None
    assert prefix.fork_before({"middle": [[res, transformer]]}, target).layer == 1


def test_a_pass_of_another_shape_or_device_is_not_given_what_was_kept():
    passes, prefix = part("passes"), part("prefix")
    x = torch.zeros(2, 4, 8, 8)
    step = mock.Mock()
    step.run.original_uuid = lambda uuid: uuid
    step.prefix = prefix.Prefix()
    shape = torch.Size([4, 4, 8, 8])
    step.prefix.begin(("a", None), prefix.Kept(slice(2, 4), shape, x.device, ()))
    one = passes.PerturbedPass(step, mock.Mock(reuse=True))
    options = {"uuids": ["a"]}
    assert len(one.find(options, x)) == 1
    for other in (x[:1], x[..., :4], x[:, :3]):
        with pytest.raises(prefix.NotReusable, match="another shape"):
            one.find(options, other)
    with pytest.raises(prefix.NotReusable, match="another device"):
        one.find(options, x.to("meta"))
    with pytest.raises(prefix.NotReusable, match="not evaluated"):
        one.find({"uuids": ["b"]}, x)


def test_a_patch_made_anew_never_passes_for_an_old_one_at_its_address():
    call = part("call")

    def fresh():
        return call.signature({"patches": {"attn2_patch": [lambda q, k, v, _: (q, k, v)]}})

    first = fresh()
    assert all(fresh() != first for _ in range(20))
    steady = {"patches": {"attn2_patch": [print]}, "wrappers": {"diffusion_model": {"a": [len]}}}
    assert call.signature(steady) == call.signature({**steady, "patches": dict(steady["patches"])})


@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_a_comfyui_that_cannot_pass_over_layers(monkeypatch, cfg):
    """So on the floor, and wherever the hook should go again."""
    prefix = part("unet_prefix")
    probe = prefix.layers_can_be_replaced()
    monkeypatch.setattr(prefix, "layers_can_be_replaced", lambda: False)
    on, off = both(cfg=cfg)
    assert on.full == {"this ComfyUI cannot pass over layers (0.17 and newer can)": 3}
    require_equal(on, off, bitwise=True)
    require_effect(than=on, cfg=cfg)
    monkeypatch.undo()
    on, off = both(cfg=cfg)
    assert on.shared == (3 if probe else 0)
    require_equal(on, off, bitwise=cfg == 1.0)


@pytest.mark.parametrize("free", [None, 1e6])
def test_the_log_says_what_was_shared_and_why_the_rest_was_not(monkeypatch, caplog, free):
    if free is not None:
        set_free_memory(monkeypatch, free)
    with caplog.at_level("INFO"):
        result = outcome(seg(tiny_model()))
    (line,) = [m for m in caplog.messages if m.startswith("Smoothed Energy Guidance: ")]
    if not part("unet_prefix").layers_can_be_replaced() and free is None:
        assert "3 because this ComfyUI cannot pass over layers" in line
    elif free is None:
        assert "3 shared, 0 full passes" in line
    else:
        assert "0 shared, 3 full passes (3 because memory is short)" in line
    assert result.shared + sum(result.full.values()) == 3


def test_the_probe_tells_what_this_comfyui_can_do(comfy_host):
    assert part("unet_prefix").layers_can_be_replaced() == (comfy_host.version >= (0, 17))
    assert hasattr(openaimodel, "forward_timestep_embed")
