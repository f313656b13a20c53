"""`dev.py demo`: the comparison off / sigma 1 / sigma 4 / infinite, through the real server."""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dev import graphs
from dev.comfy_tree import host_tree
from dev.host import Server, link_file, refusal
from dev.places import ARTIFACTS, DEMO_PACK, made_folder
from dev.say import Failure, disk_errors, say, step

COLUMNS = (graphs.OFF, "sigma 1", "sigma 4", graphs.INFINITE)
DEMO_SIZE = 32
DEMO_BATCH = 9
DEMO_PROMPTS = ("nothing", *"0123456789")
SHOWN = ("ComfyUI version", "Device:", "loaded completely", "WARNING", "ERROR")


@dataclass
class Row:
    """One row of the picture: a prompt and a cfg, and the images of each column."""

    label: str
    caption: str
    prompt: str
    cfg: float
    images: dict[str, list[Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Render the comparison, write the labelled picture and report the figures."""
    del rest
    begin = time.monotonic()
    checkpoint = _checkpoint(options)
    rows = _rows(options, checkpoint)
    tree = host_tree()
    step("Starting ComfyUI (about 15 s)")
    with Server(tree, demo=checkpoint is None, on_line=_summarised) as host:
        if checkpoint is not None:
            link_file(checkpoint, host.base / "models" / "checkpoints" / checkpoint.name)
        for row in rows:
            _render(host, row, options, checkpoint)
    out = Path(options.out or ARTIFACTS / "demo.png").resolve()
    _write_picture(rows, out, _title(options, checkpoint))
    _report(rows)
    say(f"\nThe picture: {out}\n({time.monotonic() - begin:.0f} s in all)")
    return 0


def _checkpoint(options: argparse.Namespace) -> Path | None:
    if options.checkpoint is None:
        if options.size:
            raise Failure("--size needs --checkpoint; the demo model draws at one size.")
        if not (DEMO_PACK / "__init__.py").exists():
            raise Failure(f"The demo model's pack is missing: {DEMO_PACK}.")
        return None
    path = Path(options.checkpoint).expanduser().resolve()
    if not path.is_file():
        raise Failure(f"There is no checkpoint file {path}.")
    return path


def _rows(options: argparse.Namespace, checkpoint: Path | None) -> list[Row]:
    prompt = options.prompt
    if checkpoint is None:
        prompt = prompt or "3"
        if prompt not in DEMO_PROMPTS:
            choices = ", ".join(DEMO_PROMPTS)
            raise Failure(f"The demo model knows the prompts {choices}; it got {prompt!r}.")
    prompt = prompt or "a photograph of a lighthouse on a cliff, evening light"
    nothing = "nothing" if checkpoint is None else ""
    return [
        Row("no prompt, cfg 1", "no prompt, cfg 1", nothing, 1.0),
        Row("prompt, cfg 4", f'cfg 4, prompt "{prompt}"', prompt, 4.0),
    ]


def _render(host: Server, row: Row, options: argparse.Namespace, checkpoint: Path | None) -> None:
    parts = graphs.columns(graphs.comparison())
    for column in COLUMNS:
        if column not in parts:
            raise Failure(f"The shipped comparison has no column {column!r}.")
        if checkpoint is None:
            graph = graphs.for_demo_model(
                parts[column], row.prompt, size=DEMO_SIZE, batch=DEMO_BATCH
            )
        else:
            graph = graphs.for_checkpoint(parts[column], checkpoint.name, row.prompt, options.size)
        graph = graphs.with_sampling(graph, cfg=row.cfg, seed=options.seed, steps=options.steps)
        progress = _progress(f"{row.label} | {column}")
        begin = time.monotonic()
        found = asyncio.run(_run_watched(host, graph, progress))
        row.images[column] = [_opened(host.image_bytes(image)) for image in found]
        row.seconds[column] = (time.monotonic() - begin) / len(found)
        progress(None, None)


async def _run_watched(
    host: Server, graph: graphs.Graph, progress: Callable[[Any, Any], None]
) -> list[dict[str, str]]:
    """Queue a graph, follow it over the websocket, and return its saved images."""
    import aiohttp

    address = f"{host.url}/ws?clientId=demo"
    try:
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
            status, answer = await asyncio.to_thread(
                host.post, "/prompt", {"prompt": graph, "client_id": "demo"}
            )
            if status != 200:
                raise Failure(f"ComfyUI refused the workflow: {refusal(answer)}")
            await _follow(socket, answer["prompt_id"], progress)
    except aiohttp.ClientError as error:
        raise Failure(f"The connection to ComfyUI broke: {error}") from error
    entry = await asyncio.to_thread(host.finished, answer["prompt_id"], 30)
    return entry["outputs"]["save"]["images"]


async def _follow(socket: Any, prompt: str, progress: Callable[[Any, Any], None]) -> None:
    async for message in socket:
        event = message.json() if isinstance(message.data, str) else {}
        data = event.get("data") or {}
        if data.get("prompt_id") != prompt:
            continue
        match event["type"]:
            case "progress":
                progress(data["value"], data["max"])
            case "execution_error":
                cause = data["exception_message"].strip()
                raise Failure(f"Node {data['node_type']} failed: {cause}")
            case "execution_success":
                return
    raise Failure("ComfyUI closed the connection in the middle of a workflow.")


def _progress(label: str) -> Callable[[Any, Any], None]:
    """Return a reporter of sampling steps: one moving line, or every quarter into a pipe."""
    begin = time.monotonic()
    moving = sys.stdout.isatty()

    def show(value: Any, total: Any) -> None:
        spent = f"{time.monotonic() - begin:5.1f} s"
        if value is None:
            say(f"{chr(13) if moving else ''}   {label:<28} done        {spent}")
        elif moving:
            sys.stdout.write(f"\r   {label:<28} step {value}/{total} {spent}")
            sys.stdout.flush()
        elif value % max(1, total // 2) == 0 and value < total:
            say(f"   {label:<28} step {value}/{total} {spent}")

    return show


def _summarised(line: str) -> None:
    if any(word in line for word in SHOWN):
        say(f"   ComfyUI: {line.strip()}")


def _opened(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def _title(options: argparse.Namespace, checkpoint: Path | None) -> str:
    source = checkpoint.name if checkpoint else "embedded demo model (digits)"
    return f"Smoothed Energy Guidance, scale 3 - {source} - the same seed {options.seed} everywhere"


def moved(images: list[Any], off: list[Any]) -> float:
    """Return the RMS difference from *off*, as a share of the contrast (std) of *off*."""
    import numpy as np

    changed, plain = (np.stack([np.asarray(i, dtype=np.float64) for i in s]) for s in (images, off))
    return float(np.sqrt(((changed - plain) ** 2).mean()) / max(plain.std(), 1e-12))


def _report(rows: list[Row]) -> None:
    say("\nseconds per image (the first column of the first row also loads the model),")
    say("and how far the column moved from *off*: RMS difference / contrast of *off*")
    say(f"{'':<18}" + "".join(f"{column:>18}" for column in COLUMNS))
    for row in rows:
        cells = (
            f"{row.seconds[column]:8.2f} s {moved(row.images[column], row.images[graphs.OFF]):7.1%}"
            for column in COLUMNS
        )
        say(f"{row.label:<18}" + "".join(f"{cell:>18}" for cell in cells))


def _write_picture(rows: list[Row], out: Path, title: str) -> None:
    from PIL import Image, ImageDraw, ImageFont

    sheets = [[_sheet(row.images[column]) for column in COLUMNS] for row in rows]
    width, height = sheets[0][0].size
    scale = max(1, round(300 / max(width, height)))
    width, height = width * scale, height * scale
    font, small = (ImageFont.load_default(size) for size in (22, 18))
    gap, head, strip = 12, 84, 34
    size = (gap + len(COLUMNS) * (width + gap), head + len(rows) * (height + strip + gap))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((gap, 10), _fitted(draw, title, size[0] - 2 * gap, font), "black", font)
    for x, column in enumerate(COLUMNS):
        left = gap + x * (width + gap)
        draw.text((left + width / 2, head - 14), column, "black", font, anchor="ms")
        for y, row in enumerate(rows):
            top = head + y * (height + strip + gap)
            picture.paste(
                sheets[y][x].resize((width, height), Image.Resampling.NEAREST), (left, top)
            )
            away = moved(row.images[column], row.images[graphs.OFF])
            note = row.caption if x == 0 else f"{away:.0%} from off"
            draw.text((left, top + height + 6), _fitted(draw, note, width, small), "black", small)
    with disk_errors(out):
        made_folder(out.parent)
        picture.save(out)


def _fitted(draw: Any, text: str, width: int, font: Any) -> str:
    while draw.textlength(text, font) > width and len(text) > 4:
        text = text[:-4].rstrip() + "..."
    return text


def _sheet(images: list[Any]) -> Any:
    """Return the images of one batch side by side, as nearly square as they go."""
    from PIL import Image

    across = next(n for n in range(1, len(images) + 1) if n * n >= len(images))
    down = -(-len(images) // across)
    width, height = images[0].size
    sheet = Image.new("RGB", (across * (width + 2) - 2, down * (height + 2) - 2), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % across * (width + 2), index // across * (height + 2)))
    return sheet
