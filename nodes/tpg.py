"""Token Perturbation Guidance (TPG)."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..seg_core import shuffle_tokens, token_permutation
from . import inputs
from .guidance_node import GuidanceNode
from .host import ChangeTokens


def shuffled(tokens: torch.Tensor, seed: int, step: int, layer: int) -> torch.Tensor:
    """Return the tokens that enter a layer in a random order; see `token_permutation`."""
    return shuffle_tokens(tokens, token_permutation(tokens.shape[1], seed, step, layer))


INPUTS = [
    inputs.MODEL,
    inputs.scale(3.0, "shuffled prediction"),
    *inputs.window(),
    inputs.blocks(
        "Which blocks get their input tokens shuffled.",
        "the encoder of a UNet without its first quarter, as in the released code; a middle range "
        "of a transformer (experimental: the released code has none)",
    ),
    *inputs.extra_prediction(
        "as in the released code.",
        " The tokens are shuffled anew in each step: holding one order is another method.",
    ),
]


class SEGuidanceTPG(GuidanceNode, io.ComfyNode):
    """Guides sampling away from a prediction in which tokens enter selected blocks shuffled."""

    LABEL = "Token Perturbation Guidance"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="SEGuidanceTPG",
            display_name="Token Perturbation Guidance (TPG)",
            category=inputs.CATEGORY,
            description="Improves images with or without a prompt. Each step predicts once more "
            "with the input tokens of selected blocks shuffled and moves away from it.",
            search_aliases=["TokenPerturbationGuidance", "token shuffle", "shuffle tokens"],
            inputs=INPUTS,
            outputs=[inputs.GUIDED],
        )

    @classmethod
    def change(cls, **_: Any) -> ChangeTokens:
        """Return the change of the tokens that enter the selected blocks."""
        return ChangeTokens(shuffled)
