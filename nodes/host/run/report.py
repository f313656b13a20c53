"""What one sampling run did, said in one line when it ends, and what it did not, as warnings."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

from .state import BranchState

log = logging.getLogger(__name__)

_last_said: tuple[Any, set[str]] = (None, set())


def _is_repeated(line: str) -> bool:
    """Tell whether a line was said for the same prompt of the queue: tiled samplers run often."""
    global _last_said
    running = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    prompt = getattr(running, "last_prompt_id", None)
    if prompt is None:
        return False
    if _last_said[0] != prompt:
        _last_said = (prompt, set())
    repeated = line in _last_said[1]
    _last_said[1].add(line)
    return repeated


class Report:
    """What is said of one sampling run.

    Attributes:
        evaluations: of the guided model, so far.
        controls_evaluated: ControlNets that had to be evaluated for a perturbed prediction.
        milliseconds: of one evaluation, on average; known when the run is over.
    """

    def __init__(self) -> None:
        self.evaluations = 0
        self.controls_evaluated = 0
        self.milliseconds = 0.0
        self._began = 0.0
        self._warned: dict[str, None] = {}

    def count_evaluation(self) -> None:
        """Count one evaluation of the guided model."""
        self.evaluations += 1
        if self.evaluations == 1:
            self._began = time.perf_counter()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what was warned of so far."""
        return tuple(self._warned)

    def warn_once(self, message: str) -> None:
        """Log a warning, the first time in this run that it is to be said."""
        if message not in self._warned:
            self._warned[message] = None
            log.warning(message)

    def explain(self, state: BranchState, why: str) -> None:
        """Warn at once that a branch does nothing in this run, and say nothing else of it."""
        state.unreachable = state.explained = True
        self.warn_once(f"{state.label} has no effect in this run: {why}.")

    def explain_misses(self, state: BranchState) -> None:
        """Warn that no block of a branch could be reached."""
        name = state.branch.perturbation.name(state.branch.perturbation.targets)
        self.explain(
            state,
            f"block {name} was never reached. Another node answers for the model, runs it in its "
            "own way, or replaces these blocks",
        )

    def finish(self, states: Iterable[BranchState]) -> None:
        """Say what the run did; the time of its evaluations ends here."""
        elapsed = time.perf_counter() - self._began
        self.milliseconds = 1000 * elapsed / max(self.evaluations, 1)
        for state in states:
            if not state.explained:
                self._warn(state)
            if state.guided and not _is_repeated(self.line(state).rpartition(", ")[0]):
                log.info(self.line(state))

    def line(self, state: BranchState) -> str:
        """Return one line on what a branch did."""
        whole = "; ".join(f"{n} because {reason}" for reason, n in state.whole.items() if reason)
        return (
            f"{state.label}: {state.branch.perturbation.where}, {state.guided} of "
            f"{self.evaluations} model evaluations guided, {state.joined} in the same model call, "
            f"{state.whole.total()} in extra passes"
            + (f" ({whole})" if whole else "")
            + f", {self.milliseconds:.0f} ms per evaluation"
        )

    def _warn(self, state: BranchState) -> None:
        window = state.branch.window
        if self.evaluations and not state.seen:
            self.warn_once(
                f"{state.label} had no effect: its window {window.start_percent:g} to "
                f"{window.end_percent:g} of sampling covers none of the {self.evaluations} model "
                "evaluations of this run."
            )
        perturbs_base = state.branch.side == "free"
        if state.misses and not state.hits:
            self.explain_misses(state)
        elif state.guided and not state.predictions and not perturbs_base:
            self.warn_once(
                f"{state.label} had no effect: its perturbed pass never reached the model. Either "
                "no conditioning is active there, or another node answers in its place."
            )
        elif state.hits:
            self._warn_of_misses(state)

    def _warn_of_misses(self, state: BranchState) -> None:
        perturbation = state.branch.perturbation
        hits = {target: state.hits[target] for target in perturbation.targets}
        missed = [target for target, times in hits.items() if times < state.calls]
        if missed:
            few = min(hits.values())
            often = "never reached" if few == 0 else f"not reached in {state.calls - few} calls"
            self.warn_once(
                f"{state.label}: block {perturbation.name(missed)} was {often}. Another node "
                "answers from a cache there, runs the model in its own way, or replaces these "
                "blocks."
            )
