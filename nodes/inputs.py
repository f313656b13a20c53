"""Inputs that nodes share; each tooltip gives meaning, unit and neutral value.

A schema lists its inputs in the order of the node's widgets. Workflows store widgets by position,
so a new input goes last, and none is ever renamed.
"""

from __future__ import annotations

from collections.abc import Iterable

from comfy_api.latest import io

from ..seg_core import KERNELS, RESCALE_MODES

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


def model() -> io.Input:
    """Return the model to guide."""
    return io.Model.Input(
        "model",
        tooltip="The model to guide. If its self-attention cannot be reached, an error says why.",
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
) -> io.Input:
    """Return the selector of whole blocks or, with `heads`, also of single heads in them."""
    some = " Add a colon and heads to select only those: m0.3:h2,5 or 7:h0-3." if heads else ""
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
    options = {"conditional": conditional, "unconditional": unconditional}
    if free:
        options["free"] = (
            "another method: the unconditional prediction itself is perturbed, so there is no "
            "extra pass. It needs cfg above 1, and a lower cfg than usual."
        )
    return choice(
        "branch",
        options,
        "Which prediction to perturb. "
        + " ".join(f"{name} = {meaning}" for name, meaning in options.items()),
    )


def rescale() -> list[io.Input]:
    """Return the correction of oversaturation."""
    return [
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


def kernel(meanings: str) -> io.Input:
    """Return the shape of the blur."""
    return choice("kernel", KERNELS, f"How blur_sigma is applied. {meanings}")


def reuse() -> io.Input:
    """Return the switch between joined and separate predictions."""
    return io.Boolean.Input(
        "reuse",
        default=True,
        optional=True,
        advanced=True,
        tooltip="Compute the extra prediction in the same model call as the ordinary ones. "
        "Everything before the first changed block is computed once, and each weight is read once. "
        "The result is the same up to rounding. Off = a full extra pass.",
    )


def extra_prediction(conditional: str) -> list[io.Input]:
    """Return the last inputs of PAG, TPG and SLG: how the extra prediction is made and used."""
    return [branch(conditional), *rescale(), reuse()]


def guided_model() -> io.Output:
    """Return the model output."""
    return io.Model.Output(tooltip="The guided model. The model that came in is not changed.")
