"""Smoothed Energy Guidance for ComfyUI: the entry point, which imports nothing until called."""

import logging

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> object:
    """Return the extension; called once by ComfyUI when it loads the pack."""
    try:
        from .nodes import SmoothedEnergyGuidanceExtension
    except Exception:
        # ComfyUI itself logs only the message, without the traceback.
        logging.getLogger(__name__).exception("Smoothed Energy Guidance: could not load its nodes")
        raise
    return SmoothedEnergyGuidanceExtension()
