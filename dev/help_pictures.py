"""The pictures of the help pages, the icon and the banner: `python -m dev.help_pictures`.

Results come out of the nodes themselves, on a real ComfyUI with the demo model; diagrams are
computed by `seg_core`. The README's picture is the output of `dev.py demo --out docs/demo.jpg`,
thumbnails of workflows are made by `dev/templates.py`.
"""

from __future__ import annotations

import importlib.util
import io
import math
from typing import Any

from dev import brand, diagrams
from dev.comfy_tree import CURRENT, pinned_tree
from dev.evaluation import settings
from dev.evaluation.demo import sources
from dev.graphs import Graph, ksampler, new_node
from dev.host import Server
from dev.places import ROOT, made_folder
from dev.say import say

PAGES = ROOT / "web" / "docs" / "pictures"
SEED = 11
STEPS = 20
BATCH = 4
SCALE = 0.25  # what `dev.py evaluate` finds right for so small a model
BESIDE_OFF = {  # which guidances each picture compares with *off*
    "relatives": ("SEG", "PAG", "SAG"),
    "relatives_tpg": ("SEG", "TPG"),
    "relatives_slg": ("SEG", "SLG"),
    "relatives_ssg": ("SEG", "SSG"),
}


def make_all() -> None:
    """Make every picture of the help pages, the icon and the banner."""
    made_folder(PAGES)
    _write("blur_kernels", diagrams.blur_kernels(), colours=128)
    _write("attention_maps", diagrams.attention_maps(), colours=128)
    _write("energy", diagrams.energy(), colours=128)
    with Server(pinned_tree(CURRENT), demo=True) as host:
        columns = comparison(host)
        too_much(host)
        relatives(host)
        report(host)
    brand.icon()
    brand.banner(columns)


def comparison(host: Server) -> dict[str, list[Any]]:
    """Draw five widths of the blur with SEG Compare, and return the images by width."""
    names = ["off", "1", "4", "16", "infinite"]
    grid, columns = _compared(host, sigmas=", ".join(names), scales=str(SCALE))
    words = [name if name in ("off", "infinite") else f"sigma {name}" for name in names]
    _write("comparison", _table(columns, words))
    _write("compare_node", grid)
    return dict(zip(names, columns, strict=True))


def too_much(host: Server) -> None:
    """Draw scales from none to far too large for the demo model."""
    scales = ["off", str(SCALE), "1", "3"]
    _, columns = _compared(host, sigmas="infinite", scales=", ".join(scales))
    words = [scale if scale == "off" else f"scale {scale}" for scale in scales]
    _write("too_much", _table(columns, words))


def _compared(host: Server, **lists: str) -> tuple[Any, list[list[Any]]]:
    """Run SEG Compare over a single list; return its grid, and the images of each entry."""
    sampling = ksampler("model", steps=STEPS, cfg=1.0, seed=SEED)["inputs"]
    shared = {name: sampling[name] for name in sampling if name not in ("latent_image", "denoise")}
    wires = {"latent": ["latent", 0], "vae": ["vae", 0]}
    graph = sources("nothing", BATCH, scale=4) | {
        "compare": new_node("SEGuidanceSweep", **shared, **wires, **lists),
        "grid": _saved("compare"),
        "all": _saved("compare", 1),
    }
    found = _images(host, graph, "grid", "all")
    images = found["all"]
    return found["grid"][0], [images[i : i + BATCH] for i in range(0, len(images), BATCH)]


def relatives(host: Server) -> None:
    """Draw the same seeds without guidance and with each of the guidance nodes."""
    compared = [
        settings.off(),
        settings.seg(math.inf, SCALE),
        settings.other("PAG", 0.5),
        settings.other("SAG", 0.25),
        settings.other("TPG", 0.3, blocks="middle"),
        settings.other("SLG", 0.3),
        settings.other("SSG", 0.5),
    ]
    graph = sources("nothing", BATCH, scale=4)
    for each in compared:
        if each.node is not None:
            graph[each.method] = new_node(each.node, model=["model", 0], **each.inputs)
        model = each.method if each.node else "model"
        graph |= _sampled(each.method, ksampler(model, steps=STEPS, cfg=1.0, seed=SEED))
    columns = _images(host, graph, *(f"{each.method} save" for each in compared))
    for picture, methods in BESIDE_OFF.items():
        shown = ("off", *methods)
        _write(picture, _table([columns[f"{name} save"] for name in shown], list(shown)))


def report(host: Server) -> None:
    """Draw what SEG Report shows of a run."""
    graph = report_graph() | {"plots": _saved("report"), "maps": _saved("report", 1)}
    found = _images(host, graph, "plots", "maps")
    _write("report_plots", found["plots"][0], colours=96)
    _write("report_maps", _table([[image] for image in found["maps"]], [""] * len(found["maps"])))


def report_graph() -> Graph:
    """Return a run with cfg and a window, and SEG Report on it."""
    guidance = settings.seg(1.0, 0.5, end_percent=0.8)
    shown = {"latent": ["sampler", 0], "image": ["decode", 0]}
    return sources("blue", 1, scale=8) | {
        "seg": new_node("SEGuidance", model=["model", 0], **guidance.inputs),
        "probe": new_node("SEGuidanceProbe", model=["seg", 0]),
        "sampler": ksampler("probe", steps=STEPS, cfg=2.0, seed=SEED),
        "decode": new_node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "report": new_node("SEGuidanceReport", probe=["probe", 1], **shown),
    }


def _sampled(name: str, sampler: dict[str, Any]) -> Graph:
    """Return a sampler with the nodes that decode and save its images."""
    return {
        f"{name} sampler": sampler,
        f"{name} decode": new_node("VAEDecode", samples=[f"{name} sampler", 0], vae=["vae", 0]),
        f"{name} save": _saved(f"{name} decode"),
    }


def _saved(source: str, output: int = 0) -> dict[str, Any]:
    return new_node("SaveImage", images=[source, output], filename_prefix="help")


def _images(host: Server, graph: Graph, *names: str) -> dict[str, list[Any]]:
    """Run a graph and return the images of these nodes that save them."""
    from PIL import Image

    found = host.run(graph)
    return {
        name: [
            Image.open(io.BytesIO(host.image_bytes(one))).convert("RGB")
            for one in found[name]["images"]
        ]
        for name in names
    }


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


def _write(name: str, picture: Any, *, colours: int = 256) -> None:
    path = PAGES / f"{name}.png"
    picture.convert("RGB").quantize(colours, kmeans=1).save(path, optimize=True)
    say(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    make_all()
