"""Nodes of other packs that ComfyUI offers to replace by ours while their pack is missing.

Nodes of ComfyUI itself are not listed: they are never missing, so nothing would be offered.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from comfy_api.latest import ComfyAPI, io

WIDGETS = ("unet_block", "unet_block_id", "sigma_start", "sigma_end", "rescale", "rescale_mode")


class Offer(io.NodeReplace):
    """A replacement that a person may choose, and that is never made unasked.

    From the attributes of a registered replacement the server rewrites queued prompts, but only if
    the new node exists; from `as_dict` the frontend learns what to offer. So only the latter
    names the node.

    Args:
        old: the missing node.
        new: our node.
        widgets: all widgets of the missing node, in order.
        carried: old names of the inputs that keep their values, with our names for them.
        fixed: values of further inputs of ours.
    """

    def __init__(
        self, old: str, new: str, widgets: list[str], carried: dict[str, str], **fixed: Any
    ) -> None:
        self.offered = new
        super().__init__(
            new_node_id="",
            old_node_id=old,
            old_widget_ids=widgets,
            input_mapping=[
                *({"new_id": ours, "old_id": theirs} for theirs, ours in carried.items()),
                *({"new_id": ours, "set_value": value} for ours, value in fixed.items()),
            ],
            output_mapping=[{"new_idx": 0, "old_idx": 0}],
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what the frontend is told."""
        return {**super().as_dict(), "new_node_id": self.offered}


SAME = {name: name for name in ("model", "scale", "rescale", "rescale_mode")}
OFFERS = [
    Offer(
        "SEGAttention",
        "SEGuidance",
        ["scale", "blur", "inf_blur"],
        {"model": "model", "scale": "scale", "blur": "blur_sigma", "inf_blur": "infinite_blur"},
    ),
    Offer(
        "SmoothedEnergyGuidanceAdvanced",
        "SEGuidance",
        ["scale", "blur_sigma", *WIDGETS],
        {**SAME, "blur_sigma": "blur_sigma"},
        infinite_blur=True,
    ),
    Offer("PerturbedAttention", "SEGuidancePAG", ["scale", "adaptive_scale", *WIDGETS], SAME),
]


async def offer_replacements() -> None:
    """Tell the server what to offer; a program that uses ComfyUI without its server has none."""
    with suppress(ImportError, AttributeError):
        for each in OFFERS:
            await ComfyAPI().node_replacement.register(each)
