"""Which kind of network a model is, and what can be perturbed in it."""

from __future__ import annotations

from typing import Any

from .dit import DiT
from .unet import UNet

_ISSUES = "https://github.com/seg-guidance/smoothed-energy-guidance/issues"


def network_of(model: Any) -> UNet | DiT:
    """Return the guidance view of a model's network.

    Args:
        model: a `ModelPatcher` of the host.

    Raises:
        ValueError: if no self-attention of the network can be reached; names the network.
    """
    network = model.get_model_object("diffusion_model")
    if UNet.is_one(network):
        return UNet(network)
    transformer = DiT.of(network)
    if transformer is not None:
        return transformer
    raise ValueError(
        f"Smoothed Energy Guidance does not know the network {type(network).__name__} "
        f"({type(network).__module__}) of this {type(model.model).__name__} model. To ask for it, "
        f"report these names and your ComfyUI version at {_ISSUES}."
    )
