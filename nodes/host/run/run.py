"""One sampling call: what is decided, cached and counted once for all of its evaluations."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ....seg_core import BlurMatrices
from ..batch.active import ActivePerturbation
from ..batch.call import KEY, Call
from ..batch.compiled import eager, is_compiled
from ..networks import adapter_of
from ..networks.adapter import NetworkAdapter
from ..probe.recorder import Recorder
from ..settings.branch import Branch
from ..settings.errors import GuidanceError
from ..settings.perturbation import BlockPerturbation
from .compat import NetworkMemory
from .holding import Holding
from .report import Report
from .state import BranchState


class Run:
    """One sampling call. It travels in the host's options, so two of them never meet.

    Attributes:
        model_sampling: the host's; it knows noise levels.
        seed: of the sampler.
        recorder: what a probe records; None without a probe.
        report: what is counted and said of it.
        matrices: blur matrices, made once.
        obstacle: why rows no longer join the base predictions; empty while they may.
        proved: code of other nodes beside which a joined call was proved.
        is_reordered: the network is given the rows of a call in another order; None until a call
            has shown it.
        memory: what other nodes' code keeps on the network.
        saliency: attention that the conds' tokens drew, by who asks.
        current: the pass that model calls belong to now, of base or perturbed predictions.
        shape: of the latent; None if it is not known.
        is_intercepted: evaluations pass through this pack's wrapper, which counts them.
    """

    def __init__(
        self,
        model_sampling: Any,
        recorder: Recorder | None = None,
        seed: int | None = None,
        shape: torch.Size | None = None,
    ) -> None:
        self.model_sampling = model_sampling
        self.seed = seed or 0
        self.recorder = recorder
        self.report = Report()
        self.matrices = BlurMatrices()
        self.obstacle = ""
        self.proved = frozenset[Hashable]()
        self.is_reordered: bool | None = None
        self.memory = NetworkMemory()
        self.saliency: dict[Hashable, Any] = {}
        self.current: Any = None
        self.is_intercepted = False
        self.shape = shape
        self._states: dict[Branch, BranchState] = {}
        self._networks: dict[Any, NetworkAdapter] = {}
        self._timestep: tuple[Any, int, float] = (None, 0, 0.0)

    def __deepcopy__(self, _memo: Any) -> Run:
        """Return the run itself: it stays one where another node copies the host's options."""
        return self

    @property
    def step(self) -> Any:
        """Return the evaluation that goes on; None outside of every branch's window."""
        return None if self.current is None else self.current.step

    def state(self, branch: Branch) -> BranchState:
        """Return the state of a branch."""
        if branch not in self._states:
            at, window = self.model_sampling.percent_to_sigma, branch.window
            edges = at(window.start_percent), at(window.end_percent)
            self._states[branch] = BranchState(branch, edges, Holding(branch.every, self.shape))
        return self._states[branch]

    def states(self, branches: Iterable[Branch]) -> list[BranchState]:
        """Return the states of some branches, and of all others that were met so far."""
        return [self.state(branch) for branch in dict.fromkeys([*branches, *self._states])]

    @contextmanager
    def during(self, current: Any) -> Iterator[None]:
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

    def met_in(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """Return the host's options with which this run meets every model call."""
        options = model_options.get("transformer_options", {})
        wrappers = options.get("wrappers", {})
        around = {k: fns for k, fns in wrappers.get("apply_model", {}).items() if k != KEY}
        wrappers = {**wrappers, "apply_model": {**around, KEY: [self.apply_model]}}
        return {**model_options, "transformer_options": {**options, "wrappers": wrappers}}

    def network(self, call: Call) -> NetworkAdapter:
        """Return the adapter of the network that runs.

        Raises:
            GuidanceError: if the network cannot be guided.
        """
        return self.network_of(call.model, exchanged=call.is_compiled_by_node)

    def network_of(self, model: Any, *, exchanged: bool = False) -> NetworkAdapter:
        """Return the adapter of a model's network, with the blocks that it had at the first look.

        Args:
            model: the host's.
            exchanged: ComfyUI's node has put compiled blocks in their place, as it does for the
                length of a call.

        Raises:
            GuidanceError: if the network cannot be guided.
        """
        network = eager(model.diffusion_model)
        key = network, exchanged
        if key not in self._networks:
            adapter = adapter_of(network, model)
            if adapter is None:
                raise GuidanceError(
                    f"The network that runs is a {type(network).__name__}, and not the one that "
                    "guidance was put on. Put the guidance node behind the node that exchanges it."
                )
            self._networks[key] = adapter
        return self._networks[key]

    def is_compiled(self, call: Call) -> bool:
        """Tell whether torch has compiled more of a call's network than blocks by themselves."""
        return is_compiled(call.model.diffusion_model) or self.network(call).compiled is None

    def perturbed(self, state: BranchState, rows: Iterable[slice]) -> ActivePerturbation:
        """Return what a branch changes in one model call."""
        branch = state.branch
        probe = None if self.recorder is None else self.recorder.attention_probe(branch)
        step, perturbation = self.report.evaluations, self.perturbation(branch)
        own = tuple(rows)
        return ActivePerturbation(perturbation, own, self.matrices, probe, self.seed, step)

    def perturbation(self, branch: Branch) -> BlockPerturbation:
        """Return what a branch changes in the evaluation that goes on."""
        assert isinstance(branch.perturbation, BlockPerturbation)
        return branch.perturbation.at(self.seed, self.report.evaluations)

    def active(self, branches: Iterable[Branch], timestep: torch.Tensor) -> list[BranchState]:
        """Return the branches whose window holds this noise level."""
        known = [state for state in self.states(branches) if not state.unreachable]
        if all(state.branch.window.covers_everything for state in known):
            return known
        noise_sigma = self.noise_sigma(timestep)
        return [s for s in known if s.branch.window.contains(noise_sigma, *s.edges)]

    def clear(self) -> None:
        """Let go of every tensor, however the run ended."""
        self.memory.clear()
        for state in self._states.values():
            state.holding.clear()
        self.saliency.clear()
        self.current = None

    def noise_sigma(self, timestep: torch.Tensor) -> float:
        """Return the noise level of an evaluation, fetched once: it may wait for the device.

        A sampler may write each noise level into one and the same tensor.
        """
        known, evaluation, noise_sigma = self._timestep
        if timestep is not known or evaluation != self.report.evaluations:
            noise_sigma = float(timestep.flatten()[0])
            self._timestep = timestep, self.report.evaluations, noise_sigma
        return noise_sigma
