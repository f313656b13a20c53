"""Development-only ComfyUI pack: a tiny diffusion model of butterflies and its nodes.

It lets the guidance nodes of this repository be tried and pictured in seconds on a CPU,
with no model download. It is not part of what users install.
"""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """Return the extension; everything heavy is imported only when ComfyUI asks."""
    from .nodes import DemoExtension

    return DemoExtension()
