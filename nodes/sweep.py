"""Comparing settings: the same seed with each of them, in one labelled picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from comfy_api.latest import io, ui

from . import inputs
from .host import branches_of
from .host.show import SAMPLERS, SCHEDULERS, decode, sampled
from .pictures import labelled_grid, to_image, to_pixels
from .sweep_settings import METHODS, SEG, Setting, labels, settings

INPUTS = [
    inputs.MODEL,
    io.Conditioning.Input("positive", tooltip="What to draw."),
    io.Conditioning.Input("negative", tooltip="What to avoid."),
    io.Latent.Input("latent", tooltip="The size of the images, or what to start from."),
    io.Vae.Input("vae", tooltip="Decodes the results."),
    inputs.text(
        "sigmas",
        "off, 1, 4, 16, infinite",
        "Blur widths of SEG to compare, separated by commas: numbers, off, infinite. Several run "
        "from left to right.",
        advanced=False,
    ),
    inputs.text(
        "scales",
        "3",
        "Scales to compare, separated by commas: numbers, off, or default for each method's own. "
        "Several run downwards, or from left to right if there is only one column.",
        advanced=False,
    ),
    io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="The seed of the noise that every image starts from.",
    ),
    io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps for each image."),
    inputs.number(
        "cfg",
        5.0,
        "How closely to follow the prompts. 1 = the positive prompt alone.",
        most=100.0,
        step=0.1,
    ),
    io.Combo.Input("sampler_name", options=list(SAMPLERS), default="euler", tooltip="The sampler."),
    io.Combo.Input(
        "scheduler",
        options=list(SCHEDULERS),
        default="normal",
        tooltip="How the noise level falls from step to step.",
    ),
    inputs.number(
        "denoise", 1.0, "How much of the latent to replace. 1 = all of it.", advanced=True
    ),
    inputs.text(
        "blocks",
        "auto",
        "Block selections to compare, separated by semicolons, each as in Smoothed Energy "
        "Guidance: auto; middle; u0, u1.",
    ),
    inputs.text(
        "methods",
        SEG,
        f"Methods to compare, separated by commas: {', '.join(METHODS)}. Sigmas apply to SEG; the "
        "others use their nodes' defaults. Set scales to default for each method's own scale.",
    ),
]


class SEGuidanceSweep(io.ComfyNode):
    """Samples once for each setting and shows the results side by side."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="SEGuidanceSweep",
            display_name="SEG Compare",
            category=inputs.CATEGORY,
            description="Makes one labelled picture from the same seed with several settings of "
            "Smoothed Energy Guidance, or with related methods, to choose by eye. A list with more "
            "than one entry is an axis.",
            search_aliases=["SEG XY plot", "compare guidance", "sigma grid", "parameter sweep"],
            inputs=INPUTS,
            outputs=[
                io.Image.Output(
                    "grid", tooltip="The labelled grid, one for each image of a batch."
                ),
                io.Image.Output("images", tooltip="Its images without labels, row by row."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        sigmas: str,
        scales: str,
        blocks: str = "auto",
        methods: str = SEG,
        **sampling: Any,
    ) -> io.NodeOutput:
        """Return the labelled picture, and its images; `sampling` goes to the sampler.

        Raises:
            ValueError: if an entry is wrong, or the model is guided already or cannot be so.
        """
        listed = settings(sigmas, scales, blocks, methods)
        rows = [[None if setting.is_off else setting for setting in row] for row in listed]
        models = _guided(model, itertools.chain(*rows))
        node_id = getattr(cls.hidden, "unique_id", None)
        latents = sampled(list(models.values()), node_id, **sampling)
        images = {one: decode(vae, made).cpu() for one, made in zip(models, latents, strict=True)}
        found = [[images[one] for one in row] for row in rows]
        grid = _grid(found, *labels(listed))
        together = torch.cat(list(itertools.chain(*found)))
        return io.NodeOutput(grid, together, ui=ui.PreviewImage(grid, cls=cls))


def _guided(model: Any, listed: Iterable[Setting | None]) -> dict[Setting | None, Any]:
    """Return the model of each setting, once; those without guidance share the model itself.

    All are made before the first image, so that a wrong entry costs no time.
    """
    already = [branch.perturbation.label for branch in branches_of(model.model_options)]
    if already:
        raise ValueError(
            f"SEG Compare applies guidance itself, but this model is already guided by "
            f"{', '.join(already)}. Connect the model from before that node."
        )
    return {one: one.guided(model) if one else model for one in dict.fromkeys(listed)}


def _grid(rows: list[list[torch.Tensor]], across: list[str], down: list[str]) -> torch.Tensor:
    """Return one labelled picture for each image of the batch."""
    count = min(len(images) for row in rows for images in row)
    sheets = [
        labelled_grid([[to_image(images[n]) for images in row] for row in rows], across, down)
        for n in range(count)
    ]
    return torch.stack([to_pixels(sheet) for sheet in sheets])
