"""The report: its pictures, its five lines, and what it says when there is nothing to show."""

from __future__ import annotations

import builtins
import importlib
import logging
import statistics

import pytest
import torch
from host_models import PACK, sample, seg, shared_model

SIZE = (6, 10)


def part(name):
    return importlib.import_module(f"{PACK}.nodes.{name}")


@pytest.fixture(autouse=True)
def calm_previews(monkeypatch):
    """Previews are files; the tests want none."""
    monkeypatch.setattr(part("report").ui, "PreviewImage", lambda image, cls: Shown(image))


class Shown:
    def __init__(self, image):
        self.image = image

    def as_dict(self):
        return {"images": [self.image]}


def report(model, image=None, **options):
    """Return the report node's output on one run of a model."""
    watched, probe = part("report").SEGuidanceProbe.execute(model)[:2]
    samples = sample(watched, size=SIZE, **options)
    return part("report").SEGuidanceReport.execute(probe, {"samples": samples}, image)


def record_of(model, **options):
    watched, probe = part("report").SEGuidanceProbe.execute(model)[:2]
    return probe.record(sample(watched, size=SIZE, **options))[0]


def words(model, **options):
    return part("report_text").summary(record_of(model, **options), 1, True)


def test_plots_are_a_dark_image_with_something_drawn_and_maps_stand_alone():
    output = report(seg(shared_model(), 3.0, 1.3), steps=2)
    plots, maps = output[:2]
    assert plots.shape[0] == 1
    assert plots.shape[-1] == 3
    assert float(plots.min()) >= 0
    assert float(plots.max()) <= 1
    assert float(plots.median()) < 0.2
    assert len(plots.reshape(-1, 3).unique(dim=0)) > 100
    assert output.ui["images"][0] is plots
    assert output.ui["text"] == (output[2],)
    assert maps.shape[0] == 1  # too few steps for thirds
    assert maps.shape[2] >= 500


def test_heat_maps_have_the_size_of_the_image_and_show_where():
    image = torch.rand(2, 48, 80, 3, generator=torch.Generator().manual_seed(0))
    maps = report(seg(shared_model()), image, steps=3, batch=2)[1]
    assert maps.shape[0] == 8  # two images: all steps and three thirds of them
    assert maps.shape[2] == 80
    assert maps.shape[1] > 48
    assert not torch.equal(maps[0], maps[4])


def test_heat_is_brightest_where_guidance_was_strongest():
    strength = torch.zeros(6, 10)
    strength[1:3, 6:9] = 1.0
    heated = part("report_maps")._heated(strength, None)
    assert tuple(heated.shape) == (6 * 51, 10 * 51, 3)
    bright = heated.sum(-1)
    assert bright[2 * 51, 7 * 51] > 4 * bright[5 * 51, 2 * 51]


def test_more_frames_than_maps_are_matched_from_first_to_last():
    below = part("report_maps")._below
    image = torch.arange(9.0).reshape(9, 1, 1, 1).expand(9, 2, 2, 3)
    assert [float(below(image, i, 3).mean()) for i in range(3)] == [0.0, 4.0, 8.0]
    assert float(below(image[:1], 2, 3).mean()) == 0.0


def test_the_summary_has_five_lines_that_say_what_ran_with_the_record_s_numbers():
    record = record_of(seg(shared_model(), 3.0, 1.3), steps=3, cfg=4.0)
    text = part("report_text").summary(record, 1, True)
    lines = text.split("\n")
    assert len(lines) == 5
    for needed in ("3 steps", "Smoothed Energy Guidance", "m0", "scale 3"):
        assert needed in lines[0]
    assert "times the push of cfg" in lines[1]
    assert "variance" in lines[2]
    assert "Extra predictions: 3, of which 3 in the same model call" in lines[3]
    assert "No warnings" in lines[4]
    steps = [step.branches[0] for step in record.steps]
    cosine = sum(step.cosine for step in steps) / 3
    times = sum(step.guidance / step.cfg for step in steps) / 3
    assert f"{times:.2f} times" in text
    assert f"cosine {cosine:+.2f}" in text
    blocks = [block for step in steps for block in step.blocks.values()]
    before = sum(block.plain.logsumexp for block in blocks) / len(blocks)
    after = sum(block.blurred.logsumexp for block in blocks) / len(blocks)
    assert f"from {before:.2f} to {after:.2f}" in text


def test_time_is_that_of_whole_steps_and_compared_only_with_steps_of_the_same_run():
    record = record_of(seg(shared_model(), start=0.6), steps=6)
    guided = [step.milliseconds for step in record.steps if step.branches]
    plain = [step.milliseconds for step in record.steps if not step.branches]
    assert len(guided) > 1
    assert len(plain) > 2
    expected = statistics.median(guided), statistics.median(plain[1:])
    assert part("report_text").times(record) == pytest.approx(expected)
    text = part("report_text").summary(record, 1, True)
    assert "a step without guidance" in text
    assert f"({expected[0] / expected[1]:.2f} times)" in text
    text = words(seg(shared_model()), steps=2)
    assert "infinite blur" in text
    assert "no other step to compare it with" in text
    assert "times)" not in text.split("\n")[4]


CASES = {
    "cfg 1": ({}, {"cfg": 1.0}, "no cfg to compare with"),
    "no reuse": ({"reuse": False}, {}, "2 in passes of their own (2 because reuse is off)"),
    "empty window": ({"start": 1.0}, {}, "had no effect"),
    "free": ({"branch": "free"}, {}, "No extra prediction"),
}


@pytest.mark.parametrize(("settings", "options", "said"), CASES.values(), ids=CASES)
def test_the_summary_says_what_is_special(settings, options, said):
    text = words(seg(shared_model(), **settings), steps=2, **options)
    assert said in text
    assert len(text.split("\n")) == 5


def test_a_model_without_guidance_is_reported_as_such():
    text = words(shared_model(), steps=2)
    assert "No guidance of this pack is on the model." in text
    assert "No attention was blurred." in text
    assert "A step took" in text


@pytest.mark.parametrize("steps", [1, 2])
def test_runs_without_guidance_and_short_ones_are_drawn(steps):
    for model in (shared_model(), seg(shared_model(), start=1.0)):
        output = report(model, steps=steps)
        assert output[0].shape[-1] == 3
        assert output[1].shape[0] == 1


def test_another_latent_is_told_apart():
    watched, probe = part("report").SEGuidanceProbe.execute(seg(shared_model()))[:2]
    sample(watched, size=SIZE, steps=1)
    other = {"samples": torch.zeros(1, 4, *SIZE)}
    assert "it did not make this latent" in part("report").SEGuidanceReport.execute(probe, other)[2]


def test_a_probe_that_saw_nothing_is_an_error_that_says_what_to_connect():
    nodes = part("report")
    _, probe = nodes.SEGuidanceProbe.execute(shared_model())[:2]
    with pytest.raises(ValueError, match="Connect the model output of SEG Probe"):
        nodes.SEGuidanceReport.execute(probe, {"samples": torch.zeros(1, 4, *SIZE)})


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch):
    importer = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importer(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        part("report_plots").require_matplotlib()


def test_a_guided_run_ends_in_one_line_with_blocks_steps_passes_and_time(caplog):
    caplog.set_level(logging.INFO)
    sample(seg(shared_model()), size=SIZE, steps=3)
    (line,) = [r for r in caplog.records if r.name.startswith(PACK)]
    assert line.levelno == logging.INFO
    for needed in (
        "m0",
        "3 of 3 model evaluations guided",
        "3 in the same model call",
        "0 in extra passes",
        "ms per eval",
    ):
        assert needed in line.message
