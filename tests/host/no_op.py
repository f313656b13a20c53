"""Guidance that must move nothing, and what a run is seen to do without being touched."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
from unittest import mock

from family_oracle import guide
from host_models import PACK, sample
from reuse_checks import difference

NOTHING = 1e-6
"""The largest rounding of a float64 network in float32 latents, in standard deviations."""
STEPS = 3
CFG = {7.0: 2, 1.0: 1}
"""How many rows the plain call of one image has."""


def nothing(model, reuse, **widgets):
    """Guide by a perturbation that changes nothing: what is pushed is a fault, times 3."""
    return guide("PAG", model, 3.0, strength=1e-12, reuse=reuse, **widgets)


def hardly(model, **widgets):
    """Guide by a true perturbation that pushes nothing: what moves is the plain prediction."""
    return guide("SEG", model, 1e-9, **widgets)


def pushed(run, model, alone, *, may_refuse=False):
    """Return how far a model's result is from another; 0 for a refusal by name, where it may."""
    try:
        return difference(run(model), alone)
    except Exception as error:
        if may_refuse and refused_by_name(error):
            return 0.0
        raise


def refused_by_name(error):
    """Tell whether an error is a refusal by one of the pack's nodes, under its own name."""
    names = "Smoothed Energy|Perturbed-Attention|Self-Attention|Skip Layer|Token Perturbation"
    return isinstance(error, ValueError) and re.match(f"({names}) Guidance", str(error)) is not None


def refused_or_latents(run, model):
    """Return the latents of a run, or None where a node of the pack refuses by name."""
    try:
        return run(model)
    except ValueError as error:
        if refused_by_name(error):
            return None
        raise


@contextlib.contextmanager
def network_runs(family="unet"):
    """Count true runs of a network, with the rows of each, without touching the network.

    Args:
        family: `unet`, or `flux` without embedded guidance: each embeds the noise levels of all
            its rows once in a run.
    """
    rows = []
    name = {"unet": "modules.diffusionmodules.openaimodel", "flux": "flux.model"}[family]
    host = importlib.import_module(f"comfy.ldm.{name}")
    original = host.timestep_embedding

    def counted(timesteps, *args, **kwargs):
        if family == "flux" or "repeat_only" in kwargs:  # a UNet's sizes are embedded without
            rows.append(len(timesteps))
        return original(timesteps, *args, **kwargs)

    with mock.patch.object(host, "timestep_embedding", counted):
        yield rows


def run(model, cfg=7.0, steps=STEPS, **settings):
    """Return the latents of a UNet, and the rows of each run of the network."""
    with network_runs() as rows:
        return sample(model, cfg=cfg, steps=steps, size=(6, 8), **settings), rows


def warnings_of(caplog):
    """Return the warnings that the pack logged."""
    records = [r for r in caplog.records if r.name.startswith(PACK)]
    return [r.getMessage() for r in records if r.levelno >= logging.WARNING]


def identities(thing):
    """Describe nested containers by their structure and the identity of what they hold."""
    if isinstance(thing, dict):
        return {str(key): identities(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [identities(value) for value in thing]
    return id(thing)
