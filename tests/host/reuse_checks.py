"""Comparing a run that reuses with one that computes everything anew, and what each of them did."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.samplers
import torch
from host_models import (
    COMMON,
    PACK,
    SDXL,
    noise_like,
    randomise,
    sample,
    seg,
    shared_model,
    tiny_model,
)
from host_oracle import deviation_of_node

# What rounding of float32 may make of three steps at cfg 7, in units of the result's std.
ROUNDING = 1e-5
STEPS = 3


def part(name):
    """Return a module of the pack's host side."""
    return importlib.import_module(f"{PACK}.nodes.host.{name}")


@dataclass
class Counts:
    """What some runs did, by their own reports.

    Attributes:
        shared: perturbed predictions that were made in the plain call of the model.
        full: those that took a pass of their own, by reason.
        controls: ControlNets that were evaluated for them.
    """

    shared: int = 0
    full: Counter = field(default_factory=Counter)
    controls: int = 0

    @property
    def reasons(self):
        return set(self.full)

    def because(self, word):
        """Return how many passes were whole for a reason with this word in it."""
        return sum(times for reason, times in self.full.items() if word in reason)


@dataclass
class Outcome(Counts):
    """The same of one run, its latents, and the rows that each block of a UNet evaluated."""

    latents: torch.Tensor | None = None
    evaluated: Counter = field(default_factory=Counter)


@contextlib.contextmanager
def reported(counts=None):
    """Count what the runs inside do. Only here do tests know how the engine reports."""
    counts = Counts() if counts is None else counts
    report_class = part("run.report").Report
    original = report_class.finish

    def finish(self, states):
        counts.controls += self.controls_evaluated
        for state in states:
            counts.shared += state.joined
            counts.full.update(state.whole)
        original(self, states)

    with mock.patch.object(report_class, "finish", finish):
        yield counts


@contextlib.contextmanager
def evaluated_rows(patcher):
    """Count the rows that the blocks of a network see: name of part and index -> rows."""
    rows = Counter()
    network = patcher.model.diffusion_model

    def counter(name):
        return lambda _layer, args, _out: rows.update({name: len(args[0])})

    handles = []
    for name in ("input_blocks", "middle_block", "output_blocks"):
        blocks = getattr(network, name)
        for index, block in enumerate([blocks] if name == "middle_block" else blocks):
            key = (name.removesuffix("_blocks").removesuffix("_block"), index)
            handles.append(block[0].register_forward_hook(counter(key)))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def outcome(model, **settings):
    """Sample from a guided model and return what came of it."""
    torch.manual_seed(11)  # nodes that draw from the global generator draw the same
    result = Outcome()
    with reported(result), evaluated_rows(model) as result.evaluated:
        result.latents = sample(model, **{"steps": STEPS, **settings})
    return result


def sampled_by(guider, model, *, steps=3):
    """Return the latents that a guider samples."""
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    latent = torch.zeros(1, 4, 8, 8)
    with torch.inference_mode():
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise_like(latent.shape), latent, sampler, sigmas)


def difference(a, b):
    """Return the largest difference in units of the second's standard deviation."""
    return float((a - b).abs().max() / b.std())


def exact_model(kind="sdxl", **options):
    """Return a tiny model in float64, in which a batch's size does not show in float32 latents."""
    return tiny_model(kind, dtype=torch.float64, **options)


def both(build=shared_model, *, guided=seg, around=lambda model: model, options=None, **settings):
    """Return the outcomes with reuse on and off.

    Args:
        build: makes the unguided model; called for each run.
        guided: applies the node(s); takes the model and `reuse`.
        around: applied to the guided model, for nodes that stand behind ours.
        options: further widgets of the node.
        settings: how to sample; a function is called for each run.
    """
    results = []
    for reuse in (True, False):
        model = around(guided(build(), reuse=reuse, **(options or {})))
        own = {k: v() if inspect.isfunction(v) else v for k, v in settings.items()}
        results.append(outcome(model, **own))
    return results


def require_reference(model=None, *, reuse=True, **options):
    """Require that the node gives what the dense reference gives, and in the way it says.

    Args:
        model: the unguided model; the tiny SDXL if None.
        reuse: in the plain call of the model; else in whole passes.
        options: of `deviation_of_node`.
    """
    options = {"sigma": 1.3, "size": (8, 12)} | options
    node = {"reuse": reuse} | options.pop("node", {})
    with reported() as counts:
        found = deviation_of_node(model or shared_model(), node=node, **options)
    assert found <= 1e-6, found
    if reuse:
        assert not counts.full, counts.full
        assert counts.shared > 0
    else:
        assert counts.shared == 0
        assert counts.because("reuse is off") == counts.full.total() > 0


def require_equal(on, off, *, bitwise=False):
    """Require that one call and whole passes give the same latents."""
    assert torch.isfinite(off.latents).all()
    assert off.latents.std() > 0
    if bitwise:
        assert torch.equal(on.latents, off.latents)
    else:
        assert difference(on.latents, off.latents) <= ROUNDING


def require_shared(on, off, *, passes=None):
    """Require that one run shared each pass and the other none."""
    assert not on.full, on.full
    assert on.shared > 0
    if passes is not None:
        assert on.shared == passes
    assert off.shared == 0
    assert off.reasons == {"reuse is off"}


def warned(caplog):
    """Return what the pack has warned of."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith(PACK) and record.levelno >= logging.WARNING
    ]


def core_node(module, name, model, **widgets):
    """Apply a node that ComfyUI ships and return its model."""
    node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    return node.execute(model, **widgets)[0]


def set_free_memory(monkeypatch, free):
    """Make ComfyUI believe in so many free bytes."""

    def get_free_memory(_device=None, torch_free_too=False):
        return (free, free) if torch_free_too else free

    monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)


class MemoryShortage:
    """Memory in which a given number of samples fit, as ComfyUI's estimates see it."""

    SAMPLE = 1e13

    def __init__(self, monkeypatch, *, chunks):
        """Let `chunks` conds of a batch of one share a call, and no more."""
        free = self.SAMPLE * (1.5 * chunks + 0.5)
        set_free_memory(monkeypatch, free)
        self._monkeypatch = monkeypatch

    def reach(self, patcher):
        """Return the patcher, its model now as large as that."""
        estimate = lambda shape, cond_shapes=None: shape[0] * self.SAMPLE  # noqa: E731
        self._monkeypatch.setattr(patcher.model, "memory_required", estimate)
        return patcher


def control_net(kind="sdxl", seed=5, **changes):
    """Return a tiny ControlNet of ComfyUI's true class, and the list of its evaluations."""
    unet = dict(SDXL if kind == "sdxl" else COMMON)
    for name in ("out_channels", "transformer_depth_output"):
        unet.pop(name)
    network = comfy.cldm.cldm.ControlNet(hint_channels=3, **unet | changes)
    randomise(network, seed)
    calls = []
    network.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(len(kwargs["x"])), with_kwargs=True
    )
    device = comfy.model_management.get_torch_device()
    return comfy.controlnet.ControlNet(network, load_device=device), calls


class TinyAdapter(torch.nn.Module):
    """A T2I-Adapter for the tiny networks: features for some input blocks, None for the others."""

    unshuffle_amount = 8

    def __init__(self, channels=(32, 64), middle=False):
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(192, c, 1) for c in channels)
        self.middle = middle
        self.calls = []
        randomise(self, 6)

    def forward(self, hint):
        self.calls.append(len(hint))
        pixels = torch.nn.functional.pixel_unshuffle(hint, 8)
        first, second = (conv(pixels) for conv in self.convs)
        second = torch.nn.functional.avg_pool2d(second, 2, ceil_mode=True)
        # The host takes from the end: conv_in, block, downsampling, block.
        out = {"input": [second, None, first, None]}
        if self.middle:
            out["middle"] = [0.5 * second]
        return out


def adapter(*, middle=False):
    """Return a tiny T2I-Adapter and the list of its evaluations."""
    network = TinyAdapter(middle=middle)
    return comfy.controlnet.T2IAdapter(network, 3, 8, "nearest-exact"), network.calls


def controlled(conditioning, control, *, strength=0.8, percent=(0.0, 1.0), size=(8, 8), **extra):
    """Return a CONDITIONING with one more ControlNet on each of its conds."""
    image = noise_like((1, 3, size[0] * 8, size[1] * 8), seed=77).sigmoid()
    out = []
    for embedding, values in conditioning:
        applied = control.copy().set_cond_hint(image, strength, percent)
        for name, value in extra.items():
            setattr(applied, name, value)
        if values.get("control") is not None:
            applied.set_previous_controlnet(values["control"])
        out.append([embedding, {**values, "control": applied, "control_apply_to_uncond": False}])
    return out


def controlled_pair(positive, negative, control, **settings):
    """Return both conditionings under one and the same ControlNet object, as the node makes."""
    (with_control,) = controlled(positive[:1], control, **settings)
    shared = with_control[1]["control"]
    return tuple(
        [[e, {**v, "control": shared, "control_apply_to_uncond": False}] for e, v in conds]
        for conds in (positive, negative)
    )
