"""Which kind of network a model is, and what can be perturbed in it."""

from __future__ import annotations

from typing import Any

from ..calls.compiled import eager
from .dit.dit import DiT
from .unet.unet import UNet
from .view import View

_ISSUES = "https://github.com/seg-guidance/smoothed-energy-guidance/issues"


def view_of(network: Any, model: Any) -> View | None:
    """Return the guidance view of a model's network, compiled or not; None if of no known kind.

    Raises:
        ValueError: if its family is known to be out of reach; says why.
    """
    network = eager(network)
    return UNet(network) if UNet.is_one(network) else DiT.of(network, model)


def network_of(model: Any, label: str) -> View:
    """Return the guidance view of a model's network.

    Args:
        model: a `ModelPatcher` of the host.
        label: which guidance asks, for the message.

    Raises:
        ValueError: if no self-attention of the network can be reached; names the network.
    """
    network = model.get_model_object("diffusion_model")
    view = view_of(network, model.model)
    if view is not None:
        return view
    raise ValueError(
        f"{label} does not know the network {type(network).__name__} "
        f"({type(network).__module__}) of this {type(model.model).__name__} model. To ask for it, "
        f"report these names and your ComfyUI version at {_ISSUES}."
    )
