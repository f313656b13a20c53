"""A recorded run in five lines that a person understands."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from statistics import mean, median
from typing import Any

from .host.probe.probe import BlockRecord, BranchRecord, Measures, Record, StepRecord

LINES = 5


def summary(record: Record, runs: int, made_it: bool) -> str:
    """Return what ran, what it did, what the blur did, how its predictions were made, and the time.

    Args:
        record: the run.
        runs: how many runs the probe has seen.
        made_it: the run made the latent that the report is given.
    """
    parts = [_of_branch(record, index) for index in range(len(record.branches))]
    lines = [
        _what(record, runs, made_it),
        _joined(_effect(part) for part in parts) or "Nothing was added to the prediction.",
        _joined(_blur(part) for part in parts) or "No attention was blurred.",
        _passes([each for part in parts for each in part]),
        _time(record),
    ]
    assert len(lines) == LINES
    return "\n".join(lines)


def _of_branch(record: Record, index: int) -> list[BranchRecord]:
    return [step.branches[index] for step in record.steps if index in step.branches]


def _joined(lines: Iterable[str]) -> str:
    return " Then: ".join(line for line in lines if line)


def _what(record: Record, runs: int, made_it: bool) -> str:
    which = "which made this latent" if made_it else "the last one; it did not make this latent"
    begin = f"Run {record.number} of {runs}, {which}: {len(record.steps)} steps"
    if not record.branches:
        return f"{begin}. No guidance of this pack is on the model."
    each = "; ".join(
        f"{_described(branch)}, {len(_of_branch(record, index))} steps guided"
        for index, branch in enumerate(record.branches)
    )
    return f"{begin}. {each}."


def _described(branch: Any) -> str:
    perturbation = branch.perturbation
    sigma = getattr(perturbation.smooth, "sigma", None)
    blur = ""
    if sigma is not None:
        blur = ", infinite blur" if math.isinf(sigma) else f", blur sigma {sigma:g}"
    return f"{perturbation.label}, {perturbation.where}, scale {branch.scale:g}{blur}"


def _effect(steps: list[BranchRecord]) -> str:
    if not steps:
        return ""
    share = mean(step.against_prediction for step in steps)
    begin = f"It moved the prediction by {_percent(share)} on average"
    against = [step.against_cfg for step in steps if step.against_cfg is not None]
    if not against:
        return f"{begin}; there was no cfg to compare with (cfg 1)."
    cosine = mean(step.cosine for step in steps if step.cosine is not None)
    return (
        f"{begin}: {mean(against):.2f} times the push of cfg, and {_direction(cosine)} it "
        f"(cosine {cosine:+.2f})."
    )


def _direction(cosine: float) -> str:
    if cosine > 0.3:
        return "in the same direction as"
    return "against" if cosine < -0.3 else "mostly independent of"


def _blur(steps: list[BranchRecord]) -> str:
    blocks = [block for step in steps for block in step.blocks.values()]
    if not blocks:
        return ""
    plain, blurred = (average(blocks, which) for which in ("plain", "blurred"))
    return (
        f"The blur left {_share(blurred.variance, plain.variance)} of the attention logits' "
        f"variance and {_share(blurred.curvature, plain.curvature)} of the energy's curvature, "
        f"and changed the log-sum-exp from {plain.logsumexp:.2f} to {blurred.logsumexp:.2f}."
    )


def average(blocks: Iterable[BlockRecord], which: str) -> Measures:
    """Return the mean of the measures of some blocks, `plain` or `blurred`."""
    found = [getattr(block, which) for block in blocks]
    return Measures(
        *(mean(getattr(m, name) for m in found) for name in Measures.__dataclass_fields__)
    )


def _passes(steps: list[BranchRecord]) -> str:
    shared = sum(step.shared for step in steps)
    why: Counter[str] = Counter()
    for step in steps:
        why.update(step.full)
    full = sum(why.values())
    if not shared and not full:
        return "No extra prediction of the model."
    reasons = "; ".join(f"{n} because {reason}" for reason, n in why.items() if reason)
    return (
        f"Extra predictions: {shared + full}. {shared} made in the plain call of the model, {full} "
        "in whole passes" + (f" ({reasons})." if reasons else ".")
    )


def _time(record: Record) -> str:
    guided, plain = times(record)
    said = "Nothing to warn of."
    if record.warnings:
        said = "Warning: " + " ".join(record.warnings)
    if guided is None:
        return f"A step took {_milliseconds(plain or 0.0)}. {said}"
    if plain is None:
        return (
            f"A guided step took {_milliseconds(guided)}; no other step to compare it with. {said}"
        )
    return (
        f"A guided step took {_milliseconds(guided)}, a step without guidance "
        f"{_milliseconds(plain)} ({guided / plain:.2f} times). {said}"
    )


def times(record: Record) -> tuple[float | None, float | None]:
    """Return the median milliseconds of the guided steps and of the others; None without any.

    The first step of a run is left out if its kind has others: it may load and prepare things.
    """
    first = record.steps[:1]

    def typical(steps: list[StepRecord]) -> float | None:
        found = [step.milliseconds for step in steps]
        if len(found) > 1 and steps[0] in first:
            found = found[1:]
        return median(found) if found else None

    guided = [step for step in record.steps if step.branches]
    return typical(guided), typical([step for step in record.steps if not step.branches])


def _share(part: float, whole: float) -> str:
    return _percent(part / whole) if whole > 0 else "none"


def _percent(share: float) -> str:
    percent = share * 100
    return f"{percent:.0f} %" if percent >= 9.95 or percent == 0 else f"{percent:.2g} %"


def _milliseconds(value: float) -> str:
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{value:.0f} ms"
