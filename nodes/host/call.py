"""One call of ComfyUI's `apply_model`: a batch of whole conds, one chunk of rows for each."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

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
    def uuids(self) -> list[Hashable]:
        """Return the cond identities, one for each chunk of rows."""
        return self.options["uuids"]

    def rows(self, chunk: int) -> slice:
        """Return the rows of the batch that belong to one chunk."""
        size = self.x.shape[0] // len(self.uuids)
        return slice(chunk * size, (chunk + 1) * size)

    @property
    def place(self) -> Hashable:
        """Return which part of a long latent this call sees."""
        return place_of(self.options)

    def patch(self, name: str, patches: list[Any]) -> None:
        """Replace one list of the host's patches, for this call alone."""
        self.options = {
            **self.options,
            "patches": {**self.options.get("patches", {}), name: patches},
        }

    def patches(self, name: str) -> list[Any]:
        """Return one list of the host's patches."""
        return list(self.options.get("patches", {}).get(name, ()))


def place_of(options: dict[str, Any]) -> Hashable:
    """Return which part of a long latent a call sees, where the host cuts it in windows."""
    window = options.get("context_window")
    return None if window is None else (window.dim, tuple(window.index_list))


class Identity:
    """An object as itself: equal to nothing else, and alive, so that nothing takes its address."""

    __slots__ = ("_object",)

    def __init__(self, of: object) -> None:
        self._object = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self._object is other._object

    def __hash__(self) -> int:
        return id(self._object)


def signature(options: dict[str, Any]) -> Hashable:
    """Return what other nodes do to this call; equal signatures mean equal computations.

    Patches are compared by identity: a patch made anew for each call never compares equal, which
    costs a full pass and is never wrong.
    """
    patches = {k: tuple(map(Identity, v)) for k, v in options.get("patches", {}).items() if v}
    replaced = {
        kind: frozenset((key, Identity(fn)) for key, fn in table.items())
        for kind, table in options.get("patches_replace", {}).items()
        if table
    }
    inner = options.get("wrappers", {}).get("diffusion_model", {})
    wrappers = {key: tuple(map(Identity, fns)) for key, fns in inner.items() if fns}
    return (
        frozenset(patches.items()),
        frozenset(replaced.items()),
        frozenset(wrappers.items()),
        Identity(options.get("optimized_attention_override")),
    )


def with_apply_wrapper(
    model_options: dict[str, Any], marker: Any, wrapper: Callable[..., Any], *, compiled: bool
) -> dict[str, Any]:
    """Return model options in which `wrapper` is the innermost one around `apply_model`.

    Args:
        model_options: the host's options; not written to.
        marker: the object that `wrapper` finds again in the options of each call.
        wrapper: an `apply_model` wrapper of the host.
        compiled: keep graphs compiled by torch; they ignore per-call patches, since the host
            drops their guards on `transformer_options`.
    """
    from .branch import KEY

    options = dict(model_options["transformer_options"])
    wrappers = dict(options.get("wrappers", {}))
    around = {
        key: fns
        for key, fns in wrappers.get("apply_model", {}).items()
        if key != KEY and (compiled or key != COMPILE_KEY)
    }
    wrappers["apply_model"] = {**around, KEY: [wrapper]}
    options["wrappers"] = wrappers
    options[KEY] = marker
    return {**model_options, "transformer_options": options}
