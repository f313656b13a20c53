"""Caches of other nodes: inside the network, and ComfyUI's own of whole steps."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...batch.compiled import eager
from ...batch.trees import tensors_in

_MODULES_OWN = set(vars(torch.nn.Module()))
Kept = dict[str, Any]


class NetworkMemory:
    """What code in the network's place remembers there, for each prediction by itself.

    Some nodes run a network by code of their own, which keeps what it computed as attributes of the
    network, under the label of the prediction. A perturbed prediction has the label of the base
    prediction: it gets a memory of its own, so that neither is answered with what the other
    computed.

    Attributes:
        is_rewritten: another node has exchanged methods of the network.
        is_used: those left tensors on the network.
    """

    def __init__(self) -> None:
        self.is_used = False
        self.is_rewritten = False
        self._before: Kept | None = None
        self._own: dict[Hashable, Kept] = {}

    def begin(self, network: Any) -> None:
        """Note what a network remembers before the first guided evaluation."""
        if self._before is None:
            self._before = _copied(_kept(network))

    def see(self, network: Any) -> None:
        """Note, while a network is called, whether another node has exchanged its methods."""
        self.is_rewritten |= bool(exchanged_methods(network))

    def observe(self, network: Any) -> bool:
        """Tell whether the exchanged methods have left tensors on the network since `begin`."""
        if self.is_rewritten and not self.is_used:
            before = {id(one) for one in tensors_in(self._before)}
            self.is_used = any(id(one) not in before for one in tensors_in(_kept(network)))
        return self.is_used

    @contextmanager
    def of(self, owner: Hashable, network: Any) -> Iterator[None]:
        """Let a network remember, for one perturbed prediction, what that one has computed."""
        if not self.is_used:
            yield
            return
        base = _kept(network)
        if owner not in self._own:
            self._own[owner] = _copied(self._before)
        _exchange(network, self._own[owner])
        try:
            yield
        finally:
            self._own[owner] = _kept(network)
            _exchange(network, base)

    def clear(self) -> None:
        """Let go of every tensor."""
        self._own.clear()
        self._before = None


def exchanged_methods(network: Any) -> dict[str, Any]:
    """Return the methods of a network that another node has exchanged, by name."""
    space, cls = vars(eager(network)), type(eager(network))
    return {
        name: value
        for name, value in space.items()
        if name not in _MODULES_OWN and callable(value) and callable(getattr(cls, name, None))
    }


def in_the_same_step(model_options: dict[str, Any]) -> dict[str, Any]:
    """Return options without the wrapper that would begin a step of ComfyUI's EasyCache anew.

    A step that it answers from its cache stays one: either both predictions come from there, or
    neither does. Their difference would else hold the error of the cache, times the scale.
    """
    transformer = model_options["transformer_options"]
    wrappers = transformer.get("wrappers", {})
    others = {k: fns for k, fns in wrappers.get("calc_cond_batch", {}).items() if k != "easycache"}
    own = {**transformer, "wrappers": {**wrappers, "calc_cond_batch": others}}
    return {**model_options, "transformer_options": own}


def _kept(network: Any) -> Kept:
    space = vars(eager(network))
    return {name: value for name, value in space.items() if name not in _MODULES_OWN}


def _exchange(network: Any, kept: Kept) -> None:
    space = vars(eager(network))
    for name in _kept(network):
        del space[name]
    space.update(kept)


def _copied(value: Any) -> Any:
    """Return a copy of the containers in a value; what they hold stays."""
    if type(value) is dict:
        return {key: _copied(one) for key, one in value.items()}
    if type(value) is list:
        return [_copied(one) for one in value]
    return value
