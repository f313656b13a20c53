"""One call of ComfyUI's `apply_model`: a batch of whole conds, one chunk of rows for each."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .compiled import CAN_RUN_EAGERLY

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
    again: bool = False
    """A cond of it was evaluated before in the same step."""

    def run(self) -> torch.Tensor:
        """Run the model."""
        return self.executor(
            self.x,
            self.timestep,
            self.c_concat,
            self.c_crossattn,
            self.control,
            self.options,
            **self.extra,
        )

    @property
    def model(self) -> Any:
        """Return the model that runs: with several devices, each has one of its own."""
        return self.executor.class_obj

    @property
    def uuids(self) -> list[Hashable]:
        """Return the cond identities, one for each chunk of rows."""
        return self.options["uuids"]

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
    def place(self) -> Hashable:
        """Return which part of a long latent this call sees."""
        return place_of(self.options)

    @property
    def is_compiled_by_node(self) -> bool:
        """Tell whether ComfyUI's node compiles the network, for the length of this call."""
        return COMPILE_KEY in self.options.get("wrappers", {}).get("apply_model", {})


def place_of(options: dict[str, Any]) -> Hashable:
    """Return which part of a long latent a call sees, where the host cuts it in windows."""
    window = options.get("context_window")
    return None if window is None else (window.dim, tuple(window.index_list))


_OF_ONE_CALL = {KEY, "cond_or_uncond", "uuids", "sigmas", "context_window"}


def same_options(one: Any, other: Any) -> bool:
    """Tell whether other nodes do the same to two calls, whose options are both alive.

    What they put there is compared by identity: a patch made anew for each call is never the same,
    which costs a computation and is never wrong.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (set(one) | set(other)) - _OF_ONE_CALL
        return all(same_options(one.get(key), other.get(key)) for key in keys)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_options, one, other))
    return one is other or (_is_empty(one) and _is_empty(other))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, dict | list) and not value)


def with_apply_wrapper(
    model_options: dict[str, Any], marker: Any, wrapper: Callable[..., Any], *, compiled: bool
) -> dict[str, Any]:
    """Return model options in which `wrapper` is the innermost one around `apply_model`.

    Args:
        model_options: the host's options; not written to.
        marker: the object that `wrapper` finds again in the options of each call.
        wrapper: an `apply_model` wrapper of the host.
        compiled: keep the networks that ComfyUI's node has compiled even where they cannot be run
            eagerly; graphs ignore what is changed for one call.
    """
    options = dict(model_options["transformer_options"])
    wrappers = dict(options.get("wrappers", {}))
    around = {
        key: fns
        for key, fns in wrappers.get("apply_model", {}).items()
        if key != KEY and (compiled or CAN_RUN_EAGERLY or key != COMPILE_KEY)
    }
    wrappers["apply_model"] = {**around, KEY: [wrapper]}
    options["wrappers"] = wrappers
    options[KEY] = marker
    return {**model_options, "transformer_options": options}
