"""Comparing a run that reuses with one that computes everything anew, and what each of them did."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import comfy.controlnet
import comfy.model_management
import torch
from host_models import PACK, part, randomise, sample, seg, shared_model, tiny_controlnet
from host_oracle import deviation, deviation_of_node

# What rounding of float32 may make of three steps at cfg 7, in units of the result's std.
ROUNDING = 1e-5
STEPS = 3


@dataclass
class Outcome:
    """What some runs did by their own reports, and what came of one.

    Attributes:
        shared: perturbed predictions that were made in the plain call of the model.
        full: those that took a pass of their own, by reason.
        latents: of one run.
        evaluated: the rows that each block of a UNet evaluated in it.
    """

    shared: int = 0
    full: Counter = field(default_factory=Counter)
    latents: torch.Tensor | None = None
    evaluated: Counter = field(default_factory=Counter)

    @property
    def reasons(self):
        return set(self.full)

    def because(self, word):
        """Return how many passes were whole for a reason with this word in it."""
        return sum(times for reason, times in self.full.items() if word in reason)


@contextlib.contextmanager
def reported():
    """Count what the runs inside do. Only here do tests know how the engine reports."""
    counts = Outcome()
    report_class = part("host.run.report").Report
    original = report_class.finish

    def finish(self, states):
        for state in states:
            counts.shared += state.joined
            counts.full.update(state.whole)
        original(self, states)

    with mock.patch.object(report_class, "finish", finish):
        yield counts


@contextlib.contextmanager
def evaluated_rows(patcher):
    """Count the rows that the blocks of a network see: name of part and index -> rows."""
    rows, network = Counter(), patcher.model.diffusion_model
    parts = {
        "input": network.input_blocks,
        "middle": [network.middle_block],
        "output": network.output_blocks,
    }

    def counting(name, forward):
        @functools.wraps(forward)
        def counted(x, *args, **kwargs):
            rows.update({name: len(x)})
            return forward(x, *args, **kwargs)

        return counted

    with contextlib.ExitStack() as stack:
        for name, blocks in parts.items():
            for index, (layer, *_) in enumerate(blocks):
                counted = counting((name, index), layer.forward)
                stack.enter_context(mock.patch.object(layer, "forward", counted))
        yield rows


def outcome(model, **settings):
    """Sample from a guided model and return what came of it."""
    torch.manual_seed(11)  # nodes that draw from the global generator draw the same
    with reported() as result, evaluated_rows(model) as result.evaluated:
        result.latents = sample(model, **{"steps": STEPS, **settings})
    return result


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
        assert deviation(on.latents, off.latents) <= ROUNDING


def warned(caplog):
    """Return what the pack has warned of."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith(PACK) and record.levelno >= logging.WARNING
    ]


def set_free_memory(monkeypatch, free):
    """Make ComfyUI believe in so many free bytes."""

    def get_free_memory(_device=None, torch_free_too=False):
        return (free, free) if torch_free_too else free

    monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)


def with_room_for(monkeypatch, conds, model):
    """Return a clone of whose conds so many share a call, by ComfyUI's estimates, and no more."""
    one = 1e13
    set_free_memory(monkeypatch, one * (1.5 * conds + 0.5))
    estimate = lambda shape, cond_shapes=None: shape[0] * one  # noqa: E731
    monkeypatch.setattr(model.model, "memory_required", estimate)
    return model.clone()


def control_net(seed=5):
    """Return a tiny ControlNet, and the list of its evaluations."""
    control, calls = tiny_controlnet(seed=seed), []
    control.control_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(len(kwargs["x"])), with_kwargs=True
    )
    return control, calls


class TinyAdapter(torch.nn.Module):
    """A T2I-Adapter for the tiny networks: features for some input blocks, None for the others."""

    unshuffle_amount = 8

    def __init__(self, middle):
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(192, c, 1) for c in (32, 64))
        self.middle = middle
        randomise(self, 6)

    def forward(self, hint):
        pixels = torch.nn.functional.pixel_unshuffle(hint, 8)
        first, second = (conv(pixels) for conv in self.convs)
        second = torch.nn.functional.avg_pool2d(second, 2, ceil_mode=True)
        # The host takes from the end: conv_in, block, downsampling, block.
        out = {"input": [second, None, first, None]}
        if self.middle:
            out["middle"] = [0.5 * second]
        return out


def adapter(*, middle=False):
    """Return a tiny T2I-Adapter."""
    return comfy.controlnet.T2IAdapter(TinyAdapter(middle=middle), 3, 8, "nearest-exact")
