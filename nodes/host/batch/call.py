"""One call of ComfyUI's `apply_model`: a batch of whole conds, one chunk of rows for each."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

# The one key under which this pack keeps its objects in ComfyUI's dictionaries.
KEY = "smoothed_energy_guidance"
COMPILE_KEY = "torch.compile"


@dataclass
class Call:
    """The arguments of one model call, and the rest of the wrapper chain that runs it."""

    executor: Any
    x: torch.Tensor
    timestep: torch.Tensor
    c_concat: torch.Tensor | None
    c_crossattn: torch.Tensor | None
    control: dict[str, list[torch.Tensor | None]] | None
    options: dict[str, Any]
    extra: dict[str, Any]

    def run(self) -> torch.Tensor:
        """Run the model."""
        inputs = self.x, self.timestep, self.c_concat, self.c_crossattn, self.control
        return self.executor(*inputs, self.options, **self.extra)

    @property
    def model(self) -> Any:
        """Return the model that runs: with several devices, each has one of its own."""
        return self.executor.class_obj

    @property
    def uuids(self) -> list[Hashable]:
        """Return the cond identities, one for each chunk of rows; none if the caller gives none.

        Copies of the host's evaluation that other nodes carry may be older than the identities.
        """
        return self.options.get("uuids", [])

    @property
    def chunk_rows(self) -> int:
        """Return the number of rows of one cond."""
        return self.x.shape[0] // len(self.uuids)

    def rows(self, chunk: int) -> slice:
        """Return the rows of the batch that belong to one chunk."""
        size = self.chunk_rows
        return slice(chunk * size, (chunk + 1) * size)

    def part(self, chunks: range) -> Call:
        """Return the same call for some of its conds, to look things up in; it cannot be run."""
        if len(chunks) == len(self.uuids):
            return self
        rows = slice(self.rows(chunks[0]).start, self.rows(chunks[-1]).stop)
        labels = {n: [self.options[n][c] for c in chunks] for n in ("uuids", "cond_or_uncond")}
        return replace(self, x=self.x[rows], options={**self.options, **labels})

    @property
    def window(self) -> Hashable:
        """Return which part of a long latent this call sees, where the host cuts it in windows."""
        window = self.options.get("context_window")
        return None if window is None else (window.dim, tuple(window.index_list))

    @property
    def is_compiled_by_node(self) -> bool:
        """Tell whether ComfyUI's node compiles the network, for the length of this call."""
        return COMPILE_KEY in self.options.get("wrappers", {}).get("apply_model", {})
