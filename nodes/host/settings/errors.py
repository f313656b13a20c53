"""What is raised where guidance cannot be had; the message says what to change in the graph."""

from __future__ import annotations

try:
    from comfyui_version import __version__ as _version
except ImportError:  # where ComfyUI is installed as a package
    _version = "of an unknown version"

HOW_TO_REPORT = (
    f"report these names and ComfyUI {_version} at "
    "https://github.com/seg-guidance/smoothed-energy-guidance/issues"
)


class GuidanceError(ValueError):
    """What was asked for cannot be had in this model, or beside another node.

    It is addressed to the user of the node, and is raised through everything that otherwise falls
    back on a slower way.
    """
