"""One sampling call: what is decided, cached and counted once for all of its evaluations."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ....seg_core import BlurMatrices
from ..batch.active import ActivePerturbation
from ..batch.call import Call
from ..batch.compiled import eager, is_compiled
from ..networks import adapter_of
from ..networks.adapter import NetworkAdapter
from ..probe.recorder import Recorder
from ..settings.branch import Branch
from ..settings.errors import GuidanceError
from ..settings.perturbation import BlockPerturbation
from .compat.caches import NetworkMemory
from .joining import Joining
from .report import Report
from .state import BranchState

Pass = Callable[[Call], torch.Tensor]


class Run:
    """One sampling call. It travels in the host's options, so two of them never meet.

    Attributes:
        model_sampling: the host's; it knows noise levels.
        seed: of the sampler.
        recorder: what a probe records; None without a probe.
        report: what is said of the run.
        matrices: blur matrices.
        joining: whether rows may join the calls of the base prediction.
        memory: what other nodes' code keeps on the network.
        saliency: attention that the conds' tokens drew, by who asks.
        step: the evaluation that goes on; None outside of every branch's window.
        current: what the model calls that are made now belong to.
    """

    def __init__(
        self, model_sampling: Any, recorder: Recorder | None = None, seed: int | None = None
    ) -> None:
        self.model_sampling = model_sampling
        self.seed = seed or 0
        self.recorder = recorder
        self.report = Report()
        self.matrices = BlurMatrices()
        self.joining = Joining()
        self.memory = NetworkMemory()
        self.saliency: dict[Hashable, Any] = {}
        self.step: Any = None
        self.current: Pass | None = None
        self._states: dict[Branch, BranchState] = {}
        self._networks: list[NetworkAdapter] = []
        self._exchanged: dict[NetworkAdapter, NetworkAdapter] = {}
        self._timestep: tuple[Any, float] = (None, 0.0)
        self._uuids: dict[tuple[Any, Hashable], Hashable] = {}
        self._originals: dict[Hashable, Hashable] = {}

    def state(self, branch: Branch) -> BranchState:
        """Return the state of a branch."""
        return self._states.setdefault(branch, BranchState(branch))

    def states(self, branches: Iterable[Branch]) -> list[BranchState]:
        """Return the states of some branches, and of all others that were asked for anything."""
        called = [branch for branch, state in self._states.items() if state.seen]
        return [self.state(branch) for branch in dict.fromkeys([*branches, *called])]

    @contextmanager
    def during(self, current: Pass) -> Iterator[None]:
        """Let model calls belong to a pass."""
        before, self.current = self.current, current
        try:
            yield
        finally:
            self.current = before

    def apply_model(
        self,
        executor: Any,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: torch.Tensor | None = None,
        c_crossattn: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Wrap one model call of the host for the pass that it belongs to."""
        options = transformer_options or {}
        call = Call(executor, x, t, c_concat, c_crossattn, control, options, kwargs)
        return call.run() if self.current is None else self.current(call)

    def network(self, call: Call) -> NetworkAdapter:
        """Return the adapter of the network that runs.

        Raises:
            GuidanceError: if the network cannot be guided.
        """
        network = self.network_of(call.model)
        if not call.is_compiled_by_node:
            return network
        # ComfyUI's node exchanges blocks for the length of a call: they are other modules there.
        if network not in self._exchanged:
            exchanged = adapter_of(network.network, call.model)
            assert exchanged is not None
            same = exchanged.catalogue == network.catalogue
            self._exchanged[network] = exchanged if same else network
        return self._exchanged[network]

    def network_of(self, model: Any) -> NetworkAdapter:
        """Return the adapter of a model's network, with the blocks that it had at the first look.

        Raises:
            GuidanceError: if the network cannot be guided.
        """
        network = eager(model.diffusion_model)
        for known in self._networks:
            if known.network is network:
                return known
        adapter = adapter_of(network, model)
        if adapter is None:
            raise GuidanceError(
                f"The network that runs is a {type(network).__name__}, and not the one that "
                "guidance was put on. Put the guidance node behind the node that exchanges it."
            )
        self._networks.append(adapter)
        return adapter

    def is_compiled(self, call: Call) -> bool:
        """Tell whether torch has compiled more of a call's network than blocks by themselves."""
        return is_compiled(call.model.diffusion_model) or self.network(call).compiled is None

    def perturbed(self, state: BranchState, rows: Iterable[slice]) -> ActivePerturbation:
        """Return what a branch changes in one model call."""
        branch = state.branch
        assert isinstance(branch.perturbation, BlockPerturbation)
        probe = None if self.recorder is None else self.recorder.attention_probe(branch)
        own = _merged(rows)
        step = self.report.evaluations
        return ActivePerturbation(branch.perturbation, own, self.matrices, probe, self.seed, step)

    def private_uuid(self, owner: Any, original: Hashable) -> Hashable:
        """Return an owner's own, stable identity of a cond, so that caches tell them apart."""
        key = (owner, original)
        if key not in self._uuids:
            self._uuids[key] = uuid.uuid4()
            self._originals[self._uuids[key]] = original
        return self._uuids[key]

    def original_uuid(self, private: Hashable) -> Hashable:
        """Return the cond identity that a private one stands for."""
        return self._originals.get(private, private)

    def active(self, branches: Iterable[Branch], timestep: torch.Tensor) -> list[BranchState]:
        """Return the branches whose window holds this noise level."""
        known = [state for state in self.states(branches) if not state.unreachable]
        if all(state.branch.window.covers_everything for state in known):
            return known
        noise_sigma = self._noise_sigma(timestep)
        return [s for s in known if s.branch.window.contains(noise_sigma, *self._edges(s))]

    def clear(self) -> None:
        """Let go of every tensor, however the run ended."""
        self.memory.clear()
        self.saliency.clear()
        self.step = self.current = None

    def _noise_sigma(self, timestep: torch.Tensor) -> float:
        # Fetched once a step: it may wait for the device.
        if timestep is not self._timestep[0]:
            self._timestep = (timestep, float(timestep.flatten()[0]))
        return self._timestep[1]

    def _edges(self, state: BranchState) -> tuple[float, float]:
        # Asked of the host once a run: its answer may wait for the device.
        if state.edges is None:
            at, window = self.model_sampling.percent_to_sigma, state.branch.window
            state.edges = (at(window.start_percent), at(window.end_percent))
        return state.edges


def _merged(rows: Iterable[slice]) -> tuple[slice, ...]:
    """Return the same rows in as few slices as there can be."""
    merged: list[slice] = []
    for one in rows:
        if merged and merged[-1].stop == one.start:
            merged[-1] = slice(merged[-1].start, one.stop)
        else:
            merged.append(one)
    return tuple(merged)
