"""A recorded run summed up in five lines."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median

from .host import Branch
from .host.probe.probe import BranchRecord, Measures, Record, StepRecord


def summary(record: Record, runs: int, made_it: bool) -> str:
    """Return what ran, its effect, what the blur did, what the log says of it, and the time.

    Args:
        record: the run.
        runs: how many runs the probe has seen.
        made_it: the run made the latent that the report was given.
    """
    guided = [(b, list(record.guided_by(i).values())) for i, b in enumerate(record.branches)]
    effects = [_effect(b.perturbation.label, steps) for b, steps in guided if steps]
    blurs = [_blur(b.perturbation.where, steps) for b, steps in guided]
    which = "which made this latent" if made_it else "the last one; it did not make this latent"
    methods = "; ".join(map(_described, record.branches))
    lines = (
        f"Run {record.number} of {runs}, {which}: {len(record.steps)} model evaluations. "
        f"{methods or 'No guidance of this pack is on the model'}.",
        " ".join(effects) or "Nothing was added to the prediction.",
        " ".join(filter(None, blurs)) or "No attention was blurred.",
        " ".join(f"{line}." for line in record.lines) or "No prediction was guided.",
        f"{_time(record)}. "
        + (f"Warning: {' '.join(record.warnings)}" if record.warnings else "No warnings."),
    )
    return "\n".join(lines)


def _described(branch: Branch) -> str:
    perturbation = branch.perturbation
    smooth, blur = perturbation.smooth, ""
    if smooth is not None:
        blur = ", infinite blur" if smooth.one_query else f", blur sigma {smooth.sigma:g}"
    return f"{perturbation.label}, {perturbation.where}, scale {branch.scale:g}{blur}"


def _effect(label: str, steps: Sequence[BranchRecord]) -> str:
    moved = _percent(mean(step.share(step.guidance) for step in steps))
    begin = f"{label} moved the prediction by {moved} on average"
    with_cfg = [step for step in steps if step.cfg > 0]
    if not with_cfg:
        return f"{begin}; there was no cfg to compare with (cfg 1, or both prompts are equal)."
    times = mean(step.guidance / step.cfg for step in with_cfg)
    cosine = mean(step.cosine for step in with_cfg)
    direction = "in the same direction as" if cosine > 0 else "against"
    if abs(cosine) <= 0.3:
        direction = "mostly independent of"
    return f"{begin}: {times:.2f} times the push of cfg, {direction} it (cosine {cosine:+.2f})."


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
