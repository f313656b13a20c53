"""The pictures of the help pages, the icon and the banner: `python -m dev.pictures help`.

Results come out of the nodes themselves, on a real ComfyUI with the demo model; diagrams are
computed by `seg_core`.
"""

from __future__ import annotations

import importlib.util
import io
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dev.comfy_tree import CURRENT, pinned_tree
from dev.host import Server
from dev.places import ROOT, made_folder
from dev.say import say

PAGES = ROOT / "web" / "docs" / "pictures"
ICON = ROOT / "docs" / "icon.png"
BANNER = ROOT / "docs" / "banner.png"
BLUE, ORANGE, DARK, LIGHT = "#4cc9f0", "#f9844a", "#1b1b1f", "#f0f0f0"
SEED = 11
BATCH = 4
SCALE = 0.25  # what `dev.py evaluate` finds right for so small a model
GRID = (16, 24)
Graph = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Return a node of an API-format graph."""
    return {"class_type": kind, "inputs": inputs}


def make_all() -> None:
    """Make every picture of the help pages, the icon and the banner."""
    made_folder(PAGES)
    blur_kernels()
    attention_maps()
    energy()
    with Server(pinned_tree(CURRENT), demo=True) as host:
        columns = comparison(host)
        relatives(host)
        report(host)
    icon()
    banner(columns)


# Results of the nodes


def _sources(prompt: str, batch: int) -> Graph:
    return {
        "model": node("SEGDemoModelLoader"),
        "positive": node("SEGDemoPrompt", prompt=prompt),
        "negative": node("SEGDemoPrompt", prompt="nothing"),
        "latent": node("SEGDemoEmptyLatent", width=32, height=32, batch_size=batch),
        "vae": node("SEGDemoVAE", scale=4, method="bicubic"),
    }


def _sampled(model: str, cfg: float, steps: int = 20) -> dict[str, Any]:
    return node(
        "KSampler",
        model=[model, 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        seed=SEED,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )


def _images(host: Server, graph: Mapping[str, Any], save: str) -> list[Any]:
    from PIL import Image

    found = host.run(graph)[save]["images"]
    return [Image.open(io.BytesIO(host.image_bytes(one))).convert("RGB") for one in found]


def comparison(host: Server) -> dict[str, list[Any]]:
    """Draw five widths of the blur with SEG Compare, and return the images by width."""
    names = ["off", "1", "4", "16", "infinite"]
    graph = _sources("nothing", BATCH) | {
        "compare": node(
            "SEGuidanceSweep",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent=["latent", 0],
            vae=["vae", 0],
            sigmas=", ".join(names),
            scales=str(SCALE),
            seed=SEED,
            steps=20,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
        ),
        "grid": node("SaveImage", images=["compare", 0], filename_prefix="grid"),
        "save": node("SaveImage", images=["compare", 1], filename_prefix="all"),
    }
    images = _images(host, graph, "save")
    columns = {name: images[i * BATCH : (i + 1) * BATCH] for i, name in enumerate(names)}
    words = [name if name in ("off", "infinite") else f"sigma {name}" for name in names]
    _write("comparison", _table(columns.values(), words), colours=256)
    _write("compare_node", _images(host, graph, "grid")[0], colours=256)
    return columns


def relatives(host: Server) -> None:
    """Draw the same seeds without guidance and with each of the guidance nodes."""
    window = {"start_percent": 0.0, "end_percent": 1.0, "model": ["model", 0]}
    graph = _sources("nothing", BATCH) | {
        "SEG": node(
            "SEGuidance",
            scale=SCALE,
            infinite_blur=True,
            blur_sigma=10.0,
            **window,
        ),
        "PAG": node("SEGuidancePAG", scale=0.5, **window),
        "SAG": node("SEGuidanceSAG", scale=0.25, blur_sigma=2.0, **window),
        "TPG": node("SEGuidanceTPG", scale=0.3, blocks="middle", **window),
        "SLG": node("SEGuidanceSLG", scale=0.3, **window),
    }
    names = ("off", "SEG", "PAG", "SAG", "TPG", "SLG")
    for name in names:
        model = "model" if name == "off" else name
        graph[f"{name} sampler"] = _sampled(model, 1.0)
        graph[f"{name} decoder"] = node(
            "SEGDemoDecode", samples=[f"{name} sampler", 0], scale=4, method="bicubic"
        )
        graph[f"{name} save"] = node(
            "SaveImage", images=[f"{name} decoder", 0], filename_prefix=name
        )
    found = host.run(graph)
    from PIL import Image

    columns = {
        name: [
            Image.open(io.BytesIO(host.image_bytes(one))).convert("RGB")
            for one in found[f"{name} save"]["images"]
        ]
        for name in names
    }
    for file, chosen in {
        "relatives": ("off", "SEG", "PAG", "SAG"),
        "relatives_tpg": ("off", "SEG", "TPG"),
        "relatives_slg": ("off", "SEG", "SLG"),
    }.items():
        _write(file, _table([columns[name] for name in chosen], list(chosen)), colours=256)


def report(host: Server) -> None:
    """Draw what SEG Report shows of a run with cfg and half a window."""
    guidance = {"scale": 0.5, "infinite_blur": False, "blur_sigma": 1.0}
    graph = _sources("blue", 1) | {
        "seg": node("SEGuidance", model=["model", 0], start_percent=0, end_percent=0.8, **guidance),
        "probe": node("SEGuidanceProbe", model=["seg", 0]),
        "sampler": _sampled("probe", 2.0),
        "decode": node("SEGDemoDecode", samples=["sampler", 0], scale=8, method="bicubic"),
        "report": node(
            "SEGuidanceReport", probe=["probe", 1], latent=["sampler", 0], image=["decode", 0]
        ),
        "plots": node("SaveImage", images=["report", 0], filename_prefix="plots"),
        "maps": node("SaveImage", images=["report", 1], filename_prefix="maps"),
        "text": node("PreviewAny", source=["report", 2]),
    }
    _write("report_plots", _images(host, graph, "plots")[0], colours=96)
    maps = _images(host, graph, "maps")
    sheet = _new(sum(one.width for one in maps) + 8 * (len(maps) - 1), maps[0].height)
    for index, one in enumerate(maps):
        sheet.paste(one, (index * (one.width + 8), 0))
    _write("report_maps", sheet, colours=256)


# Diagrams


def blur_kernels() -> None:
    """Show what one query is made of at several widths of the blur."""
    import torch

    from seg_core import gaussian_matrix

    figure, panels = _figure(4, (9.6, 3.0))
    side, centre = 32, 15
    for panel, sigma in zip(panels, (1.0, 4.0, 16.0, math.inf), strict=True):
        line = gaussian_matrix(side, sigma, kernel="full")[centre].float()
        panel.imshow(torch.outer(line, line), cmap="inferno", vmin=0)
        panel.set_title("infinite" if math.isinf(sigma) else f"sigma {sigma:g}")
    _keep("blur_kernels", figure)


def _attention() -> Any:
    """Return logits of a smooth random field of queries and keys over a grid."""
    import torch

    from seg_core import blur_queries

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(1, GRID[0] * GRID[1], 32, generator=generator)
    smooth = blur_queries(tokens, GRID, 1.2)
    smooth = smooth / smooth.std()
    return (smooth @ smooth.mT)[0] / math.sqrt(32) * 1.3


def attention_maps() -> None:
    """Show where one place looks: plainly, blurred, with the mean query, and seeing itself."""
    import torch

    from seg_core import smoothed_logits

    logits = _attention()
    here = 5 * GRID[1] + 7
    shown = {
        "plain": logits.softmax(-1)[here],
        "SEG, sigma 2": smoothed_logits(logits, GRID, 2.0).softmax(-1)[here],
        "SEG, infinite": smoothed_logits(logits, GRID, math.inf).softmax(-1)[here],
        "PAG": torch.eye(len(logits))[here],
    }
    figure, panels = _figure(4, (9.6, 2.5))
    for panel, (words, weights) in zip(panels, shown.items(), strict=True):
        panel.imshow(weights.reshape(GRID), cmap="inferno", vmin=0)
        panel.plot(here % GRID[1], here // GRID[1], "o", mec=BLUE, mfc="none", ms=20, mew=2)
        panel.set_title(words)
    _keep("attention_maps", figure)


def energy() -> None:
    """Show what the paper proves: blur lowers variance, log-sum-exp and curvature."""
    from seg_core import energy_curvature, logit_variance, mean_logsumexp, smoothed_logits

    logits = _attention()
    sigmas = [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, math.inf]
    smoothed = [smoothed_logits(logits, GRID, sigma) for sigma in sigmas]
    series = {
        "variance of the logits": [float(logit_variance(each)) for each in smoothed],
        "mean log-sum-exp": [float(mean_logsumexp(each)) for each in smoothed],
        "curvature": [float(energy_curvature(logits, GRID, sigma)) for sigma in sigmas],
    }
    figure, panels = _figure(3, (9.6, 3.6), picture=False)
    words = ["0" if not s else "inf" if math.isinf(s) else f"{s:g}" for s in sigmas]
    for panel, (title, values) in zip(panels, series.items(), strict=True):
        panel.plot(range(len(sigmas)), values, "o-", color=BLUE)
        panel.set_xticks(range(len(sigmas)), words)
        panel.set_title(title)
        panel.set_xlabel("blur sigma")
    _keep("energy", figure)


def _figure(count: int, size: tuple[float, float], *, picture: bool = True) -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"text.color": LIGHT, "axes.labelcolor": LIGHT, "axes.edgecolor": "#55555e"}
    ticks = {"xtick.color": LIGHT, "ytick.color": LIGHT, "font.size": 15, "axes.titlesize": 17}
    lines = {"lines.linewidth": 3, "axes.facecolor": DARK, "grid.color": "#43434b"}
    with mpl.rc_context({**style, **ticks, **lines}):
        figure = Figure(figsize=size, dpi=100, layout="constrained", facecolor=DARK)
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, count)
    for panel in panels:
        if picture:
            panel.set_axis_off()
        else:
            panel.grid(visible=True)
    return figure, panels


def _keep(name: str, figure: Any) -> None:
    from PIL import Image

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figure.png"
        figure.savefig(path)
        _write(name, Image.open(path).convert("RGB"), colours=128)


# Icon and banner


def icon(side: int = 400) -> Any:
    """Draw a token grid lit by one blurred query."""
    from PIL import Image, ImageDraw

    from seg_core import gaussian_matrix

    cells, gap, radius = 7, 10, 12
    sheet = Image.new("RGB", (side, side), DARK)
    draw = ImageDraw.Draw(sheet)
    step = (side - 2 * 28 + gap) / cells
    line = gaussian_matrix(33, 1.7, kernel="full")[16][13:20]
    for row in range(cells):
        for column in range(cells):
            light = float(line[row] * line[column] / line[3] ** 2) ** 0.8
            colour = (
                _mixed("#2c3440", BLUE, light)
                if light < 0.7
                else _mixed(BLUE, "#ffffff", (light - 0.7) / 0.3)
            )
            left, top = 28 + column * step, 28 + row * step
            box = (left, top, left + step - gap, top + step - gap)
            draw.rounded_rectangle(box, radius, fill=colour)
    sheet.save(made_folder(ICON.parent) / ICON.name, optimize=True)
    _say(ICON)
    return sheet


def banner(columns: Mapping[str, list[Any]]) -> None:
    """Put the name beside what the demo model draws without and with the guidance, at 21:9."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = 1680, 720
    sheet = _new(width, height)
    draw = ImageDraw.Draw(sheet)
    mark = Image.open(ICON).resize((180, 180))
    sheet.paste(mark, (80, 110))
    draw.text((80, 330), "Smoothed Energy", LIGHT, ImageFont.load_default(84))
    draw.text((80, 425), "Guidance", LIGHT, ImageFont.load_default(84))
    draw.text(
        (80, 550), "better structure, with or without a prompt", BLUE, ImageFont.load_default(38)
    )
    side, top = 238, 150
    for x, (name, words) in enumerate((("off", "off"), ("infinite", "with SEG"))):
        left = 860 + x * (side * 3 // 2 + 40)
        draw.text(
            (left + side * 3 // 4, top - 22), words, LIGHT, ImageFont.load_default(40), anchor="ms"
        )
        small = side * 3 // 4 - 4
        for index, image in enumerate(columns[name][:4]):
            place = (left + index % 2 * (small + 8), top + index // 2 * (small + 8))
            sheet.paste(image.resize((small, small), Image.Resampling.LANCZOS), place)
    sheet.quantize(256, kmeans=1).save(BANNER, optimize=True)
    _say(BANNER)


def _mixed(dark: str, light: str, share: float) -> tuple[int, ...]:
    share = min(1.0, max(0.0, share))
    pairs = [(int(dark[i : i + 2], 16), int(light[i : i + 2], 16)) for i in (1, 3, 5)]
    return tuple(round(a + (b - a) * share) for a, b in pairs)


# Files


def _new(width: int, height: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (width, height), DARK)


def _table(columns: Any, words: list[str]) -> Any:
    """Return images in labelled columns, as the pack's own nodes lay them out."""
    place = ROOT / "nodes" / "pictures.py"
    spec = importlib.util.spec_from_file_location("seg_pictures", place)
    assert spec is not None
    assert spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    rows = [list(row) for row in zip(*columns, strict=True)]
    return pictures.labelled_grid(rows, words, [""] * len(rows))


def _write(name: str, picture: Any, *, colours: int = 64) -> None:
    path = PAGES / f"{name}.png"
    picture.convert("RGB").quantize(colours, kmeans=1).save(path, optimize=True)
    _say(path)


def _say(path: Path) -> None:
    say(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KiB")
