"""Comparing settings: the same seed with each of them, in one labelled picture."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io, ui

from . import inputs
from .host import branches_of
from .host.show.progress import Bar, tell_node
from .host.show.render import SAMPLERS, SCHEDULERS, Sampling, decode
from .pag import SEGuidancePAG
from .pictures import labelled_grid, to_image, to_pixels
from .sag import SEGuidanceSAG
from .seg import SEGuidance
from .slg import SEGuidanceSLG
from .tpg import SEGuidanceTPG

log = logging.getLogger(__name__)

OFF = 0.0
OWN = math.nan
MOST = 64
WIDTHS = {"off": OFF, "infinite": math.inf, "inf": math.inf}
SCALES = {"off": OFF, "default": OWN}
SEG = "SEG"
METHODS: dict[str, Any] = {
    SEG: SEGuidance,
    "PAG": SEGuidancePAG,
    "SAG": SEGuidanceSAG,
    "TPG": SEGuidanceTPG,
    "SLG": SEGuidanceSLG,
}


@dataclass(frozen=True)
class Setting:
    """One picture of the comparison.

    Attributes:
        sigma: width of the blur; of no meaning to other methods than SEG.
        scale: weight; `OWN` for the method's default.
        blocks: the selector.
        method: one of `METHODS`.
    """

    sigma: float
    scale: float
    blocks: str
    method: str = SEG

    @property
    def is_off(self) -> bool:
        """True if it is the picture without guidance."""
        return OFF in (self.sigma, self.scale)

    def guided(self, model: Any) -> Any:
        """Return a model that is guided so; the model itself where nothing guides it."""
        if self.is_off:
            return model
        node = METHODS[self.method]
        widgets = {
            one.id: one.default
            for one in node.define_schema().inputs
            if getattr(one, "default", None) is not None
        }
        widgets["blocks"] = self.blocks
        if not math.isnan(self.scale):
            widgets["scale"] = self.scale
        if self.method == SEG:
            infinite = math.isinf(self.sigma)
            widgets |= {"infinite_blur": infinite, "blur_sigma": 0.0 if infinite else self.sigma}
        return node.execute(model, **widgets)[0]


class SEGuidanceSweep(io.ComfyNode):
    """Samples once for each setting and shows the results side by side."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the inputs; workflows store widgets by position, so new ones go last."""
        return io.Schema(
            node_id="SEGuidanceSweep",
            display_name="SEG Compare",
            category="model/patch/guidance",
            description=(
                "Makes one labelled picture from the same seed with several settings of Smoothed "
                "Energy Guidance, or with its relatives, to choose by eye. A list with more than "
                "one entry is an axis."
            ),
            search_aliases=["SEG XY plot", "compare guidance", "sigma grid", "parameter sweep"],
            inputs=_inputs(),
            outputs=[
                io.Image.Output(
                    "grid",
                    display_name="grid",
                    tooltip="The labelled picture; one for each image of the batch.",
                ),
                io.Image.Output(
                    "images",
                    display_name="images",
                    tooltip="The images of the picture without labels, row by row.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        vae: Any,
        sigmas: str,
        scales: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float = 1.0,
        blocks: str = "auto",
        methods: str = SEG,
    ) -> io.NodeOutput:
        """Return the labelled picture, and its images."""
        rows = settings(sigmas, scales, blocks, methods)
        sampling = Sampling(
            positive, negative, latent, seed, steps, cfg, sampler_name, scheduler, denoise
        )
        already = [branch.perturbation.label for branch in branches_of(model.model_options)]
        if already:
            raise ValueError(
                f"SEG Compare guides the model by itself, and this one is guided already by "
                f"{', '.join(already)}. Connect the model as it is before that node."
            )
        # Before the first image is made, so that a wrong entry costs no time.
        wanted = list(dict.fromkeys(_key(setting) for row in rows for setting in row))
        models = {key: key.guided(model) for key in wanted}
        bar, found = Bar(model, len(wanted)), dict[Setting, torch.Tensor]()
        for number, (key, guided) in enumerate(models.items()):
            tell_node(f"image {number + 1} of {len(wanted)}", _node_id(cls))
            found[key] = decode(vae, sampling.run(guided, bar.part(number))).cpu()
        tell_node(f"{len(wanted)} images", _node_id(cls))
        images = [[found[_key(setting)] for setting in row] for row in rows]
        grid = _grid(images, *labels(rows))
        together = torch.cat([image for row in images for image in row])
        return io.NodeOutput(grid, together, ui=ui.PreviewImage(grid, cls=cls))


def _node_id(cls: Any) -> str | None:
    return getattr(cls.hidden, "unique_id", None)


def _key(setting: Setting) -> Setting:
    """Return what tells settings apart: without guidance they are all the same."""
    return Setting(OFF, OFF, "") if setting.is_off else setting


def settings(sigmas: str, scales: str, blocks: str, methods: str = SEG) -> list[list[Setting]]:
    """Return the pictures of a comparison: methods across; scales, then blocks, downwards.

    SEG has a column for each sigma, another method one. Where there is one column only, the next
    list with several entries runs across.

    Raises:
        ValueError: if a list is empty or an entry is not a number; names the list and the entry.
    """
    widths = [_number("sigmas", entry, WIDTHS) for entry in _entries("sigmas", sigmas, ",")]
    weights = [_number("scales", entry, SCALES) for entry in _entries("scales", scales, ",")]
    chosen = _entries("blocks", blocks, ";")
    columns = _columns(widths, methods)
    count = len(columns) * len(weights) * len(chosen)
    if count > MOST:
        raise ValueError(f"SEG Compare: these lists make {count} images; at most {MOST} go.")
    every = [Setting(s, w, b, m) for b, w, (m, s) in itertools.product(chosen, weights, columns)]
    across = next((len(axis) for axis in (columns, weights, chosen) if len(axis) > 1), 1)
    return [every[start : start + across] for start in range(0, count, across)]


def _entries(name: str, text: str, separator: str) -> list[str]:
    entries = [entry.strip() for entry in text.replace("\n", separator).split(separator)]
    entries = list(dict.fromkeys(entry for entry in entries if entry))
    if not entries:
        raise ValueError(f"SEG Compare: {name} is empty; write at least one entry.")
    return entries


def _columns(widths: list[float], methods: str) -> list[tuple[str, float]]:
    """Return method and width of each column; the picture without guidance stands once, first."""
    names = [entry.upper() for entry in _entries("methods", methods, ",")]
    for name in names:
        if name not in METHODS:
            raise ValueError(
                f"SEG Compare: {name!r} in methods is none of {', '.join(METHODS)}. Separate the "
                "entries by commas."
            )
    off = [(SEG, OFF)] if OFF in widths and SEG not in names else []
    columns = [(name, width) for name in names for width in (widths if name == SEG else [math.inf])]
    return off + columns


def _number(name: str, entry: str, words: dict[str, float]) -> float:
    word = words.get(entry.lower())
    if word is not None:
        return word
    try:
        value = float(entry)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(
            f"SEG Compare: {entry!r} in {name} is not a number of at least 0 or "
            f"{' or '.join(words)}. Separate the entries by commas."
        )
    return value


def labels(rows: list[list[Setting]]) -> tuple[list[str], list[str]]:
    """Return what stands above each column and left of each row: all that differs along it."""
    across = [_label(column, rows[0]) for column in rows[0]]
    down = [_label(row[0], [row[0] for row in rows]) for row in rows]
    if not any(across):
        across = [_words(rows[0][0], ["sigma"])]
    return across, down


def _label(setting: Setting, line: list[Setting]) -> str:
    names = [
        name
        for name in ("method", "sigma", "scale", "blocks")
        if len({_of(s, name) for s in line}) > 1
    ]
    return _words(setting, names)


def _of(setting: Setting, name: str) -> float | str:
    return getattr(setting, name)


def _words(setting: Setting, names: list[str]) -> str:
    words = []
    for name in names:
        value = _of(setting, name)
        if isinstance(value, str):
            words.append(value)
        elif value == OFF:
            return "off"
        elif math.isnan(value):
            words.append(f"{name} default")
        elif name == "scale" or setting.method == SEG:
            words.append("infinite" if math.isinf(value) else f"{name} {value:g}")
    return ", ".join(words)


def _grid(images: list[list[torch.Tensor]], across: list[str], down: list[str]) -> torch.Tensor:
    """Return one labelled picture for each image of the batch."""
    count = min(len(image) for row in images for image in row)
    sheets = [
        labelled_grid([[to_image(image[n]) for image in row] for row in images], across, down)
        for n in range(count)
    ]
    return torch.stack([to_pixels(sheet) for sheet in sheets])


def _inputs() -> list[io.Input]:
    return [
        inputs.model(),
        io.Conditioning.Input("positive", tooltip="What to draw."),
        io.Conditioning.Input("negative", tooltip="What to avoid."),
        io.Latent.Input("latent", tooltip="The size of the images, or what to start from."),
        io.Vae.Input("vae", tooltip="Decodes the results."),
        io.String.Input(
            "sigmas",
            default="off, 1, 4, 16, infinite",
            tooltip="Widths of the blur to compare, separated by commas: numbers, off, infinite. "
            "Several run from left to right.",
        ),
        io.String.Input(
            "scales",
            default="3",
            tooltip="Weights of the guidance to compare, separated by commas: numbers, or default "
            "for each method's own. Several run downwards, or from left to right if there is one "
            "column.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="The noise that every image starts from.",
        ),
        io.Int.Input(
            "steps", default=20, min=1, max=10000, tooltip="Steps of sampling for each image."
        ),
        io.Float.Input(
            "cfg",
            default=5.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="How closely to follow the prompts. 1 = the positive prompt alone.",
        ),
        io.Combo.Input(
            "sampler_name", options=list(SAMPLERS), default="euler", tooltip="The sampler."
        ),
        io.Combo.Input(
            "scheduler",
            options=list(SCHEDULERS),
            default="normal",
            tooltip="How noise falls from step to step.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="How much of the latent to replace. 1 = all of it.",
        ),
        io.String.Input(
            "blocks",
            default="auto",
            optional=True,
            advanced=True,
            tooltip="Selections of blocks to compare, separated by semicolons, each as in Smoothed "
            "Energy Guidance: auto; middle; u0, u1.",
        ),
        io.String.Input(
            "methods",
            default=SEG,
            optional=True,
            advanced=True,
            tooltip="Methods to compare, separated by commas: SEG, PAG, SAG, TPG, SLG. Sigmas are "
            "for SEG; the others take their nodes' defaults. Use scales = default for each one's "
            "own.",
        ),
    ]
