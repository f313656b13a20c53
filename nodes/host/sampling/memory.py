"""What other nodes' code keeps on a network between calls: caches of features, by and large.

Some nodes run a network by code of their own, which remembers what it computed as attributes of the
network, under the label of the prediction. A perturbed prediction has the label of the plain one:
it gets a memory of its own, so that neither is answered with what the other computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..calls.compiled import eager
from ..calls.trees import tensors_in
from ..settings.branch import Branch

_MODULES_OWN = set(vars(torch.nn.Module()))
Kept = dict[str, Any]


class Memories:
    """The memories of one run.

    Attributes:
        is_rewritten: another node's code runs the network.
        keeps: it keeps tensors from one call to the next; None while that is not known.
    """

    def __init__(self) -> None:
        self.is_rewritten = False
        self.keeps: bool | None = None
        self._before: Kept = {}
        self._own: dict[Branch, Kept] = {}

    def begin_step(self, network: Any) -> None:
        """Note what a network remembers before the plain predictions of a step."""
        if self.keeps is None or self.is_rewritten:
            self._before = _copied(_kept(network))

    def end_plain(self, network: Any) -> None:
        """Note whether the plain predictions left anything behind."""
        if self.is_rewritten and not self.keeps:
            before = {id(one) for one in tensors_in(self._before)}
            self.keeps = any(id(one) not in before for one in tensors_in(_kept(network)))

    def see(self, network: Any) -> None:
        """Note whether the methods of a network are another's, while it is called."""
        network = eager(network)
        methods = vars(network).keys() - _MODULES_OWN
        self.is_rewritten |= any(
            callable(vars(network)[name]) and callable(getattr(type(network), name, None))
            for name in methods
        )

    @property
    def forbids_joining(self) -> bool:
        """Tell whether rows of several predictions under one label must not be in one call."""
        return self.is_rewritten and self.keeps is not False

    def may_answer(self, steps: int) -> bool:
        """Tell whether another's code may answer the whole pass of a first step out of our sight.

        What it keeps elsewhere than on the network is the plain prediction's. From the second step
        on the perturbed one is in the same call, and shares its fate.
        """
        return self.is_rewritten and not self.keeps and steps == 1

    @contextmanager
    def of(self, branch: Branch, network: Any) -> Iterator[None]:
        """Let a network remember, for the length of a perturbed prediction, what that one knows."""
        if not self.forbids_joining:
            yield
            return
        plain = _kept(network)
        if branch not in self._own:
            self._own[branch] = _copied(self._before)
        _exchange(network, self._own[branch])
        try:
            yield
        finally:
            self._own[branch] = _kept(network)
            _exchange(network, plain)

    def clear(self) -> None:
        """Let go of every tensor."""
        self._own.clear()
        self._before = {}


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
