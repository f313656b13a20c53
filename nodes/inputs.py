"""Inputs that several nodes have in common; each tooltip gives meaning, unit and neutral value."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..seg_core import RESCALE_MODES, Window
from .host import BlockPerturbation, Branch, InputBlur, RescaleMode, Side, guided


def model() -> io.Input:
    """Return the model input."""
    return io.Model.Input(
        "model",
        tooltip="The model to guide. If its self-attention cannot be reached, an error says why.",
    )


def scale(default: float, meaning: str) -> io.Input:
    """Return the weight of the guidance."""
    return io.Float.Input(
        "scale",
        default=default,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.001,
        tooltip=f"{meaning} 0 = off, at no cost.",
    )


def window(start: float = 0.0, end: float = 1.0) -> list[io.Input]:
    """Return the two ends of the active part of sampling."""
    return [
        _share(
            "start_percent",
            start,
            "Where guidance begins, as a share of sampling. Later keeps the composition. "
            "0 = from the first step.",
        ),
        _share(
            "end_percent",
            end,
            "Where guidance ends, as a share of sampling. Steps after it cost nothing. "
            "1 = to the last step.",
        ),
    ]


def blocks(meaning: str, *, heads: bool = False) -> io.Input:
    """Return the block selector, of whole blocks or also of heads in them."""
    some = " A colon and heads take those alone: m0.3:h2,5 or 7:h0-3." if heads else ""
    return io.String.Input(
        "blocks",
        default="auto",
        optional=True,
        advanced=True,
        tooltip=f"{meaning} Or a comma list: middle, input, output, d4, m0, u2, d4-5, u0.2, "
        f"d2.2-9.{some} A block that does not exist is an error that lists what does.",
    )


def branch(options: dict[str, str]) -> io.Input:
    """Return which prediction is perturbed; the first option is the default."""
    return io.Combo.Input(
        "branch",
        options=list(options),
        default=next(iter(options)),
        optional=True,
        advanced=True,
        tooltip="Which prediction to perturb. "
        + " ".join(f"{name} = {meaning}" for name, meaning in options.items()),
    )


def perturbing(
    prediction: str,
    selector: io.Input,
    *own: io.Input,
    does: str,
    usual: str = "as in the released code.",
    active: tuple[float, float] = (0.0, 1.0),
) -> list[io.Input]:
    """Return the inputs of a node that perturbs blocks.

    Args:
        prediction: what it moves away from.
        selector: the input of the blocks.
        own: inputs that no other node has.
        does: what the node does to a prediction, as a verb.
        usual: where the branch ``conditional`` comes from.
        active: the window at first.
    """
    return [
        model(),
        scale(3.0, f"How strongly to move away from the {prediction}."),
        *window(*active),
        selector,
        *own,
        branch(
            {
                "conditional": usual,
                "unconditional": "the prediction for the negative prompt.",
                "free": f"another method: {does} the unconditional prediction itself, so no extra "
                "pass; it needs cfg above 1, and a lower cfg than usual.",
            }
        ),
        *rescale(),
        reuse(),
    ]


def rescale() -> list[io.Input]:
    """Return the pull against oversaturation."""
    return [
        _share(
            "rescale",
            0.0,
            "How far to pull the contrast of each image back to that of the unguided prediction, "
            "against oversaturation. 0 = not at all.",
            advanced=True,
        ),
        io.Combo.Input(
            "rescale_mode",
            options=list(RESCALE_MODES),
            default="full",
            optional=True,
            advanced=True,
            tooltip="What rescale measures. full = the result with cfg. partial = the prediction "
            "with this guidance alone. snf = instead of rescaling, take in each place the stronger "
            "of cfg and this guidance. Neutral while rescale is 0: full and partial.",
        ),
    ]


def reuse() -> io.Input:
    """Return the switch between one call and whole passes."""
    return io.Boolean.Input(
        "reuse",
        default=True,
        optional=True,
        advanced=True,
        tooltip="Make the extra prediction in the same call of the model as the plain one. They "
        "are equal before the first changed block: that is computed once, and each weight is read "
        "once. The result is the same up to rounding. Off = a whole extra pass.",
    )


def guided_model() -> io.Output:
    """Return the model output."""
    return io.Model.Output(tooltip="The model, guided. The model that came in is unchanged.")


def guided_by(
    model: Any,
    perturbation: BlockPerturbation | InputBlur,
    strength: tuple[float, float, float],
    no_effect: str = "",
    *,
    branch: Side = "conditional",
    rescale: float = 0.0,
    rescale_mode: RescaleMode = "full",
    reuse: bool = True,
) -> io.NodeOutput:
    """Return a guided clone of a model; without effect, a plain clone and a warning.

    Args:
        model: the model.
        perturbation: what makes a prediction worse.
        strength: the weight of the guidance, and the window in which it acts.
        no_effect: why it does nothing, if that is so.
        branch: see `branch`.
        rescale: see `rescale`.
        rescale_mode: see `rescale`.
        reuse: see `reuse`.

    Raises:
        ValueError: if a setting is out of its range.
    """
    scale, start_percent, end_percent = strength
    guidance = Branch(
        perturbation,
        scale=scale,
        window=Window(start_percent, end_percent),
        side=branch,
        rescale=rescale,
        rescale_mode=rescale_mode,
        reuse=reuse,
    )
    return io.NodeOutput(guided(model, guidance, no_effect))


def _share(name: str, default: float, tooltip: str, *, advanced: bool = False) -> io.Input:
    return io.Float.Input(
        name,
        default=default,
        min=0.0,
        max=1.0,
        step=0.01,
        round=0.001,
        optional=advanced,
        advanced=advanced,
        tooltip=tooltip,
    )
