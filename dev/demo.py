"""`dev.py demo`: the same seeds without and with guidance, through the real server."""

from __future__ import annotations

import argparse
import functools
import io
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dev.comfy_tree import host_tree
from dev.demo_model import butterflies
from dev.demo_picture import Row, report, write_picture
from dev.evaluation import checkpoint, demo
from dev.evaluation.render import SAVE, Plan
from dev.evaluation.settings import Setting, off, seg, shown_grid
from dev.host import Server
from dev.machine import link_file
from dev.places import ARTIFACTS
from dev.say import Failure, say, step

DEMO_BATCH = 6
DEMO_PROMPTS = (demo.NOTHING, *butterflies.HUES)
SIZE = (1024, 1024)
STEPS = 25
CFG = 4.0
CHECKPOINT_COLUMNS = [off(), *(seg(sigma, 3.0) for sigma in (1.0, 4.0, math.inf))]
PATIENCE = 24 * 3600.0  # seconds; a large model on a CPU takes its time
SHOWN = ("ComfyUI version", "Device:", "loaded completely", "WARNING", "ERROR")


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Render the comparison, write the labelled picture and report the figures."""
    del rest
    begin = time.monotonic()
    file = _checkpoint(options)
    rows = _rows(options, file)
    columns = shown_grid() if file is None else CHECKPOINT_COLUMNS
    tree = host_tree()
    step("Starting ComfyUI (about 15 s)")
    progress = Progress()
    with Server(tree, demo=file is None, on_line=progress) as host:
        if file is not None:
            link_file(file, host.base / "models" / "checkpoints" / file.name)
        for row in rows:
            _render(host, row, columns, options.seed, progress)
    out = Path(options.out or ARTIFACTS / "demo.png").resolve()
    source = file.name if file else "demo model"
    title = f"Smoothed Energy Guidance: {source}, seed {options.seed} in every column"
    write_picture(rows, out, title)
    report(rows)
    say(f"\nThe picture: {out}\n({time.monotonic() - begin:.0f} s in all)")
    return 0


def _checkpoint(options: argparse.Namespace) -> Path | None:
    if options.checkpoint is None:
        if options.size:
            raise Failure("--size needs --checkpoint; the demo model draws at one size.")
        return None
    path = Path(options.checkpoint).expanduser().resolve()
    if not path.is_file():
        raise Failure(f"There is no checkpoint file {path}.")
    return path


def _rows(options: argparse.Namespace, file: Path | None) -> list[Row]:
    """Return a row without a prompt and a row with one, each with its sampling."""
    if file is None:
        prompt = options.prompt or "blue"
        if prompt not in DEMO_PROMPTS:
            choices = ", ".join(DEMO_PROMPTS)
            raise Failure(f"The demo model knows the prompts {choices}; it got {prompt!r}.")
        sources = functools.partial(demo.sources, scale=4)
        plan = Plan(sources, [demo.NOTHING], demo.STEPS, demo.CFG, DEMO_BATCH, PATIENCE)
    else:
        prompt = options.prompt or "a photograph of a lighthouse on a cliff, evening light"
        sources = checkpoint.sources(file.name, options.size or SIZE)
        plan = Plan(sources, [""], STEPS, CFG, seconds=PATIENCE)
    plan = replace(plan, steps=options.steps or plan.steps)
    asked = f'cfg {plan.cfg:g}, prompt "{prompt}"'
    return [
        Row("no prompt, cfg 1", "no prompt, cfg 1", replace(plan, cfg=1.0)),
        Row(f"prompt, cfg {plan.cfg:g}", asked, replace(plan, prompts=[prompt])),
    ]


def _render(
    host: Server, row: Row, columns: Sequence[Setting], seed: int, progress: Progress
) -> None:
    for setting in columns:
        graph = row.plan.graph(setting, row.plan.prompts[0], seed)
        progress.start(f"{row.label} | {setting.name}")
        found = host.run(graph, row.plan.seconds)[SAVE]["images"]
        row.images[setting.name] = [_opened(host.image_bytes(image)) for image in found]
        row.seconds[setting.name] = progress.done() / len(found)


class Progress:
    """Shows the server's lines that matter, and how far a column has come.

    At a terminal that is one moving line, into a pipe a line at the half.
    """

    def __init__(self) -> None:
        self._label = ""
        self._begin = 0.0
        self._moving = sys.stdout.isatty()

    def start(self, label: str) -> None:
        """Begin a column."""
        self._label, self._begin = f"{label:<28}", time.monotonic()

    def done(self) -> float:
        """End a column and return its seconds."""
        spent = time.monotonic() - self._begin
        say(f"{chr(13) if self._moving else ''}   {self._label} done        {spent:5.1f} s")
        return spent

    def __call__(self, line: str) -> None:
        """Take one line of the server's log; the sampler's bar writes `9/20 [00:01<...`."""
        bar = re.search(r"\b(\d+)/(\d+) \[", line)
        if bar:
            step, total = map(int, bar.groups())
            text = f"   {self._label} step {step}/{total} {time.monotonic() - self._begin:5.1f} s"
            if self._moving:
                sys.stdout.write(f"\r{text}")
                sys.stdout.flush()
            elif 0 < step < total and step % max(1, total // 2) == 0:
                say(text)
        elif any(word in line for word in SHOWN):
            say(f"   ComfyUI: {line.strip()}")


def _opened(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")
