"""Rendering of an evaluation through the real server: paired seeds, resumable, with progress.

Every image is a file whose folder is named after everything it depends on: the graph, the
model file, the source of the pack, the version of ComfyUI. What lies there is not made anew.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.evaluation.settings import Setting
from dev.graphs import Graph, ksampler, new_node
from dev.host import Server
from dev.places import ROOT, made_folder
from dev.say import disk_errors, say

SOURCES = ("nodes", "seg_core", "dev/demo_pack")
REPORT_EVERY = 15.0
SAVE = "save"


@dataclass(frozen=True)
class Job:
    """One queued workflow and the files that its images become."""

    graph: Graph
    files: tuple[Path, ...]

    def is_done(self) -> bool:
        """Tell whether every image is there."""
        return all(file.exists() for file in self.files)


@dataclass(frozen=True)
class Plan:
    """The sampling that all settings share.

    Attributes:
        sources: from prompt and batch to nodes `model`, `positive`, `negative`, `latent`, `decode`.
        prompts: one of them for each image, in turn.
        steps: sampling steps.
        cfg: of the sampler.
        batch: images in one workflow; they share its prompt.
        seconds: how long one workflow may take.
    """

    sources: Any
    prompts: Sequence[str]
    steps: int
    cfg: float
    batch: int = 1
    seconds: float = 3600.0

    def graph(self, setting: Setting, prompt: str, seed: int) -> Graph:
        """Return the workflow of one setting, prompt and seed."""
        graph: Graph = self.sources(prompt, self.batch)
        if setting.node is not None:
            graph["guidance"] = new_node(setting.node, model=["model", 0], **setting.inputs)
        model = "model" if setting.node is None else "guidance"
        graph["sampler"] = ksampler(model, steps=self.steps, cfg=self.cfg, seed=seed)
        graph["decode"]["inputs"]["samples"] = ["sampler", 0]
        graph[SAVE] = new_node("SaveImage", images=["decode", 0], filename_prefix="evaluate")
        return graph

    def jobs(self, setting: Setting, seeds: range, folder: Path, token: str) -> list[Job]:
        """Return the workflows of one setting; the images of all settings have the same seeds."""
        found = []
        for number, first in enumerate(seeds[:: self.batch]):
            graph = self.graph(setting, self.prompts[number % len(self.prompts)], first)
            place = folder / digest(graph, token)
            names = (f"{first + index:06d}.png" for index in range(self.batch))
            found.append(Job(graph, tuple(place / name for name in names)))
        return found


def digest(graph: Graph, token: str) -> str:
    """Return a name for everything that images depend on but their seed."""
    described = json.loads(json.dumps(graph))
    for node in described.values():
        node["inputs"].pop("seed", None)
    text = json.dumps([described, token], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def token_of(model: Path, version: str, *, by_content: bool) -> str:
    """Return what stands for the model's file, the pack's source and ComfyUI's version."""
    if by_content:
        own = hashlib.sha256(model.read_bytes()).hexdigest()
    else:  # gigabytes: its name, size and date will do
        state = model.stat()
        own = f"{model.name} {state.st_size} {state.st_mtime_ns}"
    source = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            source.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return f"{own} {source.hexdigest()} {version}"


def render(host: Server, jobs: Sequence[Job], seconds: float) -> None:
    """Make the images that are missing, and say how long the rest will take."""
    missing = [job for job in jobs if not job.is_done()]
    total, left = (sum(len(job.files) for job in each) for each in (jobs, missing))
    say(f"   {total} images, {total - left} of them there already")
    begin = said = time.monotonic()
    for number, job in enumerate(missing, 1):
        images = host.run(job.graph, seconds)[SAVE]["images"]
        for image, file in zip(images, job.files, strict=True):
            _keep(file, host.image_bytes(image))
            # The server's own copy would double what a long run needs of the disk.
            (host.base / "output" / image["filename"]).unlink(missing_ok=True)
        now = time.monotonic()
        if now - said > REPORT_EVERY or number in (1, len(missing)):
            said = now
            say(f"   {progress(number, len(missing), left, now - begin)}")


def progress(done: int, jobs: int, images: int, spent: float) -> str:
    """Say how far a run has come and how long the rest will take at the pace so far."""
    rest = spent / done * (jobs - done)
    return f"{round(images * done / jobs)} of {images} made, about {duration(rest)} left"


def duration(seconds: float) -> str:
    """Return a duration as a person would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _keep(file: Path, data: bytes) -> None:
    """Write a file so that it is there wholly or not at all."""
    made_folder(file.parent)
    with disk_errors(file):
        partial = file.with_suffix(".part")
        partial.write_bytes(data)
        partial.replace(file)


def pictures(files: Sequence[Path], side: int | None = None) -> Iterator[Any]:
    """Yield images as float32 arrays in [0, 1], cut and shrunk to a square of `side` if given."""
    import numpy as np
    from PIL import Image, ImageOps

    for file in files:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        if side is not None:
            image = ImageOps.fit(image, (side, side), Image.Resampling.BOX)
        yield np.asarray(image, dtype=np.float32) / 255.0
