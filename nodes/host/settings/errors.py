"""What is raised where guidance cannot be had; the message says what to change in the graph."""

from __future__ import annotations


class GuidanceError(ValueError):
    """What was asked for cannot be had in this model, or beside another node.

    It is addressed to the user of the node, and is raised through everything that otherwise falls
    back on a slower way.
    """
