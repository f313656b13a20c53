"""Guidance that must move nothing, and what a run is seen to do without being touched."""

from __future__ import annotations

import contextlib
import importlib
import re
from unittest import mock

from dit_models import sampled
from family_oracle import guide

NOTHING = 1e-6
"""The largest rounding of a float64 network in float32 latents, in standard deviations."""
ACTS = 1e-3
"""What guidance, or another node, must move at least to be seen to act."""
STEPS = 3
CFG = {7.0: 2, 1.0: 1}
"""How many rows the plain call of one image has."""


def nothing(model, reuse=True, **widgets):
    """Guide by a perturbation that changes nothing: what is pushed is a fault, times 3."""
    return guide("PAG", model, **{"scale": 3.0, "strength": 1e-12, "reuse": reuse, **widgets})


def hardly(model, **widgets):
    """Guide by a true perturbation that pushes nothing: what moves is the plain prediction."""
    return guide("SEG", model, 1e-9, **widgets)


def refused_or_latents(run, model):
    """Return the latents of a run, or None where a node of the pack refuses by its own name."""
    try:
        return run(model)
    except ValueError as error:
        names = "Smoothed Energy|Perturbed-Attention|Self-Attention|Skip Layer|Token Perturbation"
        if re.match(f"({names}) Guidance", str(error)):
            return None
        raise


@contextlib.contextmanager
def network_runs(kind="sdxl"):
    """Count true runs of a network, with the rows of each, without touching the network.

    Args:
        kind: `sdxl`, or `flux` without embedded guidance: each embeds the noise levels of all its
            rows once in a run.
    """
    rows = []
    name = {"sdxl": "modules.diffusionmodules.openaimodel", "flux": "flux.model"}[kind]
    host = importlib.import_module(f"comfy.ldm.{name}")
    original = host.timestep_embedding

    def counted(timesteps, *args, **kwargs):
        if kind == "flux" or "repeat_only" in kwargs:  # a UNet's sizes are embedded without
            rows.append(len(timesteps))
        return original(timesteps, *args, **kwargs)

    with mock.patch.object(host, "timestep_embedding", counted):
        yield rows


def run(model, cfg=7.0, steps=STEPS, kind="sdxl", **settings):
    """Return the latents of an SDXL or a Flux, and the rows of each run of the network."""
    with network_runs(kind) as rows:
        latents = sampled(model, kind, cfg=cfg, steps=steps, **settings)
    return latents, rows


MODEL_PARTS = (
    "model_options", "wrappers", "callbacks", "patches", "object_patches", "attachments",
    "additional_models", "injections", "hook_patches", "forced_hooks",
)  # fmt: skip


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


def network_state(model):
    """Describe what a call might leave on each module: attributes, hooks, another class."""
    return {
        name: (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), type(m))
        for name, m in model.model.diffusion_model.named_modules()
    }


def state(model):
    """Describe all that a run might leave: on the patcher, in weights, on each module."""
    parts = [fingerprint(getattr(model, name)) for name in MODEL_PARTS if hasattr(model, name)]
    weights = {k: float(v.double().sum()) for k, v in model.model.state_dict().items()}
    return parts, weights, network_state(model)
