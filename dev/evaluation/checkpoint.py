"""The evaluation on a person's own checkpoint, with their reference images and prompts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dev.comfy_tree import host_tree, version_of
from dev.evaluation import report
from dev.evaluation.demo import IMAGES, REPORTING, publish
from dev.evaluation.features import WEIGHTS_NOTE, InceptionFeatures, RandomFeatures, has_inception
from dev.evaluation.measures import Gaussian, contrast, saturation
from dev.evaluation.render import Plan, duration, pictures, render, token_of
from dev.evaluation.report import PM
from dev.evaluation.settings import checkpoint_grid
from dev.graphs import Graph, new_node
from dev.host import Server
from dev.machine import link_file
from dev.say import Failure, say, step

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
SMALL = 64  # side at which contrast, saturation and our own features are taken
DEFAULTS = {"images": 100, "steps": 25, "size": (512, 512), "sigmas": (2.0, 10.0, np.inf)}
SCALES = (3.0,)  # the paper's


def evaluate(options: argparse.Namespace, out: Path) -> int:
    """Render all settings through the real server, resuming, and measure them."""
    begin = time.monotonic()
    checkpoint = Path(options.checkpoint).expanduser().resolve()
    if not checkpoint.is_file():
        raise Failure(f"There is no checkpoint file {checkpoint}.")
    references = reference_files(options.reference)
    prompts = prompt_lines(options.prompts)
    settings = checkpoint_grid(options.sigmas or DEFAULTS["sigmas"], options.scales or SCALES)
    sampling = _plan(options, checkpoint.name, prompts)
    count = options.images or DEFAULTS["images"]
    seeds = range(REPORTING, REPORTING + count)
    tree = host_tree()
    token = token_of(checkpoint, version_of(tree) or "", by_content=False)
    jobs = {each.name: sampling.jobs(each, seeds, IMAGES, token) for each in settings}
    # Seed by seed, so that an early look finds the same seeds in every setting.
    ordered = [job for column in zip(*jobs.values(), strict=True) for job in column]
    step(f"Starting ComfyUI with {checkpoint.name}")
    with Server(tree) as host:
        link_file(checkpoint, host.base / "models" / "checkpoints" / checkpoint.name)
        render(host, ordered, sampling.seconds)
    files = {name: [file for job in each for file in job.files] for name, each in jobs.items()}
    step(f"Measuring against {len(references)} reference images")
    rows, note = _measured(settings, files, references, options)
    text = "\n\n".join([_head(options, sampling, count, len(references), note), report.table(rows)])
    publish(out, checkpoint.stem, text + "\n", [asdict(row) for row in rows], files)
    say(f"({duration(time.monotonic() - begin)} in all)")
    return 0


def sources(checkpoint: str, size: tuple[int, int]) -> Any:
    """Return the maker of the nodes around the sampler, see `Plan`."""

    def made(prompt: str, batch: int) -> Graph:
        return {
            "model": new_node("CheckpointLoaderSimple", ckpt_name=checkpoint),
            "positive": new_node("CLIPTextEncode", text=prompt, clip=["model", 1]),
            "negative": new_node("CLIPTextEncode", text="", clip=["model", 1]),
            "latent": new_node("EmptyLatentImage", width=size[0], height=size[1], batch_size=batch),
            "decode": new_node("VAEDecode", vae=["model", 2]),
        }

    return made


def _plan(options: argparse.Namespace, name: str, prompts: Sequence[str]) -> Plan:
    cfg = options.cfg if options.cfg is not None else (5.0 if options.prompts else 1.0)
    made = sources(name, options.size or DEFAULTS["size"])
    return Plan(made, prompts, options.steps or DEFAULTS["steps"], cfg)


def reference_files(folder: str) -> list[Path]:
    """Return the images of a folder and of the folders in it."""
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise Failure(f"There is no folder {place}.")
    found = sorted(each for each in place.rglob("*") if each.suffix.lower() in ENDINGS)
    if len(found) < 2:
        raise Failure(f"The reference {place} holds {len(found)} images; it needs at least 2.")
    return found


def prompt_lines(file: str | None) -> list[str]:
    """Return the prompts, one a line; without a file one empty prompt."""
    if file is None:
        return [""]
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"Cannot read the prompts in {file}: {error}.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise Failure(f"There is no prompt in {file}; it needs one a line.")
    return lines


def _measured(
    settings: Sequence[Any],
    files: dict[str, list[Path]],
    references: list[Path],
    options: argparse.Namespace,
) -> tuple[list[report.Row], str]:
    inception = options.features == "inception" or (options.features is None and has_inception())
    if inception and not has_inception():
        raise Failure("--features inception needs the package torch-fidelity in .venv.")
    small = np.stack(list(pictures(references, SMALL)))
    side = min(options.size or DEFAULTS["size"]) if inception else SMALL
    if inception:
        say(f"   Features: {WEIGHTS_NOTE}")
        features: Any = InceptionFeatures(pictures(references, side))
    else:
        features = RandomFeatures(small)
    gaussian = Gaussian.of(features.reference)
    data = report.Data(
        gaussian,
        float(contrast(small).mean()),
        float(saturation(small).mean()),
        unit=1.0 if inception else gaussian.trace,  # FID is not divided by anything
    )
    found = {name: features(pictures(each, side)) for name, each in files.items()}
    images = {name: np.stack(list(pictures(each, SMALL))) for name, each in files.items()}
    return report.measured(settings, images, found, data), features.note


def _head(options: argparse.Namespace, plan: Plan, count: int, references: int, note: str) -> str:
    prompts = f"{len(plan.prompts)} prompts" if options.prompts else "no prompt"
    return (
        f"# {Path(options.checkpoint).name}\n\n"
        f"Made by `python dev.py evaluate --checkpoint`: {count} images a row, the same seeds in "
        f"every row, {prompts}, cfg {plan.cfg:g}, {plan.steps} Euler steps, against {references} "
        f"reference images. Distances in {note}: biased upwards with few images, so compare rows, "
        f"not tables. Contrast and saturation: 1 is the reference's. After {PM} stands one "
        "standard error over seeds (paired bootstrap for the change from *off*)."
    )
