"""Counting instead of timing: operations, parameters read, and tensor memory of what is run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once, views counted once.

    What kernels use within themselves is not seen, nor are weights and what was there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage(t) for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in before:
                self._begin(storage)
        if self.now > self.peak:
            self._forget()
            self.peak = max(self.peak, self.now)
        return out

    def _begin(self, storage: torch.UntypedStorage) -> None:
        old = self._alive.get(storage._cdata)
        if old is not None and old[0].expired():
            self.now -= old[1]
            old = None
        if old is None:
            self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.now += storage.nbytes()

    def _forget(self) -> None:
        for key, (reference, size) in list(self._alive.items()):
            if reference.expired():
                del self._alive[key]
                self.now -= size


class ParametersRead(TorchDispatchMode):
    """The parameters that operations inside read, each as often as it is read.

    A view of a parameter reads nothing; the operation that computes with it does. A copy, as of a
    cast, reads it once; who then computes with the copy reads the copy.

    Args:
        modules: whose parameters are counted.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self.read = 0
        # The parameters are kept alive: their storages' addresses are their names.
        self._parameters = [p for module in modules for p in module.parameters()]
        self._storages = {_storage(p): p.untyped_storage().size() for p in self._parameters}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        handed_on = {_storage(t) for t in _tensors(out)}
        for tensor in _tensors((args, kwargs)):
            storage = _storage(tensor)
            if storage in self._storages and storage not in handed_on:
                held = self._storages[storage] // tensor.element_size()
                self.read += min(tensor.numel(), held)
        return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class Count:
    """What one evaluation costs."""

    flops: int
    peak_bytes: int
    parameters_read: int


def count(step: Any, evaluations: int = 1) -> Count:
    """Count what an evaluation of a guided model costs on average, from the first of a run on."""

    def body() -> None:
        for number in range(evaluations):
            step.evaluate(number)

    with (
        ParametersRead(step.networks) as reads,
        PeakBytes() as memory,
        FlopCounterMode(display=False) as flops,
    ):
        step.run(body)
    total = flops.get_total_flops()
    return Count(total // evaluations, memory.peak, reads.read // evaluations)
