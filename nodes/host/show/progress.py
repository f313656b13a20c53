"""What the host shows while a node works: words on the node, and a bar with previews."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import comfy.utils
import latent_preview


def tell_node(words: str, node_id: str | None) -> None:
    """Show words on a node of the graph; where no server runs, nothing happens."""
    server = sys.modules.get("server")
    running = getattr(getattr(server, "PromptServer", None), "instance", None)
    if running is not None and node_id is not None:
        running.send_progress_text(words, node_id)


class Bar:
    """One progress bar for several samplings of equal length."""

    def __init__(self, model: Any, samplings: int) -> None:
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._samplings = samplings
        self._bar: Any = None

    def part(self, number: int) -> Callable[[int, Any, Any, int], None]:
        """Return the callback of one sampling, counted from 0."""

        def step_done(step: int, denoised: Any, _: Any, steps: int) -> None:
            total = steps * self._samplings
            if self._bar is None:
                self._bar = comfy.utils.ProgressBar(total)
            shown = denoised.tensors[0] if denoised.is_nested else denoised
            preview = None
            if self._previewer is not None:
                preview = self._previewer.decode_latent_to_preview_image("JPEG", shown)
            self._bar.update_absolute(number * steps + step + 1, total, preview)

        return step_done
