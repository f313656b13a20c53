"""Inputs that nodes share; each tooltip gives meaning, unit and neutral value.

A schema lists its inputs in the order of the node's widgets. Workflows store widgets by position,
so a new input goes last, and none is ever renamed.
"""

from __future__ import annotations

from collections.abc import Iterable

from comfy_api.latest import io

from ..seg_core import RESCALE_MODES

CATEGORY = "model/patch/guidance"


def number(
    name: str,
    default: float,
    tooltip: str,
    *,
    most: float = 1.0,
    step: float = 0.01,
    advanced: bool = False,
) -> io.Input:
    """Return a number from 0 to `most`, in steps of `step`."""
    return io.Float.Input(
        name,
        default=default,
        min=0.0,
        max=most,
        step=step,
        round=0.001,
        optional=advanced,
        advanced=advanced,
        tooltip=tooltip,
    )


def choice(name: str, options: Iterable[str], tooltip: str) -> io.Input:
    """Return an advanced choice; the first option is the default."""
    listed = list(options)
    return io.Combo.Input(
        name, options=listed, default=listed[0], optional=True, advanced=True, tooltip=tooltip
    )


def text(name: str, default: str, tooltip: str, *, advanced: bool = True) -> io.Input:
    """Return a line of text."""
    return io.String.Input(
        name, default=default, optional=advanced, advanced=advanced, tooltip=tooltip
    )


MODEL = io.Model.Input(
    "model",
    tooltip="The model to guide. If its self-attention cannot be reached, an error says why.",
)
GUIDED = io.Model.Output(tooltip="The guided model. The model that came in is not changed.")
RESCALE = [
    number(
        "rescale",
        0.0,
        "How far to pull the contrast of each image back to that of the unguided prediction, "
        "against oversaturation. 0 = not at all.",
        advanced=True,
    ),
    choice(
        "rescale_mode",
        RESCALE_MODES,
        "What rescale measures. full = the result with cfg. partial = the prediction with this "
        "guidance alone. snf = instead of rescaling, keep at each position the stronger of cfg "
        "and this guidance. full and partial do nothing while rescale is 0.",
    ),
]
REUSE = io.Boolean.Input(
    "reuse",
    default=True,
    optional=True,
    advanced=True,
    tooltip="Compute the extra prediction in the same model call as the ordinary ones. "
    "Everything before the first changed block is computed once, and each weight is read once. "
    "The result is the same up to rounding. Off = a full extra pass.",
)


def scale(default: float, worse: str, note: str = "") -> io.Input:
    """Return the weight of the guidance, which moves away from a worse prediction."""
    meaning = f"How strongly to move away from the {worse}.{note} 0 = off, at no cost."
    return number("scale", default, meaning, most=100.0, step=0.1)


def window(start: float = 0.0, end: float = 1.0) -> list[io.Input]:
    """Return the two ends of the active part of sampling."""
    return [
        number(
            "start_percent",
            start,
            "Where guidance begins, as a fraction of sampling. A later start keeps more of the "
            "composition. 0 = from the first step.",
        ),
        number(
            "end_percent",
            end,
            "Where guidance ends, as a fraction of sampling. Later steps cost nothing extra. 1 = "
            "to the last step.",
        ),
    ]


def blocks(
    meaning: str,
    auto: str = "the middle block of a UNet, a middle range of a transformer",
    *,
    heads: bool = False,
    random: bool = False,
) -> io.Input:
    """Return the selector of whole blocks, with `heads` of single heads, or of `random` blocks."""
    some = " Add a colon and heads to select only those: m0.3:h2,5 or 7:h0-3." if heads else ""
    if random:
        some = (
            " random draws a tenth of the blocks anew in each step (S2-Guidance), random:3 draws "
            "three, and random:2, 8-20 draws between the named ones; never the first."
        )
    return text(
        "blocks",
        "auto",
        f"{meaning} auto = {auto}. Or a comma-separated list: middle, input, output, d4, m0, u2, "
        f"d4-5, u0.2, d2.2-9.{some} A block that does not exist is an error that lists the valid "
        "names.",
    )


def branch(
    conditional: str,
    unconditional: str = "the prediction for the negative prompt.",
    *,
    free: bool = True,
) -> io.Input:
    """Return which prediction is perturbed; the arguments say what each choice stands for."""
    options = ["conditional", "unconditional"]
    meaning = f"conditional = {conditional} unconditional = {unconditional}"
    if free:
        options.append("free")
        meaning += (
            " free = another method: the unconditional prediction itself is perturbed, so there is "
            "no extra pass. It needs cfg above 1, and a lower cfg than usual."
        )
    return choice("branch", options, f"Which prediction to perturb. {meaning}")


def every(note: str = "") -> io.Input:
    """Return how often the extra prediction is made."""
    return io.Int.Input(
        "every",
        default=1,
        min=1,
        max=8,
        optional=True,
        advanced=True,
        tooltip="Make the extra prediction in every n-th guided step only, and hold the last "
        "difference between them: a held step costs nothing extra. SEG Report and the log say how "
        f"far off it was.{note} 1 = in every step.",
    )


def extra_prediction(conditional: str, note: str = "") -> list[io.Input]:
    """Return the last inputs of PAG, TPG, SSG and SLG: how the extra prediction is made."""
    return [branch(conditional), *RESCALE, REUSE, every(note)]
