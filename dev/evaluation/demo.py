"""The evaluation on the demo model, whose data is a formula: right is known."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dev.comfy_tree import host_tree, version_of
from dev.demo_model import butterflies
from dev.evaluation import report
from dev.evaluation.features import RandomFeatures
from dev.evaluation.measures import Gaussian, contrast, saturation, with_contrast
from dev.evaluation.render import Plan, duration, pictures, render, token_of
from dev.evaluation.report import PM
from dev.evaluation.settings import Setting, demo_grid, held, reported_grid
from dev.graphs import OFF, Graph, new_node
from dev.host import Server
from dev.places import ARTIFACTS, DEMO_PACK, made_folder
from dev.say import Failure, disk_errors, say, step

WEIGHTS = DEMO_PACK / "weights.safetensors"
IMAGES = ARTIFACTS / "evaluate" / "images"
BATCH = 64
IMAGES_EACH = 128
STEPS = 20
CFG = 2.0
NOTHING = "nothing"
REFERENCE = 4096  # pictures, so many that their own chance hardly counts
REFERENCE_SEED = 1
FLOOR_SEED = 100
HELD = ("SEG", "PAG", "SLG")  # methods whose difference is also held for some steps
CHOOSING, REPORTING = 1_000_000, 2_000_000  # first seeds; the two sets never meet


@dataclass(frozen=True)
class Stage:
    """One table: which settings, on which seeds, with which sampling."""

    title: str
    settings: Sequence[Setting]
    seeds: range
    plan: Plan


def sources(prompt: str, batch: int, scale: int = 1) -> Graph:
    """Return the nodes around the sampler; pictures leave enlarged by a whole factor."""
    side = butterflies.SIZE
    return {
        "model": new_node("SEGDemoModelLoader"),
        "positive": new_node("SEGDemoPrompt", prompt=prompt),
        "negative": new_node("SEGDemoPrompt", prompt=NOTHING),
        "latent": new_node("EmptyLatentImage", width=side, height=side, batch_size=batch),
        "vae": new_node("SEGDemoVAE", scale=scale),
        "decode": new_node("VAEDecode", vae=["vae", 0]),
    }


class Judge:
    """The data, in pictures and in features, against which the demo model is measured."""

    def __init__(self) -> None:
        """Draw the reference and fit the features to it."""
        real = drawn(REFERENCE_SEED, REFERENCE)
        self.features = RandomFeatures(real)
        gaussian = Gaussian.of(self.features.reference)
        self._data = report.Data(
            gaussian,
            float(contrast(real).mean()),
            float(saturation(real).mean()),
            unit=gaussian.trace,
            mirrored=True,
        )

    def data(self, count: int) -> report.Data:
        """Return the reference, with the floor for so many pictures."""
        fresh = (drawn(FLOOR_SEED + index, count) for index in range(report.FLOORS))
        floor = tuple(self._data.distance(self.features(images)) for images in fresh)
        return replace(self._data, floor=floor)

    def rows(
        self, stage: Stage, files: Mapping[str, Sequence[Path]], base: str = OFF
    ) -> list[report.Row]:
        """Measure the rendered settings of a stage, also brought to the data's contrast."""
        images = {name: np.stack(list(pictures(each))) for name, each in files.items()}
        features = {name: self.features(each) for name, each in images.items()}
        matched = {
            name: self.features(with_contrast(each, self._data.contrast))
            for name, each in images.items()
        }
        data = self.data(len(stage.seeds))
        return report.measured(stage.settings, images, features, data, matched, base)


def drawn(seed: int, count: int) -> np.ndarray:
    """Return pictures of the data, rounded to 8 bits as rendered ones are."""
    images = butterflies.as_images(butterflies.sample_data(seed, count)[0])
    return (images * 255.0).round() / np.float32(255.0)


def rendered(host: Server, stage: Stage, token: str) -> dict[str, list[Path]]:
    """Render a stage and return the files of each setting, in the order of the seeds."""
    step(stage.title)
    jobs = {each.name: stage.plan.jobs(each, stage.seeds, IMAGES, token) for each in stage.settings}
    render(host, [job for each in jobs.values() for job in each], stage.plan.seconds)
    return {name: [file for job in each for file in job.files] for name, each in jobs.items()}


def plan(prompts: Sequence[str], cfg: float, options: argparse.Namespace) -> Plan:
    """Return the sampling of a stage."""
    return Plan(sources, prompts, options.steps or STEPS, cfg, BATCH)


def counts(options: argparse.Namespace) -> tuple[int, int]:
    """Return how many pictures settings are chosen on and reported on."""
    reported = options.images or IMAGES_EACH
    if reported % BATCH or reported < 2 * BATCH:
        raise Failure(f"--images must be a multiple of {BATCH} from {2 * BATCH} up.")
    return max(2 * BATCH, reported // 2 // BATCH * BATCH), reported


def evaluate(options: argparse.Namespace, out: Path) -> int:
    """Choose settings on one set of seeds, report on another, with and without a prompt."""
    begin = time.monotonic()
    few, many = counts(options)
    tree = host_tree()
    token = token_of(WEIGHTS, version_of(tree) or "", by_content=True)
    step(f"Drawing {REFERENCE} butterflies as the reference")
    judge = Judge()
    grid = demo_grid()
    bare = plan([NOTHING], 1.0, options)
    asked = plan(list(butterflies.HUES), CFG, options)
    choosing = Stage("Choosing", grid, range(CHOOSING, CHOOSING + few), bare)
    step("Starting ComfyUI (about 15 s)")
    with Server(tree, demo=True) as host:
        choice = report.chosen(judge.rows(choosing, rendered(host, choosing, token)), grid)
        seeds = range(REPORTING, REPORTING + many)
        reporting = Stage("No prompt, cfg 1", reported_grid(choice), seeds, bare)
        picked = [each for each in grid if each.name in (OFF, *choice.values())]
        title = f"Prompts {', '.join(butterflies.HUES)}, cfg {CFG:g}"
        prompted = Stage(title, picked, seeds, asked)
        best = {each.method: each for each in picked}
        holding = [
            Stage(f"Held differences, {method}", held(best[method]), seeds, bare) for method in HELD
        ]
        stages = (reporting, prompted, *holding)
        shown = {stage.title: rendered(host, stage, token) for stage in stages}
    floor = judge.data(many).floor
    parts = [_head(few, many, options.steps or STEPS, floor)]
    kept: dict[str, Any] = {"chosen": choice, "floor": floor}
    for stage in stages:
        base = stage.settings[0].name  # off, or the setting whose difference is not held
        rows = judge.rows(stage, shown[stage.title], base)
        kept[stage.title] = [asdict(row) for row in rows]
        bold = [base] if stage in holding else list(choice.values())
        parts += [f"## {stage.title}", report.table(rows, bold, base)]
        if stage not in holding:
            parts.append("Share of the distance above the floor, and of the mirror error, removed:")
            parts.append("\n".join(report.verdict(rows, choice, float(np.mean(floor)))))
    publish(out, "evaluation", "\n\n".join(parts) + "\n", kept, shown[reporting.title])
    say(f"({duration(time.monotonic() - begin)} in all)")
    return 0


def _head(few: int, many: int, steps: int, floor: Sequence[float]) -> str:
    return (
        "# Image quality on the demo model\n\n"
        f"Written by `python dev.py evaluate`. Each row: {many} images from the same seeds, "
        f"{steps} Euler steps. Bold: the setting that was best for its method on {few} other "
        "seeds.\n\n"
        f"- **Frechet distance**: in {RandomFeatures.note}, divided by the data's variance. "
        f"{report.FLOORS} equally large samples of the data itself are {np.mean(floor):.4f} {PM} "
        f"{np.std(floor, ddof=1):.4f} away: the noise floor.\n"
        "- **contrast equal**: the same distance after all images have been scaled to the data's "
        "contrast.\n"
        "- **mirror error**: 0 for a symmetric image, 1 for unrelated halves.\n"
        "- **contrast, saturation**: relative to the data.\n"
        "- **moved from off**: RMS difference, relative to the contrast of *off*.\n\n"
        f"{PM} is one standard error over seeds, from a paired bootstrap for the change from *off*."
    )


def publish(
    out: Path, name: str, text: str, figures: Any, files: Mapping[str, Sequence[Path]]
) -> None:
    """Print the report and keep it with its figures and, if there are files, a contact sheet."""
    say("\n" + text)
    if files:
        text += f"\n![The first seeds of every row]({name}.jpg)\n"
    with disk_errors(out):
        made_folder(out)
        (out / f"{name}.md").write_text(text, encoding="utf-8", newline="\n")
        rounded = json.loads(json.dumps(figures), parse_float=lambda text: round(float(text), 5))
        kept = json.dumps(rounded, indent=1) + "\n"
        (out / f"{name}.json").write_text(kept, encoding="utf-8", newline="\n")
        if files:
            sheet = {key: list(pictures(each[: report.SHOWN])) for key, each in files.items()}
            report.contact_sheet(sheet).save(out / f"{name}.jpg", quality=85, optimize=True)
    say(f"Kept as {name}.* in {out}")
