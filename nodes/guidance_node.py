"""What the guidance nodes share: from widgets to a guided model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any, ClassVar

from comfy_api.latest import io

from ..seg_core import Window, is_identity
from . import host
from .host.settings.changes import Change
from .host.settings.perturbation import Perturbation


class GuidanceNode(io.ComfyNode):
    """A node that guides sampling away from a prediction that it makes worse.

    A node class declares its schema and says what makes the prediction worse. Every method is given
    all widgets by name and takes those that it needs. The class names `io.ComfyNode` as a base of
    its own: the registry's scanners find nodes by it, without importing them.

    Attributes:
        LABEL: the name of the method, for messages.
        NEUTRAL: the widget at whose 0 nothing is made worse.
    """

    LABEL: ClassVar[str]
    NEUTRAL: ClassVar[str] = "scale"

    @classmethod
    def execute(cls, model: Any, *values: Any, **widgets: Any) -> io.NodeOutput:
        """Return a guided clone of a model; without effect, a plain clone and a warning.

        Args:
            model: the model.
            values: widgets in the order of the schema, as workflows store them.
            widgets: widgets by name; those in neither have their defaults.

        Raises:
            TypeError: if there is no such widget.
            ValueError: if a widget is out of its range, or the model cannot be perturbed so.
        """
        widgets = _given(cls.define_schema().inputs, values, widgets)
        branch = host.Branch(
            cls.perturbation(model, **widgets),
            scale=widgets["scale"],
            window=Window(widgets["start_percent"], widgets["end_percent"]),
            side=widgets["branch"],
            rescale=widgets["rescale"],
            rescale_mode=widgets["rescale_mode"],
            reuse=widgets.get("reuse", False),
            every=widgets.get("every", 1),
        )
        return io.NodeOutput(host.guided(model, branch, cls.no_effect(**widgets)))

    @classmethod
    def perturbation(cls, model: Any, **widgets: Any) -> Perturbation:
        """Return what makes the prediction worse: by default, a change in the selected blocks."""
        network, change = host.network_of(model, cls.LABEL), cls.change(**widgets)
        return network.perturbation(cls.LABEL, widgets["blocks"], change)

    @classmethod
    def change(cls, **widgets: Any) -> Change:
        """Return what is changed in the selected blocks."""
        raise NotImplementedError

    @classmethod
    def no_effect(cls, **widgets: Any) -> str:
        """Return why the guidance has no effect, as a sentence; empty if it has one."""
        return f"{cls.NEUTRAL} is 0." if widgets[cls.NEUTRAL] == 0 else ""


def narrow(sigma: float, kernel: str) -> str:
    """Return why a blur changes nothing, as a sentence; empty if it changes something."""
    if not is_identity((64, 64), sigma, kernel=kernel):
        return ""
    return f"blur_sigma is {sigma:g}, too narrow to reach a neighbouring cell. Try 1 or more."


def _given(
    inputs: Sequence[io.Input], values: Sequence[Any], named: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the value of every widget, checked against what the schema declares."""
    widgets = {one.id: one for one in inputs if isinstance(one, io.WidgetInput)}
    kind = Parameter.POSITIONAL_OR_KEYWORD
    known = Signature([Parameter(name, kind, default=w.default) for name, w in widgets.items()])
    given = known.bind(*values, **named)
    given.apply_defaults()
    for name, value in given.arguments.items():
        widget = widgets[name]
        if isinstance(widget, io.Combo.Input) and value not in widget.options:
            options = ", ".join(widget.options)
            raise ValueError(f"{name} must be one of {options}, got {value!r}")
        if isinstance(widget, io.Float.Input) and not widget.min <= value <= widget.max:
            limits = f"{widget.min:g} and {widget.max:g}"
            raise ValueError(f"{name} must be between {limits}, got {value}")
        if isinstance(widget, io.Int.Input) and value not in range(widget.min, widget.max + 1):
            limits = f"{widget.min} to {widget.max}"
            raise ValueError(f"{name} must be a whole number from {limits}, got {value}")
    return given.arguments
