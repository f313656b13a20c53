"""One sampling call: what is decided, cached and counted once for all of its steps."""

from __future__ import annotations

import uuid
from collections.abc import Hashable, Iterable
from typing import Any

import torch

from ....seg_core import BlurMatrices
from ..calls.call import Call
from ..calls.compiled import eager, is_compiled
from ..calls.site import Site
from ..networks import view_of
from ..networks.view import View
from ..probe.recorder import Recorder
from ..settings.branch import Branch
from ..settings.perturbation import BlockPerturbation
from .memory import Memories
from .report import Report


class Run:
    """One sampling call. It travels in the host's options, so two of them never meet."""

    def __init__(
        self, model_sampling: Any, recorder: Recorder | None = None, seed: int | None = None
    ) -> None:
        self.model_sampling = model_sampling
        self.seed = seed or 0
        self.recorder = recorder
        """What a probe records; None without a probe."""
        self.report = Report()
        self.matrices = BlurMatrices()
        self.memories = Memories()
        self.wanted: dict[Branch, set[Hashable]] = {}
        """The conds that each branch asked for in its last step."""
        self.called: dict[Branch, None] = {}
        """Branches that asked for anything, in order."""
        self.idle: set[Branch] = set()
        """Branches whose rows were computed, and which then did not ask for them."""
        self.regrouped: set[Branch] = set()
        """Branches whose rows would be others' in this run, since another node regroups them."""
        self.dead: set[Branch] = set()
        """Branches whose perturbation reaches nothing in this run."""
        self.masses: dict[Hashable, Any] = {}
        self._views: list[View] = []
        self._compiled: dict[View, View] = {}
        self._timestep: tuple[Any, float] = (None, 0.0)
        self._windows: dict[Branch, tuple[float, float]] = {}
        self._uuids: dict[tuple[Branch, Hashable], Hashable] = {}
        self._originals: dict[Hashable, Hashable] = {}

    def view(self, call: Call) -> View:
        """Return the view of the network that runs.

        Raises:
            ValueError: if the network cannot be guided.
        """
        view = self.view_of(call.model)
        if not call.is_compiled_by_node:
            return view
        # ComfyUI's node exchanges blocks for the length of a call: they are other modules there.
        if view not in self._compiled:
            exchanged = view_of(view.network, call.model)
            assert exchanged is not None
            same = exchanged.catalogue == view.catalogue
            self._compiled[view] = exchanged if same else view
        return self._compiled[view]

    def view_of(self, model: Any) -> View:
        """Return the view of a model's network, with the blocks that it had at the first look.

        Raises:
            ValueError: if the network cannot be guided.
        """
        network = eager(model.diffusion_model)
        for view in self._views:
            if view.network is network:
                return view
        view = view_of(network, model)
        if view is None:
            raise ValueError(
                f"The network that runs is a {type(network).__name__}, and not the one that "
                "guidance was put on. Put the guidance node behind the node that exchanges it."
            )
        view.look()
        self._views.append(view)
        return view

    def is_compiled(self, call: Call) -> bool:
        """Tell whether torch has compiled more of a call's network than blocks by themselves."""
        return is_compiled(call.model.diffusion_model) or self.view(call).compiled is None

    def site(self, branch: Branch, rows: Iterable[slice]) -> Site:
        """Return what a branch changes in one model call."""
        assert isinstance(branch.perturbation, BlockPerturbation)
        look = None if self.recorder is None else self.recorder.look(branch)
        return Site(
            branch.perturbation, _merged(rows), self.matrices, look, self.seed, self.report.steps
        )

    def private_uuid(self, branch: Branch, original: Hashable) -> Hashable:
        """Return a branch's own, stable identity of a cond, so that caches tell them apart."""
        key = (branch, original)
        if key not in self._uuids:
            self._uuids[key] = uuid.uuid4()
            self._originals[self._uuids[key]] = original
        return self._uuids[key]

    def original_uuid(self, private: Hashable) -> Hashable:
        """Return the cond identity that a private one stands for."""
        return self._originals.get(private, private)

    def active(self, branches: Iterable[Branch], timestep: torch.Tensor) -> tuple[Branch, ...]:
        """Return the branches whose window holds this noise level."""
        known = [b for b in dict.fromkeys([*branches, *self.called]) if b not in self.dead]
        if all(branch.window.covers_everything for branch in known):
            return tuple(known)
        noise_sigma = self._noise_sigma(timestep)
        return tuple(b for b in known if b.window.contains(noise_sigma, *self._edges(b)))

    def _noise_sigma(self, timestep: torch.Tensor) -> float:
        # Fetched once a step: it may wait for the device.
        if timestep is not self._timestep[0]:
            self._timestep = (timestep, float(timestep.flatten()[0]))
        return self._timestep[1]

    def _edges(self, branch: Branch) -> tuple[float, float]:
        # Asked of the host once a run: its answer may wait for the device.
        if branch not in self._windows:
            at = self.model_sampling.percent_to_sigma
            window = branch.window
            self._windows[branch] = (at(window.start_percent), at(window.end_percent))
        return self._windows[branch]


def _merged(rows: Iterable[slice]) -> tuple[slice, ...]:
    """Return the same rows in as few slices as there can be."""
    merged: list[slice] = []
    for one in rows:
        if merged and merged[-1].stop == one.start:
            merged[-1] = slice(merged[-1].start, one.stop)
        else:
            merged.append(one)
    return tuple(merged)
