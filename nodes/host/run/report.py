"""What one sampling run did with each branch: the line in the log, and the warnings."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..settings.branch import Branch
from ..settings.perturbation import BlockPerturbation
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


def _held(state: BranchState) -> str:
    """Return how often a branch's last difference was held, and how far off it was then."""
    if not state.held:
        return ""
    off, cosine = _means(state.holding.checks)
    words = f" (off by {{}}, cosine {cosine:.2f}, where it was checked)"
    return f", {state.held} held" + _share(off, words)


def _effect(state: BranchState) -> str:
    """Return which cfg the guided predictions are nearest to."""
    cfg, beside = _means(state.effects)
    if math.isnan(cfg):
        return ""
    return f", effective cfg {cfg:.3g}" + _share(beside, " ({} of the push is beside cfg)")


def _means(pairs: list[torch.Tensor]) -> tuple[float, float]:
    """Return the means of pairs of numbers; NaN if there are none."""
    if not pairs:
        return math.nan, math.nan
    one, other = torch.stack(pairs).nanmean(dim=0).tolist()
    return one, other


def _share(share: float, words: str) -> str:
    """Return words on a share; none if nothing was there to be a share of."""
    return "" if math.isnan(share) else words.format(f"{share:.0%}")


class Report:
    """What is said of one sampling run.

    Attributes:
        evaluations: of the guided model, so far.
    """

    def __init__(self) -> None:
        self.evaluations = 0
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
        state.unreachable = True
        self.warn_once(f"{state.label} has no effect in this run: {why}.")

    def explain_misses(self, state: BranchState) -> None:
        """Warn that no block of a branch could be reached."""
        why = (
            f"block {state.branch.perturbation.where} was never reached. Another node answers for "
            "the model, runs it in its own way, or replaces these blocks"
        )
        self.explain(state, why)

    def explain_extra_passes(self, branches: Iterable[Branch], why: str) -> None:
        """Warn that rows of some branches no longer join the calls of the base prediction."""
        labels = dict.fromkeys(branch.perturbation.label for branch in branches)
        self.warn_once(
            f"{', '.join(labels)}: perturbed rows cannot share a model call here, because {why}. "
            "The rest of this run makes extra passes instead, which are slower."
        )

    def explain_other_prompts(self, state: BranchState) -> None:
        """Warn that a branch was asked for other prompts than those that it prepared for."""
        if not (state.branch.joins or state.branch.acts_in_base):
            return  # it prepares for none
        acts = "it has no effect" if state.branch.acts_in_base else "it takes an extra pass"
        self.warn_once(
            f"{state.label} is asked for other prompts than in the step before. Where that is so, "
            f"{acts}. Guiders that give prompts new identities in each step do so."
        )

    def finish(self, states: Iterable[BranchState]) -> None:
        """Say what the run did; the time of its evaluations ends here."""
        elapsed = time.perf_counter() - self._began
        milliseconds = 1000 * elapsed / max(self.evaluations, 1)
        for state in states:
            if not state.unreachable:
                self._warn(state)
            if state.guided and log.isEnabledFor(logging.INFO):
                line = self.line(state)
                if not _is_repeated(line):
                    log.info("%s, %.0f ms per evaluation", line, milliseconds)

    def line(self, state: BranchState) -> str:
        """Return what a branch did, but for the time that it took."""
        whole = "; ".join(f"{n} because {reason}" for reason, n in state.whole.items())
        return (
            f"{state.label}: {state.branch.perturbation.where}, {state.guided} of "
            f"{self.evaluations} model evaluations guided, {state.joined} in the same model call, "
            f"{state.whole.total()} in extra passes"
            + (f" ({whole})" if whole else "")
            + _held(state)
            + _effect(state)
        )

    def _warn(self, state: BranchState) -> None:
        window = state.branch.window
        if self.evaluations and not state.asked:
            self.warn_once(
                f"{state.label} had no effect: its window {window.start_percent:g} to "
                f"{window.end_percent:g} of sampling covers none of the {self.evaluations} model "
                "evaluations of this run."
            )
        perturbs_base = state.branch.side == "free"
        if state.misses and not state.hits:
            self.explain_misses(state)
        elif state.guided and not (state.met or perturbs_base):
            self.warn_once(
                f"{state.label} had no effect: its perturbed pass never reached the model. Either "
                "no conditioning is active there, or another node answers in its place."
            )
        elif state.hits:
            self._warn_of_misses(state)

    def _warn_of_misses(self, state: BranchState) -> None:
        perturbation = state.branch.perturbation
        assert isinstance(perturbation, BlockPerturbation)
        lacking = state.tries - state.hits
        missed = [target for target in perturbation.targets if target in lacking]
        if missed:
            never = any(target not in state.hits for target in missed)
            often = f"not reached in {max(lacking.values())} calls"
            often = "never reached" if never else often
            self.warn_once(
                f"{state.label}: block {perturbation.name(missed)} was {often}. Another node "
                "answers from a cache there, runs the model in its own way, or replaces these "
                "blocks."
            )


_reports: WeakKeyDictionary[Any, tuple[float, Report]] = WeakKeyDictionary()


def report_of(model: Any, noise_sigma: float, *, begins: bool) -> Report:
    """Return what was said so far while a model samples by options that hold no run.

    Args:
        model: the host's.
        noise_sigma: noise level of the evaluation.
        begins: the evaluation begins with this call; a run begins where the noise level rises.
    """
    before, report = _reports.get(model, (0.0, Report()))
    report = Report() if begins and noise_sigma >= before else report
    _reports[model] = noise_sigma, report
    return report
