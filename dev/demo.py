"""`dev.py demo`: the same seeds without and with guidance, through the real server."""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from pathlib import Path
from typing import Any

from dev import graphs
from dev.comfy_tree import host_tree
from dev.demo_model import butterflies
from dev.demo_picture import Row, report, write_picture
from dev.evaluation.settings import shown_grid
from dev.host import Server
from dev.machine import link_file
from dev.places import ARTIFACTS, DEMO_PACK
from dev.say import Failure, say, step

COLUMNS = (graphs.OFF, "sigma 1", "sigma 4", graphs.INFINITE)
DEMO_SIZE = butterflies.SIZE
DEMO_BATCH = 6
DEMO_STEPS = 20
DEMO_CFG = 2.0
CFG = 4.0
DEMO_PROMPTS = ("nothing", *butterflies.HUES)
PATIENCE = 24 * 3600.0  # seconds; a large model on a CPU takes its time
SHOWN = ("ComfyUI version", "Device:", "loaded completely", "WARNING", "ERROR")


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Render the comparison, write the labelled picture and report the figures."""
    del rest
    begin = time.monotonic()
    checkpoint = _checkpoint(options)
    rows = _rows(options, checkpoint)
    tree = host_tree()
    step("Starting ComfyUI (about 15 s)")
    progress = Progress()
    with Server(tree, demo=checkpoint is None, on_line=progress) as host:
        if checkpoint is not None:
            link_file(checkpoint, host.base / "models" / "checkpoints" / checkpoint.name)
        for row in rows:
            _render(host, row, options, checkpoint, progress)
    out = Path(options.out or ARTIFACTS / "demo.png").resolve()
    write_picture(rows, out, _title(options, checkpoint))
    report(rows)
    say(f"\nThe picture: {out}\n({time.monotonic() - begin:.0f} s in all)")
    return 0


def _checkpoint(options: argparse.Namespace) -> Path | None:
    if options.checkpoint is None:
        if options.size:
            raise Failure("--size needs --checkpoint; the demo model draws at one size.")
        if not (DEMO_PACK / "__init__.py").exists():
            raise Failure(f"The demo model's pack is missing: {DEMO_PACK}.")
        return None
    path = Path(options.checkpoint).expanduser().resolve()
    if not path.is_file():
        raise Failure(f"There is no checkpoint file {path}.")
    return path


def _rows(options: argparse.Namespace, checkpoint: Path | None) -> list[Row]:
    prompt = options.prompt
    if checkpoint is None:
        prompt = prompt or "blue"
        if prompt not in DEMO_PROMPTS:
            choices = ", ".join(DEMO_PROMPTS)
            raise Failure(f"The demo model knows the prompts {choices}; it got {prompt!r}.")
    prompt = prompt or "a photograph of a lighthouse on a cliff, evening light"
    nothing, cfg = ("nothing", DEMO_CFG) if checkpoint is None else ("", CFG)
    return [
        Row("no prompt, cfg 1", "no prompt, cfg 1", nothing, 1.0),
        Row(f"prompt, cfg {cfg:g}", f'cfg {cfg:g}, prompt "{prompt}"', prompt, cfg),
    ]


def _columns(checkpoint: Path | None) -> dict[str, graphs.Graph]:
    """Return a workflow for each column: the shipped one's, or what `evaluate` found to show."""
    parts = graphs.columns(graphs.comparison())
    for column in COLUMNS:
        if column not in parts:
            raise Failure(f"The shipped comparison has no column {column!r}.")
    if checkpoint is not None:
        return {column: parts[column] for column in COLUMNS}
    guided = {
        each.name: graphs.with_guidance(parts[graphs.INFINITE], **each.inputs)
        for each in shown_grid()
        if each.node == graphs.GUIDANCE
    }
    return {graphs.OFF: parts[graphs.OFF], **guided}


def _render(
    host: Server,
    row: Row,
    options: argparse.Namespace,
    checkpoint: Path | None,
    progress: Progress,
) -> None:
    steps = options.steps
    for column, part in _columns(checkpoint).items():
        if checkpoint is None:
            steps = steps or DEMO_STEPS
            graph = graphs.for_demo_model(part, row.prompt, size=DEMO_SIZE, batch=DEMO_BATCH)
        else:
            graph = graphs.for_checkpoint(part, checkpoint.name, row.prompt, options.size)
        graph = graphs.with_sampling(graph, cfg=row.cfg, seed=options.seed, steps=steps)
        progress.start(f"{row.label} | {column}")
        found = host.run(graph, PATIENCE)["save"]["images"]
        row.images[column] = [_opened(host.image_bytes(image)) for image in found]
        row.seconds[column] = progress.done() / len(found)


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


def _title(options: argparse.Namespace, checkpoint: Path | None) -> str:
    source = f"scale 3, {checkpoint.name}" if checkpoint else "demo model"
    return f"Smoothed Energy Guidance: {source}, seed {options.seed} in every column"
