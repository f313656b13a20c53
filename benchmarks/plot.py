"""The table as a picture: cost of a step in units of the same step without guidance."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from benchmarks.models import KINDS

_RELATIVE = "#7a9c59"
_COLOURS = {"core PAG": "#9a9a9a", "SEG, reuse off": "#d08a3c", "SEG, reuse on": "#2f6f9f"}


def draw(result: dict[str, Any], path: str) -> None:
    """Write a bar chart of all counted and measured ratios."""
    panels, reads = [], []
    for name, rows in result["counted"].items():
        kind = KINDS[name]
        title = f"{kind.title} {kind.size[0]}x{kind.size[1]}"
        panels.append((f"{title}: FLOPs", rows))
        reads.append((f"{title}: parameters read", [r | {"ratio": r["read ratio"]} for r in rows]))
    panels += reads[:1]
    if result["measured"]:
        settings = result["settings"]
        title = f"{KINDS[settings['model']].title} {settings['size']}: wall time"
        panels.append((f"{title}, {settings['hardware']}", result["measured"]))
    panels += [(f"{small['title']}: wall time", small["rows"]) for small in result["weights"][:1]]
    # A step that a panel lacks leaves its place empty: all panels have the same rows.
    panels = [(title, [r for r in rows if r["method"] != "CFG only"]) for title, rows in panels]
    places: dict[str, int] = {}
    for _, rows in panels:
        for row in rows:
            places.setdefault(_label(row), len(places))
    size = (3.6 * len(panels), 1.2 + 0.21 * len(places))
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (title, rows) in zip(axes[0], panels, strict=True):
        _panel(axis, title, rows, places)
    axes[0][0].set_yticks(list(places.values()), list(places), fontsize=7)
    axes[0][0].invert_yaxis()
    figure.suptitle("Cost of a guided step; the same step without guidance is 1", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def _panel(axis: Any, title: str, rows: list[dict[str, Any]], places: dict[str, int]) -> None:
    bars = axis.barh(
        [places[_label(row)] for row in rows],
        [row["ratio"] for row in rows],
        color=[_COLOURS.get(row["method"], _RELATIVE) for row in rows],
    )
    axis.bar_label(bars, [f"{row['ratio']:.2f}" for row in rows], padding=2, fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xlim(0.0, 1.2 * max(row["ratio"] for row in rows))
    axis.set_title(title, fontsize=9)


def _label(row: dict[str, Any]) -> str:
    control = " + ControlNet" if row["control"] else ""
    return f"cfg {row['cfg']:g}{control}: {row['title']}"
