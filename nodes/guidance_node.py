"""What the guidance nodes share: from widgets to a guided model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from comfy_api.latest import io

from ..seg_core import Window
from . import host

Change = host.SmoothQueries | host.ChangeOutput | host.ChangeTokens | host.SkipBlock
Perturbation = host.BlockPerturbation | host.InputBlur


class GuidanceNode:
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
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        raise NotImplementedError

    @classmethod
    def execute(cls, model: Any, *values: Any, **widgets: Any) -> io.NodeOutput:
        """Return a guided clone of a model; without effect, a plain clone and a warning.

        Args:
            model: the model.
            values: widgets in the order of the schema, as workflows store them.
            widgets: widgets by name; those in neither have their defaults.

        Raises:
            ValueError: if a widget is out of its range, or the model cannot be perturbed so.
        """
        widgets = _complete(cls.define_schema().inputs, values, widgets)
        branch = host.Branch(
            cls.perturbation(model, **widgets),
            scale=widgets["scale"],
            window=Window(widgets["start_percent"], widgets["end_percent"]),
            side=widgets["branch"],
            rescale=widgets["rescale"],
            rescale_mode=widgets["rescale_mode"],
            reuse=widgets.get("reuse", False),
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


def _complete(
    inputs: Sequence[io.Input], values: Sequence[Any], named: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the value of every widget.

    Raises:
        TypeError: if there is no such widget.
        ValueError: if a choice is none of its options.
    """
    widgets = {one.id: one for one in inputs if isinstance(one, io.WidgetInput)}
    given = {**dict(zip(widgets, values, strict=False)), **named}
    if len(values) > len(widgets) or given.keys() - widgets.keys():
        raise TypeError(f"the widgets are {', '.join(widgets)}, got {', '.join(given)}")
    for name, one in widgets.items():
        given.setdefault(name, one.default)
        if isinstance(one, io.Combo.Input) and given[name] not in one.options:
            raise ValueError(f"{name} must be one of {', '.join(one.options)}, got {given[name]!r}")
    return given
