"""Token Perturbation Guidance (TPG): the node's schema, and from its widgets to a guided model."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..seg_core import shuffle_tokens, token_permutation
from . import inputs
from .host import ChangeTokens, network_of

LABEL = "Token Perturbation Guidance"


def shuffled(tokens: torch.Tensor, seed: int, step: int, layer: int) -> torch.Tensor:
    """Return the tokens that enter a layer in a random order; see `token_permutation`."""
    return shuffle_tokens(tokens, token_permutation(tokens.shape[1], seed, step, layer))


class SEGuidanceTPG(io.ComfyNode):
    """Guides sampling away from a prediction in which tokens enter chosen blocks shuffled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the inputs; workflows store widgets by position, so new ones go last."""
        return io.Schema(
            node_id="SEGuidanceTPG",
            display_name="Token Perturbation Guidance (TPG)",
            category="model/patch/guidance",
            description=(
                "Improves images with or without a prompt. Each step predicts once more with the "
                "tokens that enter chosen blocks shuffled and moves away from that prediction."
            ),
            search_aliases=[
                "TPG",
                "token perturbation guidance",
                "TokenPerturbationGuidance",
                "token shuffle",
                "shuffle tokens",
            ],
            inputs=inputs.perturbing(
                "shuffled prediction",
                inputs.blocks(
                    "Which blocks the tokens enter shuffled. auto = the encoder of a UNet without "
                    "its first quarter, as in the paper; a middle range of a transformer "
                    "(experimental)."
                ),
                does="shuffles",
            ),
            outputs=[inputs.guided_model()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        scale: float,
        start_percent: float,
        end_percent: float,
        blocks: str = "auto",
        **settings: Any,
    ) -> io.NodeOutput:
        """Return a guided clone of the model; without effect, a plain clone and a warning."""
        perturbation = network_of(model, LABEL).perturbation(LABEL, blocks, ChangeTokens(shuffled))
        window = (scale, start_percent, end_percent)
        return inputs.guided_by(model, perturbation, window, **settings)
