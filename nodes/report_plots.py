"""The plots of a recorded run, in the colours of ComfyUI's dark theme."""

from __future__ import annotations

import io
import itertools
import math
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .host.probe.probe import BlockRecord, Record, StepRecord
from .pictures import BACKGROUND, FOREGROUND, to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = "#43434b"
QUIET = "#a8a8b3"
GUIDANCE, CFG, PLAIN, BLURRED, WHOLE = "#4cc9f0", "#f9c74f", "#f9844a", "#4cc9f0", "#f94144"
HELD = "#90be6d"
COLOURS = (GUIDANCE, HELD, "#f15bb5", "#f9844a")
LEGEND_COLUMNS = 4
NEEDS_MATPLOTLIB = (
    "SEG Report draws with matplotlib, which is not installed in ComfyUI's Python. Install it with "
    "`python -m pip install matplotlib` (in the portable version `python_embeded\\python.exe -m "
    "pip install matplotlib`) and start ComfyUI again. The other nodes of this pack do not need it."
)
STYLE = {
    "font.size": 20,
    "axes.titlesize": 22,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 19,
    "legend.fontsize": 18,
    "legend.framealpha": 0.7,
    "lines.linewidth": 3,
    "lines.markersize": 8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"{part}.facecolor": BACKGROUND for part in ("figure", "axes", "savefig", "legend")},
    **dict.fromkeys(("text.color", "axes.labelcolor"), FOREGROUND),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), GRID),
    **dict.fromkeys(("xtick.color", "ytick.color"), QUIET),
}
BLURS = (
    ("plain", "o--", PLAIN, "without blur"),
    ("blurred", "o-", BLURRED, "blurred"),
)
KINDS = {
    "plain": (QUIET, "step without guidance"),
    "held": (HELD, "held step"),
    "joined": (GUIDANCE, "guided step"),
    "whole": (WHOLE, "guided step with a whole pass"),
}


def require_matplotlib() -> Any:
    """Return matplotlib.

    Raises:
        RuntimeError: if it is not installed; says how to install it.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise RuntimeError(NEEDS_MATPLOTLIB) from error
    return matplotlib


def plots(record: Record) -> torch.Tensor:
    """Return the plots of a run as an IMAGE: guidance, variance, energy, and time by step.

    Where there is a cfg to compare with, the effective cfg is one more.
    """
    matplotlib = require_matplotlib()
    effective = _effective_cfg(record)
    with matplotlib.rc_context(STYLE):
        size = (9.6, 15.4 if effective else 12.6)
        figure = matplotlib.figure.Figure(figsize=size, dpi=100, layout="constrained")
        figure.get_layout_engine().set(hspace=0.04, h_pad=0.12)
        guidance, *more, variance, logsumexp, time = figure.subplots(4 + bool(effective), 1)
        lines = _by_block(record)
        _plot_guidance(guidance, record)
        for panel in more:
            panel.set_title("Effective cfg of the result")
            _plot(panel, effective, "o-", color=CFG)
        _plot_blur(variance, lines, "variance", "Variance of the attention logits")
        _plot_blur(logsumexp, lines, "logsumexp", "Log-sum-exp (energy = minus this)")
        _add_energy_axis(logsumexp, lines)
        _plot_time(time, record)
        for panel in figure.axes:
            panel.set_xlim(0.4, len(record.steps) + 0.6)
            panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=12))
        sigmas = [step.noise_sigma for step in record.steps]
        noise = f" (noise sigma {sigmas[0]:.3g} to {sigmas[-1]:.3g})" if sigmas else ""
        time.set_xlabel(f"step{noise}")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return to_pixels(Image.open(buffer))[None]


def _effective_cfg(record: Record) -> dict[int, float]:
    """Return the effective cfg after the last branch of each step, by the numbers of the steps."""
    last = {n: list(s.branches.values())[-1] for n, s in enumerate(record.steps, 1) if s.branches}
    found = {number: branch.effective_cfg for number, branch in last.items()}
    return {number: cfg for number, cfg in found.items() if not math.isnan(cfg)}


def _plot_guidance(panel: Axes, record: Record) -> None:
    panel.set_title("Size of the push, % of the prediction")
    for index, (branch, colour) in enumerate(zip(record.branches, itertools.cycle(COLOURS))):
        sizes = {n: 100 * step.share(step.guidance) for n, step in record.guided_by(index).items()}
        initials = [word[0] for word in branch.perturbation.label.replace("-", " ").split()]
        _plot(panel, sizes, "o-", color=colour, label="".join(initials))
    cfg = {n: 100 * step.share(step.cfg) for n, step in record.guided_by(0).items()}
    if any(cfg.values()):
        _plot(panel, cfg, "s--", color=CFG, label="cfg")
    idle = [number for number, step in enumerate(record.steps, 1) if not step.branches]
    for number in idle:
        panel.axvspan(number - 0.5, number + 0.5, color=GRID, alpha=0.45, lw=0)
    if idle:
        panel.plot([], [], color=GRID, lw=10, label="not active")
    if panel.lines:
        _make_logarithmic(panel)
    _legend(panel, loc="lower center", ncols=LEGEND_COLUMNS)


def _make_logarithmic(panel: Axes) -> None:
    """Use a log scale, since cfg may push a hundred times as hard, and make room for the legend."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    rows = math.ceil(len(panel.get_legend_handles_labels()[0]) / LEGEND_COLUMNS)
    bottom = low * (low / high) ** (0.35 * rows)
    ticker = require_matplotlib().ticker
    ticks = (1, 2, 5) if high / bottom < 1000 else (1,)
    panel.set_ylim(bottom, high)
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=ticks))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())  # or it writes 4 x 10^1 there


def _by_block(record: Record) -> list[dict[int, BlockRecord]]:
    """Return the records of each block of each branch, by the numbers of the steps."""
    lines: dict[Any, dict[int, BlockRecord]] = {}
    for index in range(len(record.branches)):
        for number, branch in record.guided_by(index).items():
            for name, block in branch.blocks.items():
                lines.setdefault((index, name), {})[number] = block
    return list(lines.values())


def _plot_blur(panel: Axes, lines: list[dict[int, BlockRecord]], measure: str, title: str) -> None:
    """Plot a measure of attention: a thin line for each block, and a thick one for the average."""
    panel.set_title(title)
    for which, style, colour, label in BLURS:
        values = [{n: getattr(getattr(b, which), measure) for n, b in one.items()} for one in lines]
        if len(values) > 1:
            for line in values:
                _plot(panel, line, color=colour, lw=1, alpha=0.4)
        if values:
            steps = sorted(set().union(*values))
            average = {n: mean(line[n] for line in values if n in line) for n in steps}
            _plot(panel, average, style, color=colour, label=label)
    _legend(panel, empty="no attention was blurred")


def _add_energy_axis(panel: Axes, lines: list[dict[int, BlockRecord]]) -> None:
    """Write the energy of the whole map on the right: minus log-sum-exp times the queries."""
    found = {block.queries for line in lines for block in line.values()}
    if len(found) == 1:
        (queries,) = found
        both_ways = (lambda logsumexp: -logsumexp * queries, lambda energy: -energy / queries)
        right = panel.secondary_yaxis("right", functions=both_ways)
        right.set_ylabel("energy of the map")
        right.tick_params(colors=QUIET)


def _plot_time(panel: Axes, record: Record) -> None:
    branches = [branch for step in record.steps for branch in step.branches.values()]
    joined = sum(branch.joined for branch in branches)
    total = joined + sum(branch.whole for branch in branches)
    share = f"; {joined} of {total} predictions in one call" if total else ""
    panel.set_title(f"Milliseconds{share}")
    times = {number: step.milliseconds for number, step in enumerate(record.steps, 1)}
    for kind, (colour, label) in KINDS.items():
        steps = [number for number in times if _kind(record.steps[number - 1]) == kind]
        if steps:
            panel.bar(steps, [times[number] for number in steps], color=colour, label=label)
    panel.set_ylim(0, 2.4 * max(times.values(), default=1.0))
    _legend(panel, loc="upper right")


def _kind(step: StepRecord) -> str:
    branches = step.branches.values()
    if not branches:
        return "plain"
    if all(branch.held for branch in branches):
        return "held"
    return "whole" if any(branch.whole for branch in branches) else "joined"


def _plot(panel: Axes, points: dict[int, float], *style: Any, **options: Any) -> None:
    panel.plot(list(points), list(points.values()), *style, **options)


def _legend(panel: Axes, empty: str = "nothing was guided", **options: Any) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(**options)
    else:
        panel.text(0.5, 0.5, empty, transform=panel.transAxes, ha="center", color=QUIET)
