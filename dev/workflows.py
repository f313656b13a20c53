"""The shipped workflows: what is in them. Rewrite their files with `python -m dev.workflows`.

Run it in the developer environment (`.venv`). It asks a real ComfyUI for the definitions of the
nodes and writes both forms of every workflow; with `--offline` it takes the definitions of the
last time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from dev.comfy_tree import CURRENT
from dev.places import ROOT
from dev.workflow_sheet import MARGIN, SPACE, Group, Node, Output, Pack, Sheet, text

FOLDER = ROOT / "example_workflows"
DEFINITIONS = ROOT / "tests" / "goldens" / "object_info.json"

OURS = (
    "SEGuidance",
    "SEGuidanceSAG",
    "SEGuidancePAG",
    "SEGuidanceTPG",
    "SEGuidanceSLG",
    "SEGuidanceProbe",
    "SEGuidanceReport",
    "SEGuidanceSweep",
)
CORE = (
    "CheckpointLoaderSimple",
    "CLIPTextEncode",
    "EmptyLatentImage",
    "KSampler",
    "VAEDecode",
    "SaveImage",
    "PreviewImage",
    "PreviewAny",
    "ImageStitch",
    "Canny",
    "ControlNetLoader",
    "ControlNetApplyAdvanced",
    "PrimitiveInt",
    "PrimitiveFloat",
    "UNETLoader",
    "CLIPLoader",
    "VAELoader",
    "EmptySD3LatentImage",
    "ModelSamplingAuraFlow",
    "ConditioningZeroOut",
)
KEPT_OPTIONS = ("default", "min", "max", "multiline", "control_after_generate", "options")

HUB = "https://huggingface.co"
SDXL = {
    "name": "sd_xl_base_1.0.safetensors",
    "url": f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/"
    "sd_xl_base_1.0.safetensors",
    "directory": "checkpoints",
}
SD15 = {
    "name": "v1-5-pruned-emaonly-fp16.safetensors",
    "url": f"{HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
    "v1-5-pruned-emaonly-fp16.safetensors",
    "directory": "checkpoints",
}
CANNY = {
    "name": "diffusers_xl_canny_full.safetensors",
    "url": f"{HUB}/lllyasviel/sd_control_collection/resolve/main/"
    "diffusers_xl_canny_full.safetensors",
    "directory": "controlnet",
}
SD35 = {
    "name": "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors",
    "url": f"{HUB}/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/"
    "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors",
    "directory": "checkpoints",
}
Z_IMAGE = [
    {"name": name, "url": f"{HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files/{at}/{name}",
     "directory": at}
    for at, name in (
        ("diffusion_models", "z_image_turbo_bf16.safetensors"),
        ("text_encoders", "qwen_3_4b.safetensors"),
        ("vae", "ae.safetensors"),
    )
]  # fmt: skip
PROMPT = "a lighthouse on a rocky coast, evening light, breaking waves, detailed photograph"
NEGATIVE = "blurry, low quality"
SAMPLING = {"steps": 25, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}

COLUMNS = {"Off": 0.0, "Sigma 1": 1.0, "Sigma 4": 4.0, "Sigma 16": 16.0, "Infinite": math.inf}
ABOUT = "About this workflow"
NOTE_SIZE = (480, 560)
FIRST = NOTE_SIZE[0] + SPACE

NOTE_TEXT_TO_IMAGE = """
## Smoothed Energy Guidance with SDXL

SEG asks the model for one more prediction at each step, made with **blurred self-attention**, and
moves the image away from it, towards shapes that hold together.

**To change**

- the prompt, the seed and the size, as always;
- `scale` of SEG: 3 is the paper's value, 0 switches it off;
- `infinite_blur` off, then `blur_sigma` 1, 4 or 16: a gentler effect. The paper advises to
  control SEG this way and to leave `scale` alone;
- `cfg`: SEG comes on top of it, so try a lower one than usual.

**To expect**

- the same seed without SEG gives a related, but different image. Bypass the green node (Ctrl+B)
  to compare;
- each step takes longer, by about one more prediction. `end_percent` 0.5 about halves
  that;
- colours too strong? Lower `cfg`, or raise `rescale` (an advanced input) to 0.5.

**Model**: [sd_xl_base_1.0](https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0), in
`models/checkpoints`. Any SDXL checkpoint will do.
"""

NOTE_NO_PROMPT = """
## No prompt at all

The prompt is **empty** and `cfg` is **1**, so nothing tells the model what to draw: the guidance
comes from its own self-attention. This is the setting in which SEG was introduced.

**To change**

- the seed: with no prompt it alone decides what the image shows;
- `infinite_blur` off and `blur_sigma` 1, 4, 16: from almost unguided to almost infinite;
- `scale`: 3 is the paper's value.

**To expect**

- bypass the green node (Ctrl+B) to see the plain model. In the paper's measurement without
  prompts, FID falls from 129.5 (plain) to 88.2 (infinite blur);
- at `cfg` 1 ComfyUI makes one prediction for each step, and SEG one more;
- `branch`: `unconditional` is the same as `conditional` here, and `free` is refused: at `cfg` 1
  there is no unconditional prediction.

**Model**: [sd_xl_base_1.0](https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0), in
`models/checkpoints`.
"""

NOTE_COMPARISON = """
## What the blur does: five images from one seed

From left to right: **off**, sigma **1**, **4**, **16**, **infinite**. Everything else is the same;
seed and cfg are set once, on the left. The strip below shows the five images in this order and is
saved as one picture.

**To change**

- `seed`, `cfg` and the prompts. With `cfg` 1 and empty prompts you see SEG alone;
- `blur_sigma` of a column. Go by factors: 1, 2, 4, 8, 16. It counts cells of the middle block's
  grid, which has 32x32 cells at 1024x1024.

**To expect**

- the larger sigma, the further from *off*: so it was in the paper's measurements;
- sigma 16 is not yet infinite. The released code cuts its kernel off at the size of the grid, and
  so does `kernel` = `reference`; `full` runs smoothly into infinite;
- five images take five times as long. For a quick look set the size to 768x768.

**Model**: [sd_xl_base_1.0](https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0), in
`models/checkpoints`.
"""

NOTE_CONTROLNET = """
## ControlNet without a prompt

A ControlNet gives the outlines, and SEG takes the place of prompt and cfg: the text is **empty**
and `cfg` is **1**.

1. A first image is made with a prompt, without SEG. It only lends its outlines.
2. Canny turns it into outlines for the ControlNet.
3. Two images with the same seed and no prompt: without SEG, and with it.

**To change**

- use a picture of your own: add a *Load Image* node and connect it to Canny's `image`. Then the
  first image is not computed any more;
- `strength` of the ControlNet, `blur_sigma` and `scale` of SEG.

**To expect**

- both images follow the outlines; what differs between them is SEG alone;
- the ControlNet runs once for each step and not twice: SEG reuses what it gave.

**Models**: [sd_xl_base_1.0](https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0) in
`models/checkpoints`, and
[diffusers_xl_canny_full](https://huggingface.co/lllyasviel/sd_control_collection) in
`models/controlnet`.
"""

NOTE_SD15 = """
## Smoothed Energy Guidance with SD1.5

The same node as for SDXL; it finds the model's middle block by itself.

**To change**

- the prompt, the seed and the size, as always;
- `infinite_blur` off, then `blur_sigma` 0.5, 1 or 2: a gentler effect. At 512x512 the middle block
  has only 8x8 cells, so small numbers are enough;
- `blocks` (an advanced input): `m0` is the middle block, `m0,u0` smooths the first block of the
  output part as well. A name that the model does not have is an error that lists all names.

**To expect**

- the same seed without SEG gives a related, but different image. Bypass the green node (Ctrl+B)
  to compare;
- each step takes longer, by about one more prediction. `end_percent` 0.5 about halves
  that.

**Model**:
[v1-5-pruned-emaonly-fp16](https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive), in
`models/checkpoints`. Any SD1.5 checkpoint will do.
"""


NOTE_RELATIVES = """
## The whole family: six images from one seed

From left to right: **off**, **SAG**, **SLG**, **PAG**, **TPG**, **SEG**. Everything else is the
same; seed and cfg are set once, on the left. Each method makes one more prediction at each step and
moves the image away from it. They differ in what makes that prediction worse:

- **SAG** blurs the predicted image where the model looks;
- **SLG** passes over some of the model's blocks;
- **PAG** lets each place of the image see only itself;
- **TPG** shuffles the places that enter some blocks;
- **SEG** blurs where each place looks.

**To change**

- `seed`. The prompt is empty and `cfg` is 1, as in the papers' figures. With a prompt and cfg 4
  you see what the methods add to cfg;
- `scale` of each: 0.5 is usual for SAG, 3 for the others. The window of SLG is its usual one,
  the first 15 % of sampling;
- chain them: the model goes through one node and then the next, and their effects add up.

**To expect**

- without a prompt the plain model rarely gets anything right. FID on SDXL as the SEG paper
  measured it (Table 1): plain 129.5, SAG 106.7, PAG 105.3, SEG 88.2; lower is better;
- SAG changes details, the others shapes. SLG was made for SD3.5; here it is a comparison.

**Model**: [sd_xl_base_1.0](https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0), in
`models/checkpoints`.
"""

NOTE_SD35 = """
## SEG on a transformer: SD3.5 Medium

The same node as for SDXL. On a transformer it smooths the queries of the **image's** places in a
few middle blocks, 7 to 9 of SD3.5 Medium's 24, and leaves those of the text alone.

**Experimental.** SEG was published for SDXL, and nobody has measured its quality here. Another
paper reports that the related PAG made SD3 *worse* (FID 138 against 114 without), so look at your
images before you trust it.

**To change**

- `scale`: start at 1 here;
- `infinite_blur` off and `blur_sigma` 1, 4, 16: a gentler effect;
- `blocks`, an advanced input: `double.7-9` is `auto`; try earlier or later ones;
- `end_percent` 0.3: guide only while the composition forms.

**To expect**

- the same seed without SEG gives a related, but different image. Bypass the green node (Ctrl+B)
  to compare;
- each step takes longer, by less than one more prediction.

**Model**: [sd3.5_medium_incl_clips_t5xxlfp8scaled
](https://huggingface.co/Comfy-Org/stable-diffusion-3.5-fp8), in `models/checkpoints`.
"""

NOTE_Z_IMAGE = """
## SEG on a distilled transformer: Z-Image Turbo

Z-Image Turbo needs 8 steps and `cfg` 1: it has no negative prompt to steer by. SEG steers without
one, at the price of a second prediction for each step.

**Experimental.** SEG was published for SDXL, and nobody has measured its quality here. A distilled
model has learnt its guidance already, so a little goes a long way.

**To change**

- `scale`: 1 is a cautious start, 3 may be too much;
- `blocks`, an advanced input: `auto` is a range at about a third of the depth;
- `end_percent` 0.5: guide only while the composition forms.

**To expect**

- bypass the green node (Ctrl+B) to see the plain model;
- twice the time for each step in the window: this network offers no way to pass over the blocks
  before the first smoothed one.

**Models**, from [Comfy-Org/z_image_turbo](https://huggingface.co/Comfy-Org/z_image_turbo):
`z_image_turbo_bf16` in `models/diffusion_models`, `qwen_3_4b` in `models/text_encoders`, `ae` in
`models/vae`.
"""


NOTE_COMPARE = """
## Compare settings in one picture

**SEG Compare** samples the same seed once for each setting, and puts the results side by side with
labels. It is sampler and decoder in one.

**To change**

- `sigmas`: widths of the blur, separated by commas; `off` and `infinite` are allowed;
- `scales`: with several entries, such as `1, 3, 5`, each is a row of the picture;
- `blocks` (an advanced input): selections separated by semicolons, such as `auto; u0`;
- `seed`, `steps`, `cfg` and the prompts, as in any sampler.

**To expect**

- images move further from *off* as sigma grows;
- five images take five times as long. For a quick look set the size to 768x768;
- a wrong entry is an error before anything is computed.

**Model**: [sd_xl_base_1.0](https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0), in
`models/checkpoints`. Any SDXL checkpoint will do.
"""

NOTE_REPORT = """
## Does guidance do anything, what, and when?

**SEG Probe** stands between the guidance and the sampler and records each step; **SEG Report**
draws what it saw.

**To change**

- everything of SEG: the report follows;
- the prompt, the seed and the size, as always.

**To expect**

- *Size of the push*: where the line sinks to almost nothing, set `end_percent` of SEG;
- *Variance* and *log-sum-exp*: what the blur does to attention. If both lines are one, raise it;
- *Milliseconds*: what a step costs, and how much of it is guidance;
- heat maps: where guidance acted, over all steps and over each third of them;
- the image itself is the same with and without the probe.

**Model**: [sd_xl_base_1.0](https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0), in
`models/checkpoints`. Any checkpoint will do.
"""


def text_to_image(sheet: Sheet) -> None:
    """SDXL with a prompt."""
    _one_image(sheet, NOTE_TEXT_TO_IMAGE, SDXL, 1024, seed=20240800760, cfg=5.0)


def sd15(sheet: Sheet) -> None:
    """SD1.5 with a prompt."""
    _one_image(sheet, NOTE_SD15, SD15, 512, seed=20240800760, cfg=5.0)


def no_prompt(sheet: Sheet) -> None:
    """SDXL with an empty prompt at cfg 1."""
    sheet.note(NOTE_SIZE, ABOUT, NOTE_NO_PROMPT)
    model = sheet.group("1. Model and size", (FIRST, 0))
    loader, latent = _loader(model, SDXL), _latent(model, 1024)
    prompt = sheet.group("2. No prompt", model.under())
    empty = _prompt(prompt, loader, "", "Empty prompt")
    settings = {"seed": 10, "cfg": 1.0, "latent_image": latent["LATENT"]}
    _guided_image(sheet, model.beside(), loader, (empty, empty), **settings)


def comparison(sheet: Sheet) -> None:
    """One seed at five widths of the blur."""
    sheet.note(NOTE_SIZE, ABOUT, NOTE_COMPARISON)
    shared = sheet.group("Shared by all five", (FIRST, 0))
    loader, latent = _loader(shared, SDXL), _latent(shared, 1024)
    seed = shared.add("PrimitiveInt", value=7, title="seed")["INT"]
    cfg = shared.add("PrimitiveFloat", value=4.0, title="cfg")["FLOAT"]
    prompts = _prompts(sheet.group("Prompt", shared.under()), loader)
    settings = {"seed": seed, "cfg": cfg, "latent_image": latent["LATENT"]}
    columns = {title: "SEGuidance" if sigma else None for title, sigma in COLUMNS.items()}
    widths = {title: _width(sigma) for title, sigma in COLUMNS.items()}
    _columns(sheet, shared, loader, columns, prompts, "SEG_comparison", widths, **settings)


def controlnet(sheet: Sheet) -> None:
    """SDXL with a ControlNet and an empty prompt, without and with the guidance."""
    sheet.note(NOTE_SIZE, ABOUT, NOTE_CONTROLNET)
    models = sheet.group("Models and size", (FIRST, 0))
    loader, latent = _loader(models, SDXL), _latent(models, 1024)
    name = CANNY["name"]
    net = models.add("ControlNetLoader", control_net_name=name, models=[CANNY])
    prompts = _prompts(sheet.group("1. Prompt of the first image", models.under()), loader)
    first = sheet.group("1. First image", models.beside())
    settings = {"seed": 7, "latent_image": latent["LATENT"]}
    image = _sampled(first, loader, loader["MODEL"], prompts, cfg=6.0, **settings)
    outlines = sheet.group("2. Its outlines", first.under())
    edges = outlines.add("Canny", image=image, low_threshold=0.1, high_threshold=0.3)["IMAGE"]
    outlines.add("PreviewImage", images=edges, title="Outlines")
    control = sheet.group("3. No prompt, ControlNet, SEG", outlines.beside())
    empty = _prompt(control, loader, "", "Empty prompt", size=(340, 110))
    applied = control.add(
        "ControlNetApplyAdvanced",
        positive=empty,
        negative=empty,
        control_net=net["CONTROL_NET"],
        image=edges,
        strength=0.8,
    )
    guided = control.add("SEGuidance", model=loader["MODEL"])
    conds = applied["positive"], applied["negative"]
    settings = {"seed": 8, "latent_image": latent["LATENT"], "cfg": 1.0}
    plain = sheet.group("4. Without SEG", control.beside())
    image = _sampled(plain, loader, loader["MODEL"], conds, **settings)
    plain.add("PreviewImage", images=image, title="Without SEG")
    smoothed = sheet.group("4. With SEG", plain.beside())
    image = _sampled(smoothed, loader, guided["MODEL"], conds, **settings)
    smoothed.add(
        "SaveImage", images=image, filename_prefix="SEG", size=(340, 380), title="With SEG"
    )


def relatives(sheet: Sheet) -> None:
    """One seed without guidance and with each of the methods."""
    sheet.note(NOTE_SIZE, ABOUT, NOTE_RELATIVES)
    shared = sheet.group("Shared by all six", (FIRST, 0))
    loader, latent = _loader(shared, SDXL), _latent(shared, 1024)
    seed = shared.add("PrimitiveInt", value=10, title="seed")["INT"]
    cfg = shared.add("PrimitiveFloat", value=1.0, title="cfg")["FLOAT"]
    prompt = sheet.group("No prompt", shared.under())
    empty = _prompt(prompt, loader, "", "Empty prompt")
    settings = {"seed": seed, "cfg": cfg, "latent_image": latent["LATENT"]}
    columns = {
        "Off": None,
        "SAG": "SEGuidanceSAG",
        "SLG": "SEGuidanceSLG",
        "PAG": "SEGuidancePAG",
        "TPG": "SEGuidanceTPG",
        "SEG": "SEGuidance",
    }
    _columns(sheet, shared, loader, columns, (empty, empty), "SEG_relatives", **settings)


def sd35(sheet: Sheet) -> None:
    """SD3.5 Medium with a prompt."""
    sheet.note(NOTE_SIZE, ABOUT, NOTE_SD35)
    group = sheet.group("1. Model and size", (FIRST, 0))
    loader = _loader(group, SD35)
    latent = group.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    prompts = _prompts(sheet.group("2. Prompt", group.under()), loader)
    settings = {"seed": 20240800760, "cfg": 4.5, "latent_image": latent["LATENT"]}
    settings |= {"scheduler": "sgm_uniform"}
    _guided_image(sheet, group.beside(), loader, prompts, scale=1.0, **settings)


def z_image(sheet: Sheet) -> None:
    """Z-Image Turbo, distilled, at cfg 1."""
    sheet.note(NOTE_SIZE, ABOUT, NOTE_Z_IMAGE)
    group = sheet.group("1. Models and size", (FIRST, 0))
    network, encoder, decoder = (model["name"] for model in Z_IMAGE)
    model = group.add("UNETLoader", unet_name=network, models=Z_IMAGE[:1])
    clip = group.add("CLIPLoader", clip_name=encoder, type="lumina2", models=Z_IMAGE[1:2])
    vae = group.add("VAELoader", vae_name=decoder, models=Z_IMAGE[2:])
    latent = group.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    prompt = sheet.group("2. Prompt", group.under())
    positive = _prompt(prompt, clip, PROMPT, "Prompt", size=(400, 140))
    negative = prompt.add("ConditioningZeroOut", conditioning=positive)["CONDITIONING"]
    seg = sheet.group("3. Guidance", group.beside())
    guided = seg.add("SEGuidance", model=model["MODEL"], scale=1.0)
    shifted = seg.add("ModelSamplingAuraFlow", model=guided["MODEL"], shift=3.0)
    sampling = sheet.group("4. Sampling", seg.under())
    sampler = sampling.add(
        "KSampler",
        model=shifted["MODEL"],
        positive=positive,
        negative=negative,
        latent_image=latent["LATENT"],
        seed=20240800760,
        steps=8,
        cfg=1.0,
        sampler_name="res_multistep",
        scheduler="simple",
        denoise=1.0,
    )
    image = sampling.add("VAEDecode", samples=sampler["LATENT"], vae=vae["VAE"])["IMAGE"]
    result = sheet.group("5. Result", seg.beside())
    result.add("SaveImage", images=image, filename_prefix="SEG")


def compare(sheet: Sheet) -> None:
    """Five widths of the blur by one node."""
    sheet.note(NOTE_SIZE, ABOUT, NOTE_COMPARE)
    group = sheet.group("1. Model and size", (FIRST, 0))
    loader, latent = _loader(group, SDXL), _latent(group, 1024)
    prompts = _prompts(sheet.group("2. Prompt", group.under()), loader)
    settings = sheet.group("3. Settings to compare", group.beside())
    sampling = {name: SAMPLING[name] for name in ("steps", "sampler_name", "scheduler")}
    compared = settings.add(
        "SEGuidanceSweep",
        model=loader["MODEL"],
        positive=prompts[0],
        negative=prompts[1],
        latent=latent["LATENT"],
        vae=loader["VAE"],
        seed=7,
        cfg=4.0,
        **sampling,
    )
    result = sheet.group("4. Result", settings.beside())
    result.add("SaveImage", images=compared["grid"], filename_prefix="SEG_compare", size=(900, 430))


def run_report(sheet: Sheet) -> None:
    """SDXL with a prompt, and a report of what the guidance did."""
    sheet.note(NOTE_SIZE, ABOUT, NOTE_REPORT)
    group = sheet.group("1. Model and size", (FIRST, 0))
    loader, latent = _loader(group, SDXL), _latent(group, 1024)
    prompts = _prompts(sheet.group("2. Prompt", group.under()), loader)
    guidance = sheet.group("3. Guidance, watched", group.beside())
    guided = guidance.add("SEGuidance", model=loader["MODEL"])
    probe = guidance.add("SEGuidanceProbe", model=guided["MODEL"])
    sampling = sheet.group("4. Sampling", guidance.under())
    both = {"positive": prompts[0], "negative": prompts[1], "latent_image": latent["LATENT"]}
    sampler = sampling.add(
        "KSampler", model=probe["model"], **both, **SAMPLING, seed=20240800760, cfg=5.0
    )
    image = sampling.add("VAEDecode", samples=sampler["LATENT"], vae=loader["VAE"])["IMAGE"]
    shown = sheet.group("5. Report", guidance.beside())
    report = shown.add(
        "SEGuidanceReport", probe=probe["probe"], latent=sampler["LATENT"], image=image
    )
    words = sheet.group("6. In words, where, and the image", shown.beside())
    words.add("PreviewAny", source=report["summary"], title="Summary")
    words.add("PreviewImage", images=report["heat maps"], size=(560, 380), title="Heat maps")
    words.add("SaveImage", images=image, filename_prefix="SEG", size=(560, 380))


WORKFLOWS: dict[str, Callable[[Sheet], None]] = {
    "SEG SDXL - text to image": text_to_image,
    "SEG SDXL - without a prompt": no_prompt,
    "SEG SDXL - five widths of the blur": comparison,
    "SEG SDXL - ControlNet without a prompt": controlnet,
    "SEG SD15 - text to image": sd15,
    "SEG SD35 - text to image": sd35,
    "SEG Z-Image Turbo - text to image": z_image,
    "SEG SDXL - the whole family side by side": relatives,
    "SEG SDXL - several settings in one picture": compare,
    "SEG SDXL - report of a run": run_report,
}


def _one_image(
    sheet: Sheet, note: str, model: dict[str, str], side: int, *, seed: int, cfg: float
) -> None:
    sheet.note(NOTE_SIZE, ABOUT, note)
    group = sheet.group("1. Model and size", (FIRST, 0))
    loader, latent = _loader(group, model), _latent(group, side)
    prompts = _prompts(sheet.group("2. Prompt", group.under()), loader)
    settings = {"seed": seed, "cfg": cfg, "latent_image": latent["LATENT"]}
    _guided_image(sheet, group.beside(), loader, prompts, **settings)


def _guided_image(
    sheet: Sheet,
    at: tuple[int, int],
    loader: Node,
    prompts: tuple[Output, Output],
    scale: float = 3.0,
    **settings: Any,
) -> None:
    seg = sheet.group("3. Guidance", at)
    guided = seg.add("SEGuidance", model=loader["MODEL"], scale=scale)
    sampling = sheet.group("4. Sampling", seg.under())
    image = _sampled(sampling, loader, guided["MODEL"], prompts, **settings)
    result = sheet.group("5. Result", seg.beside())
    result.add("SaveImage", images=image, filename_prefix="SEG")


def _loader(group: Group, model: dict[str, str]) -> Node:
    return group.add("CheckpointLoaderSimple", ckpt_name=model["name"], models=[model])


def _latent(group: Group, side: int) -> Node:
    return group.add("EmptyLatentImage", width=side, height=side, batch_size=1)


def _prompts(group: Group, loader: Node) -> tuple[Output, Output]:
    positive = _prompt(group, loader, PROMPT, "Prompt")
    return positive, _prompt(group, loader, NEGATIVE, "Negative prompt")


def _prompt(
    group: Group, loader: Node, words: str, title: str, size: tuple[int, int] | None = None
) -> Output:
    encoder = group.add("CLIPTextEncode", clip=loader["CLIP"], text=words, title=title, size=size)
    return encoder["CONDITIONING"]


def _sampled(
    group: Group, loader: Node, model: Output, prompts: tuple[Output, Output], **settings: Any
) -> Output:
    """Add a sampler and a decoder; return the image."""
    both = {"positive": prompts[0], "negative": prompts[1]}
    sampler = group.add("KSampler", model=model, **both, **{**SAMPLING, **settings})
    return group.add("VAEDecode", samples=sampler["LATENT"], vae=loader["VAE"])["IMAGE"]


def _columns(
    sheet: Sheet,
    shared: Group,
    loader: Node,
    kinds: Mapping[str, str | None],
    prompts: tuple[Output, Output],
    prefix: str,
    changes: Mapping[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> None:
    """Add a column for each kind of guidance, and one picture of all their images."""
    columns: list[Group] = []
    joined: Output | None = None
    for title, kind in kinds.items():
        column = sheet.group(title, (columns or [shared])[-1].beside())
        columns.append(column)
        model = _column_model(column, loader, kind, (changes or {}).get(title, {}))
        image = _sampled(column, loader, model, prompts, **settings)
        joined = image if joined is None else _stitched(column, joined, image)
    lowest = max(column.bottom for column in columns)
    strip = sheet.group(" | ".join(kinds), (columns[0].at[0], lowest + SPACE))
    width = columns[-1].right - columns[0].at[0] - 2 * MARGIN
    strip.add("SaveImage", images=joined, filename_prefix=prefix, size=(width, 430))


def _column_model(column: Group, loader: Node, kind: str | None, changes: dict[str, Any]) -> Output:
    """Add the guidance of one column; return its model."""
    if kind is None:
        words = "No guidance in this column: the plain model, to compare with."
        column.add("MarkdownNote", text=words, title="Off", size=(340, 90), room=310)
        return loader["MODEL"]
    return column.add(kind, model=loader["MODEL"], room=310, **changes)["MODEL"]


def _width(sigma: float) -> dict[str, Any]:
    return {} if math.isinf(sigma) else {"infinite_blur": False, "blur_sigma": sigma}


def _stitched(column: Group, left: Output, right: Output) -> Output:
    """Add the node that puts an image to the right of others; return the strip."""
    strip = column.add(
        "ImageStitch", image1=left, image2=right, match_image_size=False, spacing_width=16
    )
    return strip["IMAGE"]


def documents(definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Return every shipped file as a document, by its path inside `example_workflows`."""
    packs = {"": Pack("comfy-core", CURRENT)}
    packs |= dict.fromkeys(OURS, Pack("smoothed-energy-guidance", _version()))
    found: dict[str, Any] = {}
    for name, describe in WORKFLOWS.items():
        sheet = Sheet(name, definitions, packs)
        describe(sheet)
        found[f"{name}.json"] = sheet.ui()
        found[f"api/{name}.json"] = sheet.api()
    return found


def _version() -> str:
    for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines():
        if line.startswith("version = "):
            return line.split('"')[1]
    raise ValueError("pyproject.toml does not state a version")


def slimmed(everything: Mapping[str, Any]) -> dict[str, Any]:
    """Return of ComfyUI's `/object_info` what the workflows stand on."""
    kept = {}
    for name in (*CORE, *OURS):
        node = everything[name]
        parts = {part: inputs for part, inputs in node["input"].items() if part != "hidden"}
        kept[name] = {
            "input": {
                part: {
                    key: _slim_input(spec, files="Loader" in name and key.endswith("_name"))
                    for key, spec in inputs.items()
                }
                for part, inputs in parts.items()
            },
            "input_order": {part: node["input_order"][part] for part in parts},
            "output": node["output"],
            "output_name": node["output_name"],
            "display_name": node["display_name"],
        }
    return kept


def _slim_input(spec: list[Any], *, files: bool) -> list[Any]:
    options = spec[1] if len(spec) > 1 else {}
    kind = spec[0]
    if files:  # their names differ from machine to machine
        kind = []
    return [kind, {name: options[name] for name in KEPT_OPTIONS if name in options}]


def _definitions(offline: bool) -> dict[str, Any]:
    if not offline:
        from dev.comfy_tree import pinned_tree
        from dev.host import Server

        with Server(pinned_tree(CURRENT)) as host:
            found = slimmed(host.json("/object_info"))
        DEFINITIONS.write_text(text(found), encoding="utf-8", newline="\n")
    return json.loads(DEFINITIONS.read_text(encoding="utf-8"))


def main(arguments: list[str]) -> int:
    """Write every file."""
    parser = argparse.ArgumentParser(prog="python -m dev.workflows", description=__doc__)
    parser.add_argument("--offline", action="store_true", help="start no ComfyUI")
    definitions = _definitions(parser.parse_args(arguments).offline)
    (FOLDER / "api").mkdir(parents=True, exist_ok=True)
    for path, document in documents(definitions).items():
        (FOLDER / path).write_text(text(document), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
