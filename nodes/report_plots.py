"""The plots and heat maps of a recorded run, in the colours of ComfyUI's dark theme."""

from __future__ import annotations

import io
import itertools
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from .host.probe.probe import BlockRecord, BranchRecord, Record, StepRecord
from .pictures import BACKGROUND, FOREGROUND, to_image, to_pixels, with_caption

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = "#43434b"
QUIET = "#a8a8b3"
GUIDANCE, CFG, PLAIN, BLURRED, WHOLE = "#4cc9f0", "#f9c74f", "#f9844a", "#4cc9f0", "#f94144"
COLOURS = (GUIDANCE, "#90be6d", "#f15bb5", "#f9844a")
MOST_IMAGES = 16
MAP_SIDE = 512
NEEDS_MATPLOTLIB = (
    "SEG Report draws with matplotlib, which is not installed in ComfyUI's Python. Install it with "
    "`python -m pip install matplotlib` (in the portable version "
    "`python_embeded\\python.exe -m pip install matplotlib`) and start ComfyUI again. The other "
    "nodes of this pack do not need it."
)
STYLE = {
    "font.size": 20,
    "axes.titlesize": 22,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 19,
    "legend.fontsize": 18,
    "lines.linewidth": 3,
    "lines.markersize": 8,
    "figure.facecolor": BACKGROUND,
    "axes.facecolor": BACKGROUND,
    "savefig.facecolor": BACKGROUND,
    "text.color": FOREGROUND,
    "axes.labelcolor": FOREGROUND,
    "axes.edgecolor": GRID,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.framealpha": 0.7,
    "legend.facecolor": BACKGROUND,
    "legend.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def require_matplotlib() -> Any:
    """Return matplotlib.

    Raises:
        RuntimeError: if it is not installed; says how to install it.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError as error:
        raise RuntimeError(NEEDS_MATPLOTLIB) from error
    return matplotlib


def plots(record: Record) -> torch.Tensor:
    """Return the plots of a run as an IMAGE: guidance, variance, energy, and time by step."""
    matplotlib = require_matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(9.6, 12.6), dpi=100, layout="constrained")
        figure.get_layout_engine().set(hspace=0.04, h_pad=0.12)
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        panels = figure.subplots(4, 1)
        _plot_guidance(panels[0], record)
        _plot_blur(panels[1], record, "variance", "Variance of the attention logits")
        _plot_blur(panels[2], record, "logsumexp", "Log-sum-exp (energy = minus this)")
        _add_energy_axis(panels[2], record)
        _plot_time(panels[3], record)
        for panel in panels:
            panel.set_xlim(0.4, len(record.steps) + 0.6)
            panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=12))
        panels[-1].set_xlabel(_noise(record))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    buffer.seek(0)
    return to_pixels(Image.open(buffer))[None]


def _noise(record: Record) -> str:
    if not record.steps:
        return "step"
    first, last = record.steps[0].noise_sigma, record.steps[-1].noise_sigma
    return f"step (noise sigma {first:.3g} to {last:.3g})"


def _series(record: Record, index: int, value: Any) -> tuple[list[int], list[float]]:
    pairs = [
        (number, value(step.branches[index]))
        for number, step in enumerate(record.steps, 1)
        if index in step.branches
    ]
    present = [(number, found) for number, found in pairs if found is not None]
    return [number for number, _ in present], [found for _, found in present]


def _plot_guidance(panel: Axes, record: Record) -> None:
    panel.set_title("Size of the push, % of the prediction")
    for index, branch in enumerate(record.branches):
        share = _series(record, index, lambda step: 100 * step.against_prediction)
        colour = COLOURS[index % len(COLOURS)]
        panel.plot(*share, "o-", color=colour, label=_short(branch.perturbation.label))
    if record.branches:
        cfg = _series(record, 0, _cfg_share)
        if any(cfg[1]):
            panel.plot(*cfg, "s--", color=CFG, label="cfg")
    idle = [n for n, step in enumerate(record.steps, 1) if not step.branches]
    for number in idle:
        panel.axvspan(number - 0.5, number + 0.5, color=GRID, alpha=0.45, lw=0)
    if idle:
        panel.plot([], [], color=GRID, lw=10, label="not active")
    where: Literal["best", "lower center"] = "best"
    if panel.lines:  # cfg may be a hundred times the guidance, so that only a log scale shows both
        panel.set_yscale("log")
        ticker = require_matplotlib().ticker
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(ticker.NullFormatter())  # or it writes 4 x 10^1 there
        low, high = panel.get_ylim()
        panel.set_ylim(low * (low / high) ** 0.35, high)  # room for the legend
        where = "lower center"
    _legend(panel, where)


def _cfg_share(step: BranchRecord) -> float:
    return 100 * step.cfg / step.prediction if step.prediction else 0.0


def _short(label: str) -> str:
    return "".join(word[0] for word in label.replace("-", " ").split())


def _plot_blur(panel: Axes, record: Record, name: str, title: str) -> None:
    panel.set_title(title)
    for which, colour, words in (("plain", PLAIN, "without blur"), ("blurred", BLURRED, "blurred")):
        lines = _by_block(record, which, name)
        for points in lines.values():
            if len(lines) > 1:
                panel.plot(*zip(*points, strict=True), color=colour, lw=1, alpha=0.4)
        middle = _averaged(lines)
        if middle:
            style = "o--" if which == "plain" else "o-"
            panel.plot(*zip(*middle, strict=True), style, color=colour, label=words)
    if panel.lines:
        _legend(panel)
    else:
        _say(panel, "no attention was blurred")


def _by_block(record: Record, which: str, name: str) -> dict[Any, list[tuple[int, float]]]:
    lines: dict[Any, list[tuple[int, float]]] = {}
    for number, step in enumerate(record.steps, 1):
        for index, branch in step.branches.items():
            for block, measured in branch.blocks.items():
                value = getattr(getattr(measured, which), name)
                lines.setdefault((index, block), []).append((number, value))
    return lines


def _averaged(lines: dict[Any, list[tuple[int, float]]]) -> list[tuple[int, float]]:
    by_step: dict[int, list[float]] = {}
    for points in lines.values():
        for number, value in points:
            by_step.setdefault(number, []).append(value)
    return [(number, sum(found) / len(found)) for number, found in sorted(by_step.items())]


def _add_energy_axis(panel: Axes, record: Record) -> None:
    """Write the energy of the whole map on the right: minus log-sum-exp times the queries."""
    found = {b.queries for b in _blocks(record)}
    if len(found) != 1:
        return
    queries = found.pop()

    def to_energy(logsumexp: Any) -> Any:
        return -logsumexp * queries

    def to_logsumexp(energy: Any) -> Any:
        return -energy / queries

    right = panel.secondary_yaxis("right", functions=(to_energy, to_logsumexp))
    right.set_ylabel("energy of the map")
    right.tick_params(colors=QUIET)


def _blocks(record: Record) -> list[BlockRecord]:
    return [
        block
        for step in record.steps
        for branch in step.branches.values()
        for block in branch.blocks.values()
    ]


def _plot_time(panel: Axes, record: Record) -> None:
    passes = [b for step in record.steps for b in step.branches.values()]
    joined = sum(b.shared for b in passes)
    whole = sum(sum(b.full.values()) for b in passes)
    panel.set_title(f"Milliseconds; {joined} of {joined + whole} predictions in one call")
    for colour, words, kind in (
        (QUIET, "step without guidance", "plain"),
        (GUIDANCE, "guided step", "joined"),
        (WHOLE, "guided step with a whole pass", "whole"),
    ):
        chosen = [
            (number, step.milliseconds)
            for number, step in enumerate(record.steps, 1)
            if _kind(step) == kind
        ]
        if chosen:
            panel.bar(*zip(*chosen, strict=True), color=colour, label=words)
    panel.set_ylim(0, 2.4 * max([s.milliseconds for s in record.steps] or [1.0]))
    _legend(panel, loc="upper right")


def _kind(step: StepRecord) -> str:
    if not step.branches:
        return "plain"
    return "whole" if any(sum(b.full.values()) for b in step.branches.values()) else "joined"


def _legend(panel: Axes, loc: Literal["best", "lower center", "upper right"] = "best") -> None:
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        panel.legend(handles, labels, loc=loc, ncols=3 if loc == "lower center" else 1)
    else:
        _say(panel, "nothing was guided")


def _say(panel: Axes, words: str) -> None:
    panel.text(0.5, 0.5, words, transform=panel.transAxes, ha="center", color=QUIET)


def heat_maps(record: Record, image: torch.Tensor | None) -> torch.Tensor:
    """Return where guidance acted, brightest where it was strongest, as an IMAGE batch.

    For each image all guided steps together, then each third of them. Over the image in grey, if
    there is one. A run without guidance, or of latents without a picture's shape, gives one frame
    that says so.
    """
    if record.heat is None:
        blank = Image.new("RGB", (MAP_SIDE, MAP_SIDE), BACKGROUND)
        return to_pixels(with_caption(blank, "no guidance to show"))[None]
    count = record.heat.shape[1]
    chosen = [i * count // min(count, MOST_IMAGES) for i in range(min(count, MOST_IMAGES))]
    frames = [
        with_caption(to_image(_heated(squares[:, index].mean(dim=0).sqrt(), below)), words)
        for index in chosen
        for below in (_below(image, index, count),)
        for words, squares in _phases(record.heat)
    ]
    return torch.stack([to_pixels(frame) for frame in frames])


def _phases(heat: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    steps = heat.shape[0]
    if steps < 3:
        return [("all guided steps", heat)]
    edges = [round(steps * part / 3) for part in range(4)]
    names = ("first third", "second third", "last third")
    thirds = [heat[a:b] for a, b in itertools.pairwise(edges)]
    return [("all guided steps", heat), *zip(names, thirds, strict=True)]


def _below(image: torch.Tensor | None, index: int, count: int) -> torch.Tensor | None:
    """Return the image that belongs to a map; a video has more frames than maps."""
    if image is None:
        return None
    last = image.shape[0] - 1
    return image[min(last, round(index * last / (count - 1)) if count > 1 else 0), ..., :3]


def _heated(strength: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
    height, width = strength.shape
    if image is None:
        factor = max(1, MAP_SIDE // max(height, width))
        image = torch.zeros(height * factor, width * factor, 3)
    level = torch.quantile(strength.flatten(), 0.995).clamp(min=1e-12)
    scaled = (strength / level).clamp(0, 1)[None, None]
    scaled = torch.nn.functional.interpolate(
        scaled, size=tuple(image.shape[:2]), mode="bilinear", align_corners=False
    )[0, 0]
    colours = torch.from_numpy(require_matplotlib().colormaps["inferno"](scaled.numpy())[..., :3])
    grey = image.float().cpu().mean(dim=-1, keepdim=True)
    opacity = 0.25 + 0.6 * scaled[..., None]
    return (1 - opacity) * grey + opacity * colours.float()
