"""The extension: the list of node classes, in menu order."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .pag import SEGuidancePAG
from .replacements import offer_replacements
from .report import SEGuidanceProbe, SEGuidanceReport
from .sag import SEGuidanceSAG
from .seg import SEGuidance
from .slg import SEGuidanceSLG
from .ssg import SEGuidanceSSG
from .sweep import SEGuidanceSweep
from .tpg import SEGuidanceTPG


class SmoothedEnergyGuidanceExtension(ComfyExtension):
    """What ComfyUI asks for the nodes of this pack."""

    async def on_load(self) -> None:
        """Offer to replace nodes of other packs; called once, before `get_node_list`."""
        await offer_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes, in menu order."""
        return [
            SEGuidance,
            SEGuidanceSAG,
            SEGuidancePAG,
            SEGuidanceTPG,
            SEGuidanceSSG,
            SEGuidanceSLG,
            SEGuidanceProbe,
            SEGuidanceReport,
            SEGuidanceSweep,
        ]
