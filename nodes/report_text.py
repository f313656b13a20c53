"""A recorded run summed up in five lines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from .host.probe.probe import BranchRecord, Measures, Record, StepRecord


def summary(record: Record, runs: int, made_it: bool) -> str:
    """Return what ran, its effect, what the blur did, how its predictions were made, and the time.

    Args:
        record: the run.
        runs: how many runs the probe has seen.
        made_it: the run made the latent that the report was given.
    """
    guided = [(b, list(record.guided_by(i).values())) for i, b in enumerate(record.branches)]
    effects = [_effect(b.perturbation.label, steps) for b, steps in guided if steps]
    blurs = [_blur(b.perturbation.where, steps) for b, steps in guided]
    which = "which made this latent" if made_it else "the last one; it did not make this latent"
    methods = "; ".join(f"{_described(b)}, {len(steps)} steps guided" for b, steps in guided)
    lines = (
        f"Run {record.number} of {runs}, {which}: {len(record.steps)} steps. "
        f"{methods or 'No guidance of this pack is on the model'}.",
        " ".join(effects) or "Nothing was added to the prediction.",
        " ".join(filter(None, blurs)) or "No attention was blurred.",
        _passes(record),
        f"{_time(record)}. "
        + (f"Warning: {' '.join(record.warnings)}" if record.warnings else "No warnings."),
    )
    return "\n".join(lines)


def _described(branch: Any) -> str:
    perturbation = branch.perturbation
    smooth, blur = perturbation.smooth, ""
    if smooth is not None:
        blur = ", infinite blur" if smooth.one_query else f", blur sigma {smooth.sigma:g}"
    return f"{perturbation.label}, {perturbation.where}, scale {branch.scale:g}{blur}"


def _effect(label: str, steps: Sequence[BranchRecord]) -> str:
    moved = _percent(mean(step.share(step.guidance) for step in steps))
    begin = f"{label} moved the prediction by {moved} on average"
    beside_cfg = [step for step in steps if step.cfg > 0]
    if not beside_cfg:
        return f"{begin}; there was no cfg to compare with (cfg 1)."
    times = mean(step.guidance / step.cfg for step in beside_cfg)
    cosine = mean(step.cosine for step in beside_cfg)
    direction = "in the same direction as" if cosine > 0 else "against"
    if abs(cosine) <= 0.3:
        direction = "mostly independent of"
    push = f"{times:.2f} times the push of cfg, {direction} it (cosine {cosine:+.2f})"
    return f"{begin}: {push}{_effective_cfg(steps)}."


def _effective_cfg(steps: Sequence[BranchRecord]) -> str:
    """Return which cfg would have done most of it, and how much of it no cfg could do."""
    found = [step for step in steps if not math.isnan(step.effective_cfg + step.beside)]
    if not found:
        return ""
    cfg = mean(step.effective_cfg for step in found)
    beside = _percent(mean(step.beside for step in found))
    return f". The result is nearest to that of cfg {cfg:.3g}; {beside} of the push is beside cfg"


def _blur(where: str, steps: Sequence[BranchRecord]) -> str:
    blocks = [block for step in steps for block in step.blocks.values()]
    if not blocks:
        return ""
    plain = _average([block.plain for block in blocks])
    blurred = _average([block.blurred for block in blocks])
    return (
        f"Blurring {where} left {_share(blurred.variance, plain.variance)} of the variance of the "
        f"attention logits and {_share(blurred.curvature, plain.curvature)} of the energy's "
        f"curvature, and changed the log-sum-exp from {plain.logsumexp:.2f} to "
        f"{blurred.logsumexp:.2f}."
    )


def _average(measures: Sequence[Measures]) -> Measures:
    return Measures(*map(mean, zip(*measures, strict=True)))


def _passes(record: Record) -> str:
    joined, separate = predictions(record)
    total = joined + separate.total()
    if not total:
        return "No extra prediction of the model."
    reasons = "; ".join(f"{n} because {reason}" for reason, n in separate.items() if reason)
    return (
        f"Extra predictions: {total}, of which {joined} in the same model call as the ordinary "
        f"ones and {separate.total()} in passes of their own{reasons and f' ({reasons})'}."
        f"{_held(record)}"
    )


def _held(record: Record) -> str:
    """Return how often differences were held, and how far off they were."""
    branches = [branch for step in record.steps for branch in step.branches.values()]
    held = sum(branch.held for branch in branches)
    if not held:
        return ""
    checks = [branch for branch in branches if not math.isnan(branch.off)]
    checked = ""
    if checks:
        off = _percent(mean(branch.off for branch in checks))
        cosine = mean(branch.held_cosine for branch in checks)
        checked = f"; off by {off}, cosine {cosine:.2f}, where it was checked"
    return f" The difference was held in {held} of {len(branches)} evaluations{checked}."


def predictions(record: Record) -> tuple[int, Counter[str]]:
    """Return how many extra predictions joined the ordinary calls, and the others by reason."""
    branches = [branch for step in record.steps for branch in step.branches.values()]
    separate = sum((Counter(branch.whole) for branch in branches), Counter[str]())
    return sum(branch.joined for branch in branches), separate


def _time(record: Record) -> str:
    guided, plain = times(record)
    if guided is None:
        return f"A step took {_milliseconds(plain or 0.0)}"
    took = f"A guided step took {_milliseconds(guided)}"
    if plain is None:
        return f"{took}; there is no other step to compare it with"
    return f"{took}, a step without guidance {_milliseconds(plain)} ({guided / plain:.2f} times)"


def times(record: Record) -> tuple[float | None, float | None]:
    """Return the median milliseconds of the guided steps and of the others; None without any.

    The first step of a run is left out if its kind has others: it may load and prepare things.
    """

    def typical(steps: Sequence[StepRecord]) -> float | None:
        if len(steps) > 1 and steps[0] is record.steps[0]:
            steps = steps[1:]
        return median(step.milliseconds for step in steps) if steps else None

    guided = [step for step in record.steps if step.branches]
    return typical(guided), typical([step for step in record.steps if not step.branches])


def _share(part: float, whole: float) -> str:
    return _percent(part / whole) if whole > 0 else "none"


def _percent(share: float) -> str:
    percent = share * 100
    return f"{percent:.0f} %" if percent >= 9.95 or percent == 0 else f"{percent:.2g} %"


def _milliseconds(value: float) -> str:
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{value:.0f} ms"
