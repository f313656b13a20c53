"""What one sampling run did, said in one line when it ends, and what it did not, as warnings."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from typing import Any

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
    """Counts of one sampling run."""

    def __init__(self) -> None:
        self.steps = 0
        self.guided: Counter[Any] = Counter()
        """Evaluations that a branch guided; 0 where it was asked to and had to pause."""
        self.shared: Counter[Any] = Counter()
        """Perturbed predictions that were made in the call of the plain one."""
        self.full: Counter[tuple[Any, str]] = Counter()
        """Those that took a whole pass of the model, by reason."""
        self.cached: Counter[Any] = Counter()
        """Those that another node answered from its cache, as it did the plain ones."""
        self.hits: Counter[tuple[Any, Any]] = Counter()
        self.calls: Counter[Any] = Counter()
        """Model calls in which a branch's perturbation was at work."""
        self.controls_evaluated = 0
        self._said: dict[str, None] = {}
        self._spared: set[Any] = set()
        self.milliseconds = 0.0
        """Of one evaluation, on average; known when the run is over."""
        self._began = 0.0

    def count_step(self) -> None:
        """Count one evaluation of the guided model."""
        self.steps += 1
        if self.steps == 1:
            self._began = time.perf_counter()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what was warned of so far."""
        return tuple(self._said)

    def reached(self, branch: Any, site: Any) -> None:
        """Count one perturbed model call, and the blocks whose attention it changed."""
        self.calls[branch] += 1
        for target in site.reached:
            self.hits[branch, target] += 1

    def was_reached(self, branch: Any) -> bool:
        """Tell whether any block of a branch was changed so far."""
        return any(owner is branch for owner, _ in self.hits)

    def reached_nothing(self, branch: Any) -> bool:
        """Tell, and warn of it at once, whether no block of a branch can be reached in this run."""
        targets = branch.perturbation.targets
        if not targets or branch.side == "free" or self.was_reached(branch):
            return False
        if not (self.calls[branch] or self.cached[branch]):
            return False  # no cond was active in the steps so far
        self.warn_once(
            f"{branch.perturbation.label} has no effect in this run: block "
            f"{branch.perturbation.name(targets)} was never reached. Another node answers for the "
            "model, runs it in its own way, or replaces these blocks."
        )
        return True

    def counts(self, branch: Any) -> tuple[int, Counter[str]]:
        """Return a branch's predictions so far: in plain calls, and in whole passes by reason."""
        whole = {reason: n for (owner, reason), n in self.full.items() if owner is branch}
        return self.shared[branch], Counter(whole)

    def warn_once(self, message: str) -> None:
        """Log a warning, the first time in this run that it is to be said."""
        if message not in self._said:
            self._said[message] = None
            log.warning(message)

    def spare(self, branch: Any, why: str) -> None:
        """Warn at once that a branch does nothing in this run, and say nothing else of it."""
        self._spared.add(branch)
        self.warn_once(f"{branch.perturbation.label} has no effect in this run: {why}.")

    def finish(self, branches: list[Any]) -> None:
        """Say what the run did; the time of its steps ends here."""
        self.milliseconds = 1000 * (time.perf_counter() - self._began) / max(self.steps, 1)
        for branch in branches:
            if branch not in self._spared:
                self._warn(branch)
            if self.guided[branch] and not _is_repeated(self.line(branch).rpartition(", ")[0]):
                log.info(self.line(branch))

    def line(self, branch: Any) -> str:
        """Return one line on what a branch did."""
        shared, why = self.counts(branch)
        passes = f"{shared} in the plain call of the model, {sum(why.values())} in whole passes"
        reasons = "; ".join(f"{n} because {reason}" for reason, n in why.items() if reason)
        return (
            f"{branch.perturbation.label}: {branch.perturbation.where}, "
            f"{self.guided[branch]} of {self.steps} model evaluations guided, {passes}"
            + (f" ({reasons})" if reasons else "")
            + f", {self.milliseconds:.0f} ms per evaluation"
        )

    def _warn(self, branch: Any) -> None:
        label = branch.perturbation.label
        if self.steps and branch not in self.guided:
            percent = (branch.window.start_percent, branch.window.end_percent)
            self.warn_once(
                f"{label} had no effect: its window {percent[0]:g} to {percent[1]:g} of sampling "
                f"covers none of the {self.steps} model evaluations of this run."
            )
        shared, whole = self.counts(branch)
        used = shared + sum(whole.values()) + self.cached[branch]
        if self.guided[branch] and not used and branch.side != "free":
            self.warn_once(
                f"{label} had no effect: its perturbed pass never reached the model. Either "
                "no conditioning is active there, or another node answers in its place."
            )
        elif branch.perturbation.targets and self.calls[branch]:
            hits = {target: self.hits[branch, target] for target in branch.perturbation.targets}
            missed = [target for target, times in hits.items() if times < self.calls[branch]]
            if missed and self.was_reached(branch):
                few = min(hits.values())
                often = "never" if few == 0 else f"in {self.calls[branch] - few} calls not"
                self.warn_once(
                    f"{label}: block {branch.perturbation.name(missed)} was {often} reached. "
                    "Another node answers from a cache there, runs the model in its own way, or "
                    "replaces these blocks."
                )
