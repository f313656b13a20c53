"""`dev.py evaluate`: paired seeds, resuming, the choice of settings, and its refusals."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dev.evaluation import demo, render, report, settings
from dev.evaluation.measures import Estimate
from dev.evaluation.render import Plan
from dev.graphs import OFF


class FakeHost:
    """Renders a flat picture for each image of a batch, and stops when told to."""

    base = Path("nowhere")

    def __init__(self, stops_after: float = math.inf):
        self.graphs = []
        self.left = stops_after

    def run(self, graph, seconds):
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.graphs.append(graph)
        batch = graph["latent"]["inputs"]["batch_size"]
        return {"save": {"images": [{"filename": str(index)} for index in range(batch)]}}

    def image_bytes(self, image):
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (int(image["filename"]), 50, 90)).save(data, "PNG")
        return data.getvalue()


@pytest.fixture
def plan() -> Plan:
    return Plan(demo.sources, ["orange", "green"], 3, 2.0, batch=2)


def sampler(graph):
    return graph["sampler"]["inputs"]


# Jobs


def test_every_setting_samples_the_same_seeds_and_prompts_into_files_of_its_own(plan, tmp_path):
    jobs = [plan.jobs(each, range(10, 18), tmp_path, "t") for each in settings.demo_grid()]
    plain = [(sampler(job.graph)["seed"], job.graph["positive"]) for job in jobs[0]]
    assert [seed for seed, _ in plain] == [10, 12, 14, 16]
    assert [node["inputs"]["prompt"] for _, node in plain] == ["orange", "green"] * 2
    for each in jobs[1:]:
        assert [(sampler(job.graph)["seed"], job.graph["positive"]) for job in each] == plain
    files = [file for each in jobs for job in each for file in job.files]
    assert len(files) == len(set(files)) == 8 * len(jobs)


def test_files_go_elsewhere_when_what_made_them_changes(plan, tmp_path):
    jobs = [
        other.jobs(settings.off(), range(2), tmp_path, token)[0]
        for other in (plan, replace(plan, steps=4), replace(plan, cfg=3.0))
        for token in ("t", "u")
    ]
    assert len({job.files[0] for job in jobs}) == len(jobs)
    file = tmp_path / "model"
    file.write_bytes(b"one")
    token = render.token_of(file, "1", by_content=True)
    assert token != render.token_of(file, "2", by_content=True)
    file.write_bytes(b"three")
    assert token != render.token_of(file, "1", by_content=True)


# Resuming


def test_an_interrupted_run_goes_on_where_it_stopped(plan, tmp_path):
    jobs = plan.jobs(settings.off(), range(10), tmp_path, "t")
    with pytest.raises(KeyboardInterrupt):
        render.render(FakeHost(stops_after=2), jobs, 1.0)
    assert sum(job.is_done() for job in jobs) == 2
    jobs[2].files[0].with_suffix(".part").write_bytes(b"a file that was cut off")
    second = FakeHost()
    render.render(second, jobs, 1.0)
    assert all(job.is_done() for job in jobs)
    assert [sampler(graph)["seed"] for graph in second.graphs] == [4, 6, 8]


# Choice and table


def row(name: str, value: float, change: float = 0.0) -> report.Row:
    method = name.split(" ")[0]
    return report.Row(name, method, Estimate(value, 0.01, change, 0.02), None, None, 1.0, 0.9, 0.25)


def test_the_least_distance_of_each_method_is_chosen_and_variants_are_not():
    grid = [settings.off(), *(settings.other("PAG", scale) for scale in (1.0, 3.0))]
    grid.append(settings.seg(1.0, 1.0))
    variant = settings.seg(math.inf, 3.0, rescale=0.7)
    values = (0.5, 0.4, 0.3, 0.2, 0.1)
    rows = [row(each.name, v) for each, v in zip([*grid, variant], values, strict=True)]
    assert report.chosen(rows, [*grid, variant]) == {
        "PAG": "PAG scale 3",
        "SEG": "SEG sigma 1, scale 1",
    }


def test_the_verdict_is_the_share_of_the_distance_above_the_floor_and_stands_in_the_table():
    rows = [row(OFF, 0.5), row("SEG sigma 1, scale 1", 0.3, -0.2)]
    (line,) = report.verdict(rows, {"SEG": "SEG sigma 1, scale 1"}, 0.1)
    assert f"removes 50% {report.PM} 5% of the distance" in line
    figures = "0.300 +- 0.010 | -0.200 +- 0.020 | 1.00 | 0.90 | 25%".replace("+-", report.PM)
    table = report.table(rows, ["SEG sigma 1, scale 1"])
    assert f"| **SEG sigma 1, scale 1** | {figures} |" in table


# What the README says


def test_the_figures_of_the_readme_and_the_demo_s_setting_come_from_the_report():
    root = Path(__file__).resolve().parents[2]
    readme = (root / "README.md").read_text(encoding="utf-8")
    kept = json.loads((root / "docs" / "evaluation.json").read_text(encoding="utf-8"))
    rows = {each["name"]: each for each in kept["No prompt, cfg 1"]}
    best, floor = rows[kept["chosen"]["SEG"]], float(np.mean(kept["floor"]))
    for part, whole in (("distance", floor), ("mirror", 0.0)):
        above = rows[OFF][part]["value"] - whole
        share, error = -best[part]["change"] / above, best[part]["change_error"] / above
        assert f"{share:.0%} {report.PM} {error:.0%}" in " ".join(readme.split())
    matched = (best["matched"]["value"], rows[OFF]["matched"]["value"])
    assert "{:.3f} against {:.3f}".format(*matched) in " ".join(readme.split())
    assert settings.shown_grid()[1].name == kept["chosen"]["SEG"]
