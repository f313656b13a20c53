"""The report: its pictures, its five lines, and what it says when there is nothing to show."""

from __future__ import annotations

import functools
import logging
import statistics
import sys

import pytest
import torch
from host_models import PACK, conditioning, part, sample, seg, shared_model
from stand_ins import patched
from test_probe import probed, recorded

pytestmark = pytest.mark.usefixtures("calm_previews")
SIZE = (6, 10)


def latents(model, **options):
    return sample(model, size=SIZE, **options)


def report(model, image=None, **options):
    """Return the report node's output on one run of a model."""
    watched, probe = probed(model)
    samples = latents(watched, **options)
    return part("report").SEGuidanceReport.execute(probe, {"samples": samples}, image)


def record_of(model, **options):
    return recorded(model, size=SIZE, **options)[0]


def words(record):
    return part("report_text").summary(record, 1, True)


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


def test_it_says_what_was_held_and_which_cfg_the_result_is_nearest_to(caplog):
    caplog.set_level(logging.INFO)
    record = record_of(seg(shared_model(), every=3), steps=7, cfg=4.0)
    assert [step.branches[0].held for step in record.steps] == 2 * [False, True, True] + [False]
    (line,) = (message for message in caplog.messages if "guided" in message)
    cfg = statistics.mean(step.branches[0].effective_cfg for step in record.steps)
    assert f", effective cfg {cfg:.3g} (" in line
    assert ", 4 held (off by " in line
    said = words(record).split("\n")[3]
    assert line.startswith(said.removesuffix(".")), "the report and the log say the same"
    assert part("report_plots").plots(record).shape[1] > 1400, "a panel more"
    alone = record_of(seg(shared_model(), every=2), steps=2, cfg=1.0)
    assert "effective cfg" not in words(alone), "there is no cfg to compare with"
    assert ", 1 held." in words(alone), "nothing was checked"


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


def test_the_summary_says_what_ran_with_the_record_s_numbers():
    record = record_of(seg(shared_model(), 3.0, 1.3), steps=3, cfg=4.0)
    steps = [step.branches[0] for step in record.steps]
    blocks = [block for step in steps for block in step.blocks.values()]
    times = statistics.mean(step.guidance / step.cfg for step in steps)
    before = statistics.mean(block.plain.logsumexp for block in blocks)
    after = statistics.mean(block.blurred.logsumexp for block in blocks)
    said = (
        ("3 model evaluations", "Smoothed Energy Guidance", "m0", "scale 3"),
        (f"{times:.2f} times", f"cosine {statistics.mean(s.cosine for s in steps):+.2f}"),
        ("variance", f"from {before:.2f} to {after:.2f}"),
        ("3 of 3 model evaluations guided", "3 in the same model call"),
        ("No warnings",),
    )
    for line, needed in zip(words(record).split("\n"), said, strict=True):
        assert all(word in line for word in needed), line


def test_time_is_that_of_whole_steps_and_compared_only_with_steps_of_the_same_run():
    record = record_of(seg(shared_model(), start=0.6), steps=6)
    guided = [step.milliseconds for step in record.steps if step.branches]
    plain = [step.milliseconds for step in record.steps if not step.branches]
    assert len(guided) > 1
    assert len(plain) > 2
    expected = statistics.median(guided), statistics.median(plain[1:])
    assert part("report_text").times(record) == pytest.approx(expected)
    text = words(record)
    assert "a step without guidance" in text
    assert f"({expected[0] / expected[1]:.2f} times)" in text


CASES = {
    # what is special: the model, how it is sampled, what is said
    "cfg 1": (seg, {"cfg": 1.0}, "no cfg to compare with (cfg 1, or both prompts are equal)"),
    "equal prompts": (seg, {"negative": conditioning(1)}, "or both prompts are equal)"),
    "no reuse": (
        functools.partial(seg, reuse=False), {}, "2 in extra passes (2 because reuse is off)",
    ),
    "no other step": (seg, {}, "no other step to compare it with"),
    "empty window": (functools.partial(seg, start=1.0), {}, "had no effect"),
    "free": (functools.partial(seg, branch="free"), {}, "0 in the same model call, 0 in extra"),
    "not guided": (lambda model: model, {}, "No guidance of this pack is on the model."),
    "one step": (lambda model: model, {"steps": 1}, "No attention was blurred."),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_summary_says_what_is_special_and_plots_are_drawn(case):
    model, options, said = CASES[case]
    plots, maps, text = report(model(shared_model()), **{"steps": 2} | options)[:3]
    assert said in text
    assert len(text.split("\n")) == 5
    assert plots.shape[-1] == 3
    assert maps.shape[0] == 1


# Which run it tells of


def test_the_probe_may_stand_before_the_guidance_and_behind_another_one():
    watched, probe = probed(shared_model())
    guided = seg(watched)
    samples = latents(guided, steps=1)
    assert probe.record(samples)[0].steps[0].branches
    again, second = probed(guided)
    samples = latents(guided, steps=1)
    assert second.record(samples) == (None, False), "the model that came in is not watched by it"
    samples = latents(again, steps=1)
    assert probe.record(samples)[1]
    assert second.record(samples)[1]
    assert (probe.runs, second.runs) == (3, 1)


def test_a_latent_is_found_among_the_last_runs_and_not_among_older_ones():
    watched, probe = probed(seg(shared_model()))
    made = [latents(watched, steps=n, seed=n) for n in (1, 2, 3)]
    for number, latent in enumerate(made, 1):
        record, made_it = probe.record(latent)
        assert made_it
        assert record.number == len(record.steps) == number
    record, made_it = probe.record(torch.zeros(1, 4, *SIZE))
    assert not made_it
    assert record.number == 3
    for seed in (4, 5, 6):
        latents(watched, steps=1, seed=seed)
    assert probe.record(made[0])[1] is False
    assert probe.runs == 6


def test_a_run_that_fails_leaves_the_last_record():
    watched, probe = probed(seg(shared_model()))
    kept = latents(watched, steps=1)

    @patched("sampler_post_cfg_function")
    def broken(args):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        latents(broken(watched), steps=1)
    assert probe.record(kept)[1]
    assert probe.runs == 1


def test_another_latent_and_a_probe_that_saw_nothing_are_told():
    watched, probe = probed(seg(shared_model()))
    other = {"samples": torch.zeros(1, 4, *SIZE)}
    with pytest.raises(ValueError, match="Connect the model output of SEG Probe"):
        part("report").SEGuidanceReport.execute(probe, other)
    latents(watched, steps=1)
    assert "it did not make this latent" in part("report").SEGuidanceReport.execute(probe, other)[2]


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        part("report_plots").require_matplotlib()


def test_a_guided_run_ends_in_one_line_with_blocks_steps_passes_and_time(caplog):
    caplog.set_level(logging.INFO)
    sample(seg(shared_model()), size=SIZE, steps=3)
    (line,) = [r for r in caplog.records if r.name.startswith(PACK)]
    assert line.levelno == logging.INFO
    said = "3 of 3 model evaluations guided, 3 in the same model call, 0 in extra passes"
    assert all(needed in line.message for needed in ("m0", *said.split(", "), "ms per eval"))
