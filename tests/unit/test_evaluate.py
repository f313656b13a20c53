"""`dev.py evaluate`: paired seeds, resuming, the choice of settings, and its refusals."""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dev import cli, evaluate
from dev.evaluation import checkpoint, demo, render, report, settings
from dev.evaluation.measures import Estimate, Gaussian
from dev.evaluation.render import Plan
from dev.graphs import OFF
from dev.say import Failure


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


def test_every_setting_samples_the_same_seeds_and_prompts(plan, tmp_path):
    jobs = [plan.jobs(each, range(10, 18), tmp_path, "t") for each in settings.demo_grid()]
    plain = [(sampler(job.graph)["seed"], job.graph["positive"]) for job in jobs[0]]
    assert [seed for seed, _ in plain] == [10, 12, 14, 16]
    assert [node["inputs"]["prompt"] for _, node in plain] == ["orange", "green"] * 2
    for each in jobs[1:]:
        assert [(sampler(job.graph)["seed"], job.graph["positive"]) for job in each] == plain


def test_off_has_no_guidance_node_and_others_have_one(plan):
    assert "guidance" not in plan.graph(settings.off(), "orange", 1)
    graph = plan.graph(settings.seg(4.0, 2.0), "orange", 1)
    assert sampler(graph)["model"] == ["guidance", 0]
    assert graph["guidance"]["inputs"]["model"] == ["model", 0]
    assert graph["guidance"]["inputs"]["blur_sigma"] == 4.0
    assert not graph["guidance"]["inputs"]["infinite_blur"]


def test_no_two_settings_share_a_file(plan, tmp_path):
    jobs = [plan.jobs(each, range(4), tmp_path, "t") for each in settings.demo_grid()]
    files = [file for each in jobs for job in each for file in job.files]
    assert len(files) == len(set(files)) == 4 * len(jobs)


@pytest.mark.parametrize("change", ["token", "steps", "cfg"])
def test_files_go_elsewhere_when_what_made_them_changes(plan, tmp_path, change):
    (first, *_) = plan.jobs(settings.off(), range(2), tmp_path, "t")
    other = Plan(
        plan.sources,
        plan.prompts,
        4 if change == "steps" else 3,
        3.0 if change == "cfg" else 2.0,
        2,
    )
    token = "u" if change == "token" else "t"
    (second, *_) = other.jobs(settings.off(), range(2), tmp_path, token)
    assert not set(first.files) & set(second.files)


# Resuming


def test_an_interrupted_run_goes_on_where_it_stopped(plan, tmp_path):
    jobs = plan.jobs(settings.off(), range(10), tmp_path, "t")
    with pytest.raises(KeyboardInterrupt):
        render.render(FakeHost(stops_after=2), jobs, 1.0)
    assert sum(job.is_done() for job in jobs) == 2
    second = FakeHost()
    render.render(second, jobs, 1.0)
    assert all(job.is_done() for job in jobs)
    assert [sampler(graph)["seed"] for graph in second.graphs] == [4, 6, 8]


def test_a_finished_run_renders_nothing(plan, tmp_path):
    jobs = plan.jobs(settings.off(), range(4), tmp_path, "t")
    render.render(FakeHost(), jobs, 1.0)
    again = FakeHost()
    render.render(again, jobs, 1.0)
    assert not again.graphs


def test_a_file_that_was_cut_off_does_not_count(plan, tmp_path):
    (job,) = plan.jobs(settings.off(), range(2), tmp_path, "t")
    job.files[0].parent.mkdir(parents=True)
    job.files[0].with_suffix(".part").write_bytes(b"half a pict")
    render.render(FakeHost(), [job], 1.0)
    assert [np.asarray(image).shape for image in render.pictures(job.files)] == [(8, 8, 3)] * 2
    assert not list(tmp_path.rglob("*.part"))


def test_more_images_keep_those_that_are_there(plan, tmp_path):
    render.render(FakeHost(), plan.jobs(settings.off(), range(4), tmp_path, "t"), 1.0)
    host = FakeHost()
    render.render(host, plan.jobs(settings.off(), range(8), tmp_path, "t"), 1.0)
    assert [sampler(graph)["seed"] for graph in host.graphs] == [4, 6]


def test_progress_estimates_what_is_left():
    assert render.progress(1, 5, 10, 60.0) == "2 of 10 made, about 4 min left"
    assert render.progress(2, 4, 4, 7200.0) == "2 of 4 made, about 2.0 h left"


def test_a_changed_model_file_gives_another_token(tmp_path):
    file = tmp_path / "model"
    file.write_bytes(b"one")
    first = [render.token_of(file, "1", by_content=each) for each in (True, False)]
    file.write_bytes(b"three")
    second = [render.token_of(file, "1", by_content=each) for each in (True, False)]
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert render.token_of(file, "2", by_content=True) != second[0]


# Choice and table


def row(name: str, value: float, change: float = 0.0) -> report.Row:
    method = name.split(" ")[0]
    return report.Row(name, method, Estimate(value, 0.01, change, 0.02), None, None, 1.0, 0.9, 0.25)


def test_the_least_distance_of_each_method_is_chosen_and_variants_are_not():
    grid = [settings.off(), settings.pag(1.0), settings.pag(3.0), settings.seg(1.0, 1.0)]
    variant = settings.seg(math.inf, 3.0, rescale=0.7)
    values = (0.5, 0.4, 0.3, 0.2, 0.1)
    rows = [row(each.name, v) for each, v in zip([*grid, variant], values, strict=True)]
    assert report.chosen(rows, [*grid, variant]) == {
        "PAG": "PAG scale 3",
        "SEG": "SEG sigma 1, scale 1",
    }


def test_the_report_shows_the_chosen_and_sweeps_sigma_at_their_scale():
    choice = {"SAG": "SAG scale 0.5", "PAG": "PAG scale 1", "SEG": "SEG infinite, scale 0.25"}
    names = [each.name for each in settings.reported_grid(choice)]
    assert names[:4] == [OFF, *choice.values()]
    assert len(names) == len(set(names))
    for sigma in (1, 2, 4):
        assert f"SEG sigma {sigma}, scale 0.25" in names
    for scale in (0.1, 0.5, 1, 3):
        assert f"SEG infinite, scale {scale}" in names


def test_the_verdict_is_the_share_of_the_distance_above_the_floor():
    rows = [row(OFF, 0.5), row("SEG sigma 1, scale 1", 0.3, -0.2)]
    (line,) = report.verdict(rows, {"SEG": "SEG sigma 1, scale 1"}, 0.1)
    assert f"takes away 50% {report.PM} 5% of the distance" in line


def test_the_table_has_a_row_for_each_setting_and_one_width():
    text = report.table(
        [row(OFF, 0.5), row("SEG sigma 1, scale 1", 0.3, -0.2)], ["SEG sigma 1, scale 1"]
    )
    lines = text.splitlines()
    assert len(lines) == 4
    assert len({len(re.findall(r"\|", line)) for line in lines}) == 1
    figures = "0.300 +- 0.010 | -0.200 +- 0.020 | 1.00 | 0.90 | 25%".replace("+-", report.PM)
    assert f"| **SEG sigma 1, scale 1** | {figures} |" in text


def test_measured_rows_are_paired_with_off():
    rng = np.random.default_rng(0)
    grid = [settings.off(), settings.pag(1.0)]
    plain = rng.uniform(size=(40, 4, 4, 3))
    images = {OFF: plain, "PAG scale 1": plain}
    features = {name: each.reshape(40, -1)[:, :5] for name, each in images.items()}
    gaussian = Gaussian.of(rng.uniform(size=(90, 5)))
    data = report.Data(gaussian, 0.2, 0.3, unit=gaussian.trace, mirrored=True)
    first, second = report.measured(grid, images, features, data)
    assert second.distance.change == second.distance.change_error == second.moved == 0.0
    assert first.mirror is not None
    assert first.mirror.value > 0.5


def test_the_two_sets_of_seeds_do_not_meet():
    few, many = demo.counts(argparse.Namespace(images=1024))
    choosing = range(demo.CHOOSING, demo.CHOOSING + few)
    assert not set(choosing) & set(range(demo.REPORTING, demo.REPORTING + many))


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "100"], "multiple of 64"),
        (["--prompts", "p.txt"], "--prompts needs --checkpoint"),
        (["--checkpoint", "c"], "needs --reference"),
        (["--checkpoint", "nowhere", "--reference", "."], "no checkpoint file"),
        (["--weights", "nowhere"], "no weights file"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(arguments, words):
    options = cli.parser().parse_args(["evaluate", *arguments])
    with pytest.raises(Failure, match=words):
        evaluate.run(options, [])


def test_prompts_are_the_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert checkpoint.prompt_lines(str(file)) == ["a cat", "a dog"]
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(Failure, match="no prompt"):
        checkpoint.prompt_lines(str(file))


def test_a_reference_needs_two_images(tmp_path):
    with pytest.raises(Failure, match="no folder"):
        checkpoint.reference_files(str(tmp_path / "missing"))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.PNG")
    with pytest.raises(Failure, match="holds 1 images"):
        checkpoint.reference_files(str(tmp_path))


@pytest.mark.parametrize("text", ["x", "1,,2", "0", "-1"])
def test_lists_of_numbers_are_checked(text, capsys):
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["evaluate", "--scales", text])
    assert text in capsys.readouterr().err


def test_infinite_is_a_sigma():
    options = cli.parser().parse_args(["evaluate", "--sigmas", "2,infinite"])
    assert options.sigmas == (2.0, math.inf)


# What the README says


def test_the_figures_of_the_readme_come_from_the_report():
    root = Path(__file__).resolve().parents[2]
    readme = (root / "README.md").read_text(encoding="utf-8")
    kept = json.loads((root / "docs" / "evaluation.json").read_text(encoding="utf-8"))
    rows = {each["name"]: each for each in kept["No prompt, cfg 1"]}
    names = [OFF, *(kept["chosen"][each] for each in ("SAG", "PAG", "TPG", "SLG", "SEG"))]
    names.append("SEG infinite, scale 0.25")
    for part in ("distance", "matched", "mirror"):
        figures = [rows[name][part] for name in names]
        cells = [f"{each['value']:.3f} {report.PM} {each['error']:.3f}" for each in figures]
        assert f"| {' | '.join(cells)} |" in readme
    best, floor = rows[kept["chosen"]["SEG"]], float(np.mean(kept["floor"]))
    for part, whole in (("distance", floor), ("mirror", 0.0)):
        above = rows[OFF][part]["value"] - whole
        share, error = -best[part]["change"] / above, best[part]["change_error"] / above
        assert f"{share:.0%} {report.PM} {error:.0%}" in " ".join(readme.split())


def test_the_demo_shows_what_the_evaluation_chose():
    root = Path(__file__).resolve().parents[2]
    kept = json.loads((root / "docs" / "evaluation.json").read_text(encoding="utf-8"))
    assert settings.shown_grid()[1].name == kept["chosen"]["SEG"]
