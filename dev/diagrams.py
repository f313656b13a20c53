"""The diagrams of the help pages, computed by `seg_core`; each function returns its picture."""

from __future__ import annotations

import io
import math
from typing import Any

BLUE, DARK, LIGHT = "#4cc9f0", "#1b1b1f", "#f0f0f0"
GRID = (16, 24)


def blur_kernels() -> Any:
    """Show what one query is made of at several widths of the blur."""
    import torch

    from seg_core import gaussian_matrix

    figure, panels = _figure(4, (9.6, 3.0))
    side, centre = 32, 15
    for panel, sigma in zip(panels, (1.0, 4.0, 16.0, math.inf), strict=True):
        line = gaussian_matrix(side, sigma, kernel="full")[centre].float()
        panel.imshow(torch.outer(line, line), cmap="inferno", vmin=0)
        panel.set_title("infinite" if math.isinf(sigma) else f"sigma {sigma:g}")
    return _drawn(figure)


def _attention() -> Any:
    """Return logits of a smooth random field of queries and keys over a grid."""
    import torch

    from seg_core import blur_queries

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(1, GRID[0] * GRID[1], 32, generator=generator)
    smooth = blur_queries(tokens, GRID, 1.2)
    smooth = smooth / smooth.std()
    return (smooth @ smooth.mT)[0] / math.sqrt(32) * 1.3


def attention_maps() -> Any:
    """Show where one place looks: plainly, blurred, with the mean query, and seeing itself."""
    import torch

    from seg_core import smoothed_logits

    logits = _attention()
    here = 5 * GRID[1] + 7
    shown = {
        "plain": logits.softmax(-1)[here],
        "SEG, sigma 2": smoothed_logits(logits, GRID, 2.0).softmax(-1)[here],
        "SEG, infinite": smoothed_logits(logits, GRID, math.inf).softmax(-1)[here],
        "PAG": torch.eye(len(logits))[here],
    }
    figure, panels = _figure(4, (9.6, 2.5))
    for panel, (words, weights) in zip(panels, shown.items(), strict=True):
        panel.imshow(weights.reshape(GRID), cmap="inferno", vmin=0)
        panel.plot(here % GRID[1], here // GRID[1], "o", mec=BLUE, mfc="none", ms=20, mew=2)
        panel.set_title(words)
    return _drawn(figure)


def energy() -> Any:
    """Show what the paper proves: blur lowers variance, log-sum-exp and curvature."""
    from seg_core import energy_curvature, logit_variance, mean_logsumexp, smoothed_logits

    logits = _attention()
    sigmas = [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, math.inf]
    smoothed = [smoothed_logits(logits, GRID, sigma) for sigma in sigmas]
    series = {
        "variance of the logits": [float(logit_variance(each)) for each in smoothed],
        "mean log-sum-exp": [float(mean_logsumexp(each)) for each in smoothed],
        "curvature": [float(energy_curvature(logits, GRID, sigma)) for sigma in sigmas],
    }
    figure, panels = _figure(3, (9.6, 3.6), picture=False)
    words = ["0" if not s else "inf" if math.isinf(s) else f"{s:g}" for s in sigmas]
    for panel, (title, values) in zip(panels, series.items(), strict=True):
        panel.plot(range(len(sigmas)), values, "o-", color=BLUE)
        panel.set_xticks(range(len(sigmas)), words)
        panel.set_title(title)
        panel.set_xlabel("blur sigma")
    return _drawn(figure)


def _figure(count: int, size: tuple[float, float], *, picture: bool = True) -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"text.color": LIGHT, "axes.labelcolor": LIGHT, "axes.edgecolor": "#55555e"}
    ticks = {"xtick.color": LIGHT, "ytick.color": LIGHT, "font.size": 15, "axes.titlesize": 17}
    lines = {"lines.linewidth": 3, "axes.facecolor": DARK, "grid.color": "#43434b"}
    with mpl.rc_context({**style, **ticks, **lines}):
        figure = Figure(figsize=size, dpi=100, layout="constrained", facecolor=DARK)
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, count)
    for panel in panels:
        if picture:
            panel.set_axis_off()
        else:
            panel.grid(visible=True)
    return figure, panels


def _drawn(figure: Any) -> Any:
    from PIL import Image

    data = io.BytesIO()
    figure.savefig(data)
    return Image.open(data).convert("RGB")
