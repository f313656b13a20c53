"""`python dev.py bench`: what a guided sampling step costs, as a table, JSON and a plot.

FLOPs, parameters read and tensor memory are counted exactly, at nominal size on the meta device;
wall time is measured on the device at hand, all variants in one run, interleaved. Where weights
dominate, at small sizes, it is measured once more, on a GPU also with the weights offloaded.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if __name__ == "__main__":  # run as a script: the checkout takes this folder's place on the path
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parents[1])]

from benchmarks import host

if TYPE_CHECKING:
    from benchmarks.models import Kind
    from benchmarks.variants import Variant

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ON_CPU = ("sd15", "128x128", "fp32", 3)
ON_GPU = ("sdxl", "1024x1024", "fp16", 15)
# Spread from which on times are not to be trusted.
BUSY = 0.1
SMALL_SIZES = ((64, 64), (128, 128))


def main() -> int:
    """Measure, and write what was asked for."""
    options = _options()
    begin = time.monotonic()
    host.start(options.device)
    result = {"settings": _settings(options), "counted": {}, "measured": {}, "weights": []}
    with torch.inference_mode():
        for name in options.count:
            result["counted"][name] = _count(name, options)
        result["blur"] = _blur(options)
        if options.repeats:
            result["weights"] = _measure_weights(options)
        if options.repeats and not options.weights:
            result["measured"] = _measure(options)
    result["settings"]["seconds"] = round(time.monotonic() - begin)
    text = _markdown(result)
    sys.stdout.write(text)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="ascii")
    if options.markdown:
        Path(options.markdown).write_text(text, encoding="ascii")
    if options.plot:
        from benchmarks.plot import draw

        draw(result, options.plot)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py bench", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=["sdxl", "sd15"], help="default: both are counted")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels of what is timed")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="timed rounds; 0 only counts")
    parser.add_argument(
        "--weights", action="store_true", help="time only where weights dominate, at small sizes"
    )
    parser.add_argument("--all", action="store_true", help="every combination, on a CPU too")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--markdown", help="write the table to this file")
    parser.add_argument("--plot", help="write a plot to this PNG")
    options = parser.parse_args()
    model, size, dtype, repeats = ON_CPU if options.device == "cpu" else ON_GPU
    options.count = [options.model] if options.model else ["sdxl", "sd15"]
    options.model = options.model or model
    options.size = tuple(int(n) for n in (options.size or size).lower().split("x"))
    options.dtype = options.dtype or dtype
    options.repeats = repeats if options.repeats is None else options.repeats
    options.thin = options.device == "cpu" and not options.all
    return options


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    import comfyui_version

    on_cpu = options.device == "cpu"
    hardware = f"{os.cpu_count()} CPU cores" if on_cpu else torch.cuda.get_device_name()
    return {
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "model": options.model,
        "size": "x".join(map(str, options.size)),
        "batch": options.batch,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "torch": version("torch").split("+")[0],
        "comfyui": comfyui_version.__version__,
    }


def _key(variant: Variant) -> dict[str, Any]:
    return {
        "cfg": variant.cfg,
        "control": variant.control,
        "method": variant.method,
        "blocks": variant.blocks if variant.is_seg else None,
        "sigma": str(variant.sigma) if variant.is_seg else None,
        "title": variant.title,
    }


def _count(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks import counting, models, variants
    from benchmarks.step import on_meta

    kind = models.KINDS[name]
    rows, flops, reads = [], {}, {}
    with on_meta():
        bench = variants.Bench(kind, torch.device("meta"), torch.float16, host.seg_node())
        for variant in variants.every(thin=options.thin):
            cost = counting.count(bench.step(variant, kind.size), variant.every)
            flops[variant], reads[variant] = cost.flops, cost.parameters_read
            ratio = cost.flops / flops[variant.baseline]
            row = {
                "teraflops": cost.flops / 1e12,
                "ratio": ratio,
                "megaparameters read": cost.parameters_read / 1e6,
                "read ratio": cost.parameters_read / reads[variant.baseline],
                "megabytes": cost.peak_bytes / 1e6,
            }
            rows.append(_key(variant) | row)
    return rows


def _blur(options: argparse.Namespace) -> dict[str, float]:
    from benchmarks import blur

    device = torch.device(options.device)
    # Low precision has no fast convolution on a CPU: to compare with it would flatter us.
    dtype = torch.float32 if device.type == "cpu" else DTYPES[options.dtype]
    ours, reference = blur.measure(device, dtype)
    return {"ms": 1e3 * ours, "reference ms": 1e3 * reference, "times faster": reference / ours}


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks import models, variants

    every = [variant for variant in variants.every(thin=options.thin) if variant.every == 1]
    if options.thin:
        every = [variant for variant in every if variant.method not in variants.RELATIVES]
    return _timed(models.KINDS[options.model], options.size, every, options)


def _measure_weights(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure small images, where reading the weights takes most of the time."""
    from benchmarks import models, variants

    on_gpu = options.device != "cpu"
    kinds = [models.SMALL] + [models.KINDS[options.model]] * on_gpu
    few = variants.few()
    return [
        {
            "title": f"{kind.title}, {size[0]}x{size[1]}" + ", weights offloaded" * offloaded,
            "rows": _timed(kind, size, few, options, offloaded=offloaded),
        }
        for kind in kinds
        for offloaded in ((False, True) if on_gpu else (False,))
        for size in SMALL_SIZES + ((kind.size,) if on_gpu and kind is not models.SMALL else ())
    ]


def _timed(
    kind: Kind,
    size: tuple[int, int],
    every: list[Variant],
    options: argparse.Namespace,
    *,
    offloaded: bool = False,
) -> list[dict[str, Any]]:
    from benchmarks import counting, timing, variants

    device = torch.device(options.device)
    control = any(variant.control for variant in every)
    dtype, node = DTYPES[options.dtype], host.seg_node()
    bench = variants.Bench(kind, device, dtype, node, control=control, offloaded=offloaded)
    steps = {variant: bench.step(variant, size, options.batch) for variant in every}
    runs = {variant: step.evaluate for variant, step in steps.items()}

    def body() -> tuple[dict[Any, list[float]], dict[Any, int]]:
        if device.type == "cuda":
            for run in runs.values():
                run()
        peaks = {v: timing.peak_bytes(run, device) or tensor_bytes(run) for v, run in runs.items()}
        return timing.interleaved(runs, options.repeats, device), peaks

    def tensor_bytes(run: Callable[[], Any]) -> int:
        with counting.PeakBytes() as memory:
            run()
        return memory.peak

    inside: Callable[[], Any] = body
    for step in steps.values():  # each inside a sampling run of its own
        inside = functools.partial(step.run, inside)
    seconds, peaks = inside()
    medians = {variant: statistics.median(times) for variant, times in seconds.items()}
    return [
        _key(variant)
        | {
            "seconds": medians[variant],
            "spread": timing.spread(seconds[variant]),
            "ratio": statistics.median(
                a / b for a, b in zip(seconds[variant], seconds[variant.baseline], strict=True)
            ),
            "megabytes": peaks[variant] / 1e6,
        }
        for variant in steps
    ]


def _markdown(result: dict[str, Any]) -> str:
    from benchmarks import models

    settings = result["settings"]
    lines = ["# What a guided sampling step costs", ""]
    for name, rows in result["counted"].items():
        kind = models.KINDS[name]
        title = f"## {kind.title}, {kind.size[0]}x{kind.size[1]}, one image: counted exactly"
        lines += [title, "", *_table(rows, "TFLOPs", "teraflops", "{:.3f}"), ""]
    if result["measured"]:
        kind = models.KINDS[settings["model"]]
        lines += [
            f"## {kind.title}, {settings['size']}, batch {settings['batch']}, {settings['dtype']}: "
            f"measured on {settings['hardware']}",
            "",
            *_table(result["measured"], "seconds", "seconds", "{:.3f}"),
            "",
        ]
    if result["weights"]:
        lines += [
            "## Small images, where reading the weights takes most of the time: measured on "
            f"{settings['hardware']}, {settings['dtype']}",
            "",
            *_weights_table(result["weights"]),
            "",
        ]
        if settings["hardware"].endswith("CPU cores"):
            lines += ["Not measured, for want of a GPU: anything on one, weights offloaded.", ""]
    if _worst_spread(result) > BUSY:
        lines += [
            "**The machine was busy with other work.** Times of one step spread by up to "
            f"{100 * _worst_spread(result):.0f} %: ratios that lie closer together than that say "
            "nothing. What is counted is exact.",
            "",
        ]
    blur = result["blur"]
    lines += [
        "## The query blur alone, 32x32 tokens of 1280 channels, sigma 10",
        "",
        f"{blur['ms']:.2f} ms; the reference's `conv2d` {blur['reference ms']:.2f} ms: "
        f"{blur['times faster']:.0f} times faster.",
        "",
        f"ComfyUI {settings['comfyui']}, torch {settings['torch']}, {settings['hardware']}, "
        f"threads: {settings['threads']}, {settings['repeats']} rounds, {settings['seconds']} s. "
        "Counted: matrix products, convolutions and attention; parameters, each as often as an "
        "operation reads it; memory is the peak of live tensors "
        "beside the weights, in fp16 with fused attention (measured: of the allocator on a GPU, of "
        "live tensors on a CPU). Measured: medians of interleaved "
        "rounds; the ratio is the median of each round's; spread is half of slowest minus "
        "fastest.",
        "",
    ]
    return "\n".join(lines)


def _worst_spread(result: dict[str, Any]) -> float:
    rows = [*result["measured"], *(row for table in result["weights"] for row in table["rows"])]
    return max((row["spread"] for row in rows), default=0.0)


def _table(rows: list[dict[str, Any]], heading: str, value: str, form: str) -> list[str]:
    timed = "spread" in rows[0]
    reads = [] if timed else ["M parameters read", "of CFG only"]
    columns = ["step", heading, "of CFG only", *reads, "peak MB"]
    lines = [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
    group = None
    for row in rows:
        if group != (row["cfg"], row["control"]):
            group = (row["cfg"], row["control"])
            control = ", one ControlNet" if row["control"] else ""
            lines.append(_line([f"**cfg {row['cfg']:g}{control}**", *[""] * (len(columns) - 1)]))
        cost = form.format(row[value]) + (f" +- {100 * row['spread']:.0f} %" if timed else "")
        cells = [row["title"], cost, f"{row['ratio']:.3f}"]
        if not timed:
            cells += [f"{row['megaparameters read']:.0f}", f"{row['read ratio']:.3f}"]
        lines.append(_line([*cells, f"{row['megabytes']:.0f}"]))
    return lines


def _weights_table(tables: list[dict[str, Any]]) -> list[str]:
    """Return the time of each step over that of the step without guidance."""
    methods = [row["method"] for row in tables[0]["rows"] if row["cfg"] == 1.0]
    lines = [_line(["", *methods]), _line(["---", *["---:"] * len(methods)])]
    for table in tables:
        for cfg in dict.fromkeys(row["cfg"] for row in table["rows"]):
            rows = [row for row in table["rows"] if row["cfg"] == cfg]
            cells = [f"{row['ratio']:.2f} +- {100 * row['spread']:.0f} %" for row in rows]
            cells[0] = f"{1000 * rows[0]['seconds']:.0f} ms +- {100 * rows[0]['spread']:.0f} %"
            lines.append(_line([f"{table['title']}, cfg {cfg:g}", *cells]))
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
