"""`python dev.py bench`: what a guided sampling step costs, as a table, JSON and a plot.

FLOPs and tensor memory are counted exactly, at nominal size on the meta device; wall time is
measured on the device at hand, all variants in one run, interleaved.
"""

from __future__ import annotations

import argparse
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
    from benchmarks.variants import Variant

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ON_CPU = ("sd15", "128x128", "fp32", 3)
ON_GPU = ("sdxl", "1024x1024", "fp16", 15)


def main() -> int:
    """Measure, and write what was asked for."""
    options = _options()
    begin = time.monotonic()
    host.start(options.device)
    result = {"settings": _settings(options), "counted": {}, "measured": {}}
    with torch.inference_mode():
        for name in options.count:
            result["counted"][name] = _count(name, options)
        result["blur"] = _blur(options)
        if options.repeats:
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
    rows, flops = [], {}
    with on_meta():
        bench = variants.Bench(kind, torch.device("meta"), torch.float16, host.seg_node())
        for variant in variants.every(thin=options.thin):
            cost = counting.count(bench.step(variant, kind.size))
            flops[variant] = cost.flops
            ratio = cost.flops / flops[variant.baseline]
            row = {
                "teraflops": cost.flops / 1e12,
                "ratio": ratio,
                "megabytes": cost.peak_bytes / 1e6,
            }
            rows.append(_key(variant) | row)
    return rows


def _blur(options: argparse.Namespace) -> dict[str, float]:
    from benchmarks import blur

    device = torch.device(options.device)
    # Low precision has no fast convolution on a CPU: to compare with it would flatter us.
    dtype = torch.float32 if device.type == "cpu" else DTYPES[options.dtype]
    times = blur.measure(device, dtype)
    return {"ms": times.ours, "reference ms": times.reference, "times faster": times.ratio}


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks import counting, models, timing, variants

    device = torch.device(options.device)
    kind = models.KINDS[options.model]
    bench = variants.Bench(kind, device, DTYPES[options.dtype], host.seg_node())
    steps = {
        variant: bench.step(variant, options.size, options.batch)
        for variant in variants.every(thin=options.thin)
    }
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

    seconds, peaks = _all_at_once(list(steps.values()), body)
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


def _all_at_once(steps: list[Any], body: Callable[[], Any]) -> Any:
    """Run something inside a sampling run of every step."""
    for step in steps:
        body = _inside(step, body)
    return body()


def _inside(step: Any, body: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: step.run(body)


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
    blur = result["blur"]
    lines += [
        "## The query blur alone, 32x32 tokens of 1280 channels, sigma 10",
        "",
        f"{blur['ms']:.2f} ms; the reference's `conv2d` {blur['reference ms']:.2f} ms: "
        f"{blur['times faster']:.0f} times faster.",
        "",
        f"ComfyUI {settings['comfyui']}, torch {settings['torch']}, {settings['hardware']}, "
        f"threads: {settings['threads']}, {settings['repeats']} rounds, {settings['seconds']} s. "
        "Counted: matrix products, convolutions and attention; memory is the peak of live tensors "
        "beside the weights, in fp16 with fused attention (measured: of the allocator on a GPU, of "
        "live tensors on a CPU). Measured: medians of interleaved "
        "rounds; the ratio is the median of each round's; spread is half of slowest minus "
        "fastest.",
        "",
    ]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]], heading: str, value: str, form: str) -> list[str]:
    timed = "spread" in rows[0]
    lines = [f"| step | {heading} | of CFG only | peak MB |", "| --- | ---: | ---: | ---: |"]
    group = None
    for row in rows:
        if group != (row["cfg"], row["control"]):
            group = (row["cfg"], row["control"])
            control = ", one ControlNet" if row["control"] else ""
            lines.append(f"| **cfg {row['cfg']:g}{control}** | | | |")
        cost = form.format(row[value]) + (f" +- {100 * row['spread']:.0f} %" if timed else "")
        lines.append(f"| {row['title']} | {cost} | {row['ratio']:.3f} | {row['megabytes']:.0f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
