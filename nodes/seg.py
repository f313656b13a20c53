"""Smoothed Energy Guidance (SEG)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ..seg_core import (
    AXES,
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
from .guidance_node import GuidanceNode
from .host import SmoothQueries


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


INPUTS = [
    inputs.model(),
    inputs.scale(
        3.0, "smoothed prediction", " The paper fixes it at 3 and controls quality with the blur."
    ),
    io.Boolean.Input(
        "infinite_blur",
        default=True,
        tooltip="Replace every query by the mean query: the strongest blur and the cheapest to "
        "compute. Off = use blur_sigma.",
    ),
    inputs.number(
        "blur_sigma",
        10.0,
        "Blur width in cells of the attention's token grid (32x32 in SDXL's middle block at "
        "1024x1024), used while infinite_blur is off. Try 1, 2, 4, 8, 16. 0 = no effect.",
        most=9999.0,
        step=0.5,
    ),
    *inputs.window(),
    inputs.blocks("Which self-attention blocks to smooth.", heads=True),
    inputs.branch("as in the released code.", "as in the paper's equation 10."),
    *inputs.rescale(),
    inputs.kernel(
        "reference = as in the released code, cut off at the size of the grid. full = not cut off, "
        "approaches infinite_blur steadily. Ignored while infinite_blur is on."
    ),
    inputs.reuse(),
    inputs.choice(
        "axes",
        AXES,
        "Which axes to blur along. space = within each frame. time = across the frames of a video, "
        "at each position. space and time = both; with infinite_blur, one query for the whole "
        "clip. Experimental, for video models.",
    ),
]


class SEGuidance(GuidanceNode, io.ComfyNode):
    """Guides sampling away from a prediction with smoothed self-attention."""

    LABEL = "Smoothed Energy Guidance"

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="SEGuidance",
            display_name="Smoothed Energy Guidance (SEG)",
            category=inputs.CATEGORY,
            description="Makes images more coherent, with or without a prompt. Each step predicts "
            "once more with blurred self-attention and moves away from that prediction.",
            search_aliases=[
                "SEG",
                "smoothed energy guidance",
                "self-attention guidance",
                "perturbed attention guidance",
                "query blur",
                "SEGAttention",
                "SmoothedEnergyGuidanceAdvanced",
            ],
            inputs=INPUTS,
            outputs=[inputs.guided_model()],
        )

    @classmethod
    def change(cls, **widgets: Any) -> SmoothQueries:
        """Return the change of the queries in the selected blocks."""
        return SmoothQueries(_blur(**widgets))

    @classmethod
    def no_effect(cls, **widgets: Any) -> str:
        """Return why these widgets have no effect; empty if they have one."""
        blur = _blur(**widgets)
        if blur.sigma == 0:
            return "blur_sigma is 0. Raise it, or turn infinite_blur on."
        if is_identity((64, 64), blur.sigma, kernel=blur.kernel):
            return (
                f"blur_sigma {blur.sigma:g} is too narrow to reach a neighbouring cell "
                f"with kernel '{blur.kernel}'. Try 1 or more."
            )
        return ""


def _blur(*, infinite_blur: bool, blur_sigma: float, kernel: str, axes: str, **_: Any) -> QueryBlur:
    return QueryBlur(math.inf if infinite_blur else blur_sigma, kernel, axes)
