"""The effect of guidance against training: the same settings on states of the demo model."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dev.comfy_tree import host_tree, version_of
from dev.evaluation import report
from dev.evaluation.demo import NOTHING, REPORTING, Judge, Stage, counts, plan, publish, rendered
from dev.evaluation.measures import Estimate
from dev.evaluation.render import duration, token_of
from dev.evaluation.report import PM
from dev.evaluation.settings import history_grid
from dev.graphs import OFF
from dev.host import Server
from dev.say import Failure, say, step


def evaluate(options: argparse.Namespace, out: Path) -> int:
    """Measure every weights file that `train --keep` has left, and print one table."""
    begin = time.monotonic()
    count = counts(options)[1]
    files = [Path(name).expanduser().resolve() for name in options.weights]
    for file in files:
        if not file.is_file():
            raise Failure(f"There is no weights file {file}.")
    tree = host_tree()
    judge = Judge()
    settings = history_grid()
    seeds = range(REPORTING, REPORTING + count)
    found = {}
    for file in files:
        os.environ["SEG_DEMO_WEIGHTS"] = str(file)  # read by the demo pack in the server
        token = token_of(file, version_of(tree) or "", by_content=True)
        stage = Stage(f"{file.stem} steps", settings, seeds, plan([NOTHING], 1.0, options))
        step("Starting ComfyUI (about 15 s)")
        with Server(tree, demo=True) as host:
            images = rendered(host, stage, token)
        found[file.stem] = judge.rows(stage, images)
    floor = float(np.mean(judge.data(count).floor))
    parts = [
        _head(count, floor),
        _table("Frechet distance", found, lambda row: row.distance),
        _table(
            "Frechet distance at equal contrast",
            found,
            lambda row: row.matched,
        ),
        _table("Mirror error", found, lambda row: row.mirror),
    ]
    text = "\n\n".join(parts) + "\n"
    figures = {name: [asdict(row) for row in rows] for name, rows in found.items()}
    publish(out, "training", text, {"floor": floor, **figures}, {})
    say(f"({duration(time.monotonic() - begin)} in all)")
    return 0


def _head(count: int, floor: float) -> str:
    return (
        "# Image quality over the demo model's training\n\n"
        f"Written by `python dev.py evaluate --weights FILES`. No prompt, cfg 1, {count} images "
        f"from the same seeds for each figure. The noise floor of the distance is {floor:.4f}. "
        f"{PM} is the standard error of the paired change from *off*."
    )


def _table(
    title: str, found: dict[str, list[report.Row]], figure: Callable[[report.Row], Estimate | None]
) -> str:
    names = [row.name for row in next(iter(found.values()))]
    lines = [f"{title}:\n", f"| steps | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for steps, rows in found.items():
        cells = (_cell(row.name, figure(row)) for row in rows)
        lines.append(f"| {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    error = "" if name == OFF else f" {PM} {estimate.change_error:.3f}"
    return f"{estimate.value:.3f}{error}"
