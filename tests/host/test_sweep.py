"""The comparison: its lists, its pictures and its labels."""

from __future__ import annotations

import math

import pytest
import torch
from comfy import model_management
from comfy.sample import prepare_noise
from family_oracle import guide
from host_models import conditioning, counted_calls, part, sample, seg, shared_model

pytestmark = pytest.mark.usefixtures("calm_previews")
SIZE = (6, 10)


class FlatVAE:
    """Shows three channels of the latents, eight times as large."""

    def decode(self, samples):
        shown = samples[:, :3].float().sigmoid().repeat_interleave(8, 2).repeat_interleave(8, 3)
        return shown.movedim(1, -1)


def compare(sigmas="off, infinite", scales="3", *, model=None, batch=1, cfg=4.0, steps=1, **more):
    latent = {"samples": torch.zeros(batch, 4, *SIZE)}
    with torch.inference_mode():
        return part("sweep").SEGuidanceSweep.execute(
            model=model or shared_model(), positive=conditioning(1), negative=conditioning(2),
            latent=latent, vae=FlatVAE(), sigmas=sigmas, scales=scales, seed=5, steps=steps,
            cfg=cfg, sampler_name="euler", scheduler="normal", **more,
        )  # fmt: skip


def require_those_of_nodes(images, models, steps=1):
    """Require that the images are what each of the models makes by itself."""
    noise = prepare_noise(torch.zeros(1, 4, *SIZE), 5)
    for image, model in zip(images, models, strict=True):
        samples = sample(model, size=SIZE, noise=noise, cfg=4.0, steps=steps, seed=5)
        expected = FlatVAE().decode(samples)[0].float()
        torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-5)


def test_images_are_those_of_the_nodes_one_by_one():
    model = shared_model()
    guided = (model, seg(model, 3.0, 1.5), seg(model, 3.0))
    require_those_of_nodes(compare("off, 1.5, infinite")[1], guided)


def test_the_grid_holds_the_images_under_their_labels_and_off_is_sampled_once():
    with counted_calls(shared_model()) as calls:
        grid, images = compare("off, infinite", "1, 3", cfg=1.0)[:2]
    assert len(calls) == 1 + 2 * 2
    assert len(images) == 4
    assert torch.equal(images[0], images[2])
    assert grid.shape[0] == 1
    sheet, height, width, gap = grid[0], 48, 80, 2
    for number, image in enumerate(images):
        row, column = divmod(number, 2)
        top = sheet.shape[0] - (2 - row) * height - (1 - row) * gap
        left = sheet.shape[1] - (2 - column) * width - (1 - column) * gap
        shown = sheet[top : top + height, left : left + width]
        torch.testing.assert_close(shown, image.float(), rtol=0, atol=1 / 255)


LABELS = {
    # sigmas, scales, blocks, methods: labels of the columns, of the rows
    ("off, 1, infinite", "3", "auto", "SEG"): (["off", "sigma 1", "infinite"], [""]),
    ("infinite", "0, 2", "auto", "SEG"): (["off", "scale 2"], [""]),
    ("infinite", "3", "auto; m0, u0", "SEG"): (["auto", "m0, u0"], [""]),
    ("off, 4", "1, 2", "auto", "SEG"): (["off", "sigma 4"], ["scale 1", "scale 2"]),
    ("1, 4", "1, 2", "m0; u0", "SEG"): (
        ["sigma 1", "sigma 4"], ["scale 1, m0", "scale 2, m0", "scale 1, u0", "scale 2, u0"],
    ),
    ("4", "3", "auto", "SEG"): (["sigma 4"], [""]),
    ("off, infinite", "default", "auto", "SEG, pag, SAG"): (
        ["off", "SEG, infinite", "PAG", "SAG"], [""],
    ),
    ("off, 1, 4", "default", "auto", "PAG, TPG"): (["off", "PAG", "TPG"], [""]),
    ("1, 4", "default", "auto", "PAG, SEG"): (["PAG", "SEG, sigma 1", "SEG, sigma 4"], [""]),
}  # fmt: skip


@pytest.mark.parametrize("lists", LABELS)
def test_labels_differ_where_settings_do_and_each_method_has_a_column(lists):
    sweep = part("sweep")
    assert sweep.labels(sweep.settings(*lists)) == LABELS[lists]


def test_lists_are_read_as_people_write_them():
    settings = part("sweep").settings(" OFF,1\n4.5 ,Infinite, inf", "3", "auto")
    assert [setting.sigma for setting in settings[0]] == [0, 1, 4.5, math.inf, math.inf]


BAD = {
    "sigma": ({"sigmas": "1, wide"}, "'wide' in sigmas"),
    "scale": ({"scales": "infinite"}, "'infinite' in scales"),
    "negative": ({"scales": "-1"}, "'-1' in scales"),
    "nan": ({"sigmas": "nan"}, "'nan' in sigmas"),
    "empty": ({"sigmas": " , "}, "sigmas is empty"),
    "too many": ({"sigmas": ",".join(map(str, range(70)))}, "at most 64"),
    "block": ({"blocks": "d99"}, "d99"),
    "method": (
        {"methods": "SEG, NAG"}, "'NAG' in methods is none of SEG, PAG, SAG, TPG, SLG"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lists", "said"), BAD.values(), ids=BAD)
def test_a_wrong_entry_is_named_before_anything_is_sampled(lists, said):
    with counted_calls(shared_model()) as calls, pytest.raises(ValueError, match=said):
        compare(**lists)
    assert calls == []


def test_each_image_of_a_batch_has_its_own_grid():
    grid, images = compare(batch=2)[:2]
    assert grid.shape[0] == 2
    assert len(images) == 4
    assert not torch.equal(grid[0], grid[1])


def test_progress_runs_once_over_all_images(monkeypatch):
    show = part("host.show")
    seen = []

    class Bar:
        def __init__(self, total):
            seen.append(("total", total))

        def update_absolute(self, value, total, preview):
            seen.append((value, total))

    monkeypatch.setattr(show.comfy.utils, "ProgressBar", Bar)
    compare("off, 1, infinite", steps=2)
    assert seen == [("total", 6), *[(n, 6) for n in range(1, 7)]]


def test_it_can_be_interrupted():
    model_management.interrupt_current_processing(True)
    with pytest.raises(model_management.InterruptProcessingException):
        compare()


def test_a_model_that_is_guided_already_is_refused():
    with pytest.raises(ValueError, match="already guided by Smoothed Energy Guidance"):
        compare(model=seg(shared_model()))


def test_methods_take_their_nodes_defaults():
    images = compare(scales="default", steps=4, methods="SEG, PAG, SAG, TPG, SLG")[1]
    model = shared_model()
    guided = [
        model,
        seg(model),
        guide("PAG", model, 3.0),
        guide("SAG", model, 0.5),
        guide("TPG", model, 3.0),
        guide("SLG", model, 3.0, 0.01, 0.15),
    ]
    require_those_of_nodes(images, guided, steps=4)
