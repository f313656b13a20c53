"""Smoothed Energy Guidance: the node's schema, and from its widgets to a guided model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ..seg_core import (
    AXES,
    KERNELS,
    BlurMatrices,
    TokenGrid,
    blur_queries,
    blur_slopes,
    is_identity,
    mean_queries,
    require_axes,
    require_kernel,
)
from . import inputs
from .host import SmoothQueries, network_of

LABEL = "Smoothed Energy Guidance"


@dataclass(frozen=True)
class QueryBlur:
    """The blur of Smoothed Energy Guidance, as one run of sampling applies it.

    Attributes:
        sigma: blur width in token cells; ``math.inf`` gives every token the mean query.
        kernel: ``"reference"`` or ``"full"``.
        axes: ``"space"``, ``"time"`` or ``"space and time"``.

    Raises:
        ValueError: if the width is negative or NaN, or kernel or axes are unknown.
    """

    sigma: float
    kernel: str
    axes: str = "space"

    def __post_init__(self) -> None:
        require_kernel(self.sigma, self.kernel)
        require_axes(self.axes)

    @property
    def collapses(self) -> bool:
        """True if one query stands for all along the axes."""
        return math.isinf(self.sigma)

    def changes(self, grid: TokenGrid) -> bool:
        """Tell whether the blur changes anything on a grid."""
        return not is_identity(grid, self.sigma, kernel=self.kernel)

    def __call__(
        self, tokens: torch.Tensor, grid: TokenGrid, matrices: BlurMatrices, one_query: bool
    ) -> torch.Tensor:
        """Return the smoothed tokens, or the one that stands for them."""
        if one_query:
            return mean_queries(tokens, grid, axes=self.axes)
        return blur_queries(
            tokens, grid, self.sigma, kernel=self.kernel, matrices=matrices, axes=self.axes
        )

    def slopes(self, grid: TokenGrid) -> torch.Tensor:
        """Return how much of the energy's curvature at each token the blur lets through."""
        return blur_slopes(grid, self.sigma, kernel=self.kernel, axes=self.axes)


class SEGuidance(io.ComfyNode):
    """Guides sampling away from a prediction with smoothed self-attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the inputs; workflows store widgets by position, so new ones go last."""
        return io.Schema(
            node_id="SEGuidance",
            display_name="Smoothed Energy Guidance (SEG)",
            category="model/patch/guidance",
            description=(
                "Makes images more coherent, with or without a prompt. Each step predicts once "
                "more with blurred self-attention and moves away from that prediction."
            ),
            search_aliases=[
                "SEG",
                "smoothed energy guidance",
                "self-attention guidance",
                "perturbed attention guidance",
                "query blur",
                "SEGAttention",
                "SmoothedEnergyGuidanceAdvanced",
            ],
            inputs=_inputs(),
            outputs=[inputs.guided_model()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        scale: float,
        infinite_blur: bool,
        blur_sigma: float,
        start_percent: float,
        end_percent: float,
        blocks: str = "auto",
        kernel: str = "reference",
        axes: str = "space",
        **settings: Any,
    ) -> io.NodeOutput:
        """Return a guided clone of the model; without effect, a plain clone and a warning."""
        blur = QueryBlur(math.inf if infinite_blur else blur_sigma, kernel, axes)
        perturbation = network_of(model, LABEL).perturbation(LABEL, blocks, SmoothQueries(blur))
        window = (scale, start_percent, end_percent)
        return inputs.guided_by(model, perturbation, window, _no_effect(blur), **settings)


def _no_effect(blur: QueryBlur) -> str:
    if blur.sigma == 0:
        return "blur_sigma is 0. Raise it, or turn infinite_blur on."
    if not blur.changes(TokenGrid(1, 64, 64)):
        return (
            f"blur_sigma {blur.sigma:g} is too narrow to reach a neighbouring cell "
            f"with kernel '{blur.kernel}'. Try 1 or more."
        )
    return ""


def _inputs() -> list[io.Input]:
    return [
        inputs.model(),
        inputs.scale(
            3.0,
            "How strongly to move away from the smoothed prediction. The paper fixes it at 3 and "
            "controls quality by the blur.",
        ),
        io.Boolean.Input(
            "infinite_blur",
            default=True,
            tooltip="Every query becomes the mean query: the strongest blur and the cheapest to "
            "compute. Off = use blur_sigma.",
        ),
        io.Float.Input(
            "blur_sigma",
            default=10.0,
            min=0.0,
            max=9999.0,
            step=0.5,
            round=0.001,
            tooltip="Blur width in cells of the attention's token grid (32x32 cells in SDXL's "
            "middle block at 1024x1024), when infinite_blur is off. Try 1, 2, 4, 8, 16. "
            "0 = no blur, so no effect.",
        ),
        *inputs.window(),
        inputs.blocks(
            "Which self-attention blocks to smooth. auto = the middle block of a UNet, a middle "
            "range of a transformer.",
            heads=True,
        ),
        inputs.branch(
            {
                "conditional": "as in the released code.",
                "unconditional": "as in the paper's equation 10.",
                "free": "another method: smooths the unconditional prediction itself, so no extra "
                "pass; it needs cfg above 1, and a lower cfg than usual.",
            }
        ),
        *inputs.rescale(),
        io.Combo.Input(
            "kernel",
            options=list(KERNELS),
            default="reference",
            optional=True,
            advanced=True,
            tooltip="How blur_sigma is applied. reference = as the released code, cut off at the "
            "size of the grid. full = not cut off; grows steadily into infinite_blur. "
            "Without meaning while infinite_blur is on.",
        ),
        inputs.reuse(),
        io.Combo.Input(
            "axes",
            options=list(AXES),
            default="space",
            optional=True,
            advanced=True,
            tooltip="Along what to blur. space = within each frame. time = over the frames of a "
            "video, at each place. space and time = both; with infinite_blur, one query for the "
            "clip. Experimental, for video models.",
        ),
    ]
