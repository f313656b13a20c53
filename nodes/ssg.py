"""Self-Swap Guidance (SSG)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy_api.latest import io

from ..seg_core import swap_least_similar
from . import inputs
from .guidance_node import GuidanceNode
from .host import ChangeTokens, GuidanceError


def swapped(
    tokens: torch.Tensor, seed: int, step: int, layer: int, *, ratio: float
) -> torch.Tensor:
    """Return the tokens that enter a layer, the least similar in each other's places.

    Raises:
        GuidanceError: if the ratio is not even one pair, of tokens or of channels.
    """
    del seed, step, layer
    _, count, channels = tokens.shape
    if ratio * max(count, channels) < 1:
        raise GuidanceError(
            f"{SEGuidanceSSG.LABEL}: ratio {ratio:g} of {count} tokens and {channels} channels is "
            f"not one pair, so nothing would be swapped. Raise ratio to at least "
            f"1/{max(count, channels)}."
        )
    return swap_least_similar(tokens, ratio)


INPUTS = [
    inputs.MODEL,
    inputs.scale(3.0, "prediction with swapped tokens"),
    *inputs.window(),
    inputs.blocks(
        "Which blocks get the least similar of their input tokens swapped.",
        "the first six layers of SDXL's decoder and the middle block of other UNets, as in the "
        "released code; a middle range of a transformer (experimental)",
    ),
    inputs.number(
        "ratio",
        0.1,
        "How many pairs to swap, as a fraction of the tokens and of the channels. 0.1 as in the "
        "paper. 0 = no effect.",
        step=0.05,
        advanced=True,
    ),
    *inputs.extra_prediction("as in the released code."),
]


class SEGuidanceSSG(GuidanceNode, io.ComfyNode):
    """Guides sampling away from a prediction in which the least similar tokens are swapped."""

    LABEL = "Self-Swap Guidance"
    NEUTRAL = "ratio"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="SEGuidanceSSG",
            display_name="Self-Swap Guidance (SSG)",
            category=inputs.CATEGORY,
            description="Improves images with or without a prompt. Each step predicts once more "
            "with the least similar tokens and channels of selected blocks swapped and moves away "
            "from it.",
            search_aliases=["SSG", "self-swap guidance", "token swap", "swap tokens"],
            inputs=INPUTS,
            outputs=[inputs.GUIDED],
        )

    @classmethod
    def change(cls, *, ratio: float, **_: Any) -> ChangeTokens:
        """Return the change of the tokens that enter the selected blocks."""
        return ChangeTokens(partial(swapped, ratio=ratio), auto="swap")
