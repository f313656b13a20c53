"""Which kind of network a model is, and what can be perturbed in it."""

from __future__ import annotations

from typing import Any

from ..batch.compiled import eager
from ..settings.errors import HOW_TO_REPORT, GuidanceError
from .adapter import NetworkAdapter
from .dit.dit import DiT
from .unet import UNet


def adapter_of(network: Any, model: Any) -> NetworkAdapter | None:
    """Return the adapter of a model's network, compiled or not; None if of no known kind.

    Raises:
        GuidanceError: if its family is known to be out of reach; says why.
    """
    network = eager(network)
    return UNet(network) if UNet.is_one(network) else DiT.of(network, model)


def network_of(model: Any, label: str) -> NetworkAdapter:
    """Return the adapter of a model's network.

    Args:
        model: a `ModelPatcher` of the host.
        label: which guidance asks, for the message.

    Raises:
        GuidanceError: if no self-attention of the network can be reached; names the network.
    """
    network = model.get_model_object("diffusion_model")
    adapter = adapter_of(network, model.model)
    if adapter is not None:
        return adapter
    raise GuidanceError(
        f"{label} does not know the network {type(network).__name__} "
        f"({type(network).__module__}) of this {type(model.model).__name__} model. If another "
        "node's loader put it in the place of ComfyUI's own, use ComfyUI's loader. To ask for it, "
        f"{HOW_TO_REPORT}."
    )
