"""The extension: the list of node classes, in menu order."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .pag import SEGuidancePAG
from .report import SEGuidanceProbe, SEGuidanceReport
from .sag import SEGuidanceSAG
from .seg import SEGuidance
from .slg import SEGuidanceSLG
from .sweep import SEGuidanceSweep
from .tpg import SEGuidanceTPG


class SmoothedEnergyGuidanceExtension(ComfyExtension):
    """What ComfyUI asks for the nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes, in menu order."""
        return [
            SEGuidance,
            SEGuidanceSAG,
            SEGuidancePAG,
            SEGuidanceTPG,
            SEGuidanceSLG,
            SEGuidanceProbe,
            SEGuidanceReport,
            SEGuidanceSweep,
        ]
