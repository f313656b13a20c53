"""`dev.py demo`: the same seeds without and with guidance, through the real server."""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dev import graphs
from dev.comfy_tree import host_tree
from dev.demo_model import butterflies
from dev.demo_picture import Row, report, write_picture
from dev.evaluation.settings import shown_grid
from dev.host import Server, link_file, refusal
from dev.places import ARTIFACTS, DEMO_PACK
from dev.say import Failure, say, step

COLUMNS = (graphs.OFF, "sigma 1", "sigma 4", graphs.INFINITE)
DEMO_SIZE = butterflies.SIZE
DEMO_BATCH = 9
DEMO_STEPS = 20
DEMO_CFG = 2.0
CFG = 4.0
DEMO_PROMPTS = ("nothing", *butterflies.HUES)
SHOWN = ("ComfyUI version", "Device:", "loaded completely", "WARNING", "ERROR")


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
    write_picture(rows, out, _title(options, checkpoint))
    report(rows)
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
        prompt = prompt or "blue"
        if prompt not in DEMO_PROMPTS:
            choices = ", ".join(DEMO_PROMPTS)
            raise Failure(f"The demo model knows the prompts {choices}; it got {prompt!r}.")
    prompt = prompt or "a photograph of a lighthouse on a cliff, evening light"
    nothing, cfg = ("nothing", DEMO_CFG) if checkpoint is None else ("", CFG)
    return [
        Row("no prompt, cfg 1", "no prompt, cfg 1", nothing, 1.0),
        Row(f"prompt, cfg {cfg:g}", f'cfg {cfg:g}, prompt "{prompt}"', prompt, cfg),
    ]


def _columns(checkpoint: Path | None) -> dict[str, graphs.Graph]:
    """Return a workflow for each column: the shipped one's, or what `evaluate` found to show."""
    parts = graphs.columns(graphs.comparison())
    for column in COLUMNS:
        if column not in parts:
            raise Failure(f"The shipped comparison has no column {column!r}.")
    if checkpoint is not None:
        return {column: parts[column] for column in COLUMNS}
    guided = {
        each.name: graphs.with_guidance(parts[graphs.INFINITE], **each.inputs)
        for each in shown_grid()
        if each.node == graphs.GUIDANCE
    }
    return {graphs.OFF: parts[graphs.OFF], **guided}


def _render(host: Server, row: Row, options: argparse.Namespace, checkpoint: Path | None) -> None:
    steps = options.steps
    for column, part in _columns(checkpoint).items():
        if checkpoint is None:
            steps = steps or DEMO_STEPS
            graph = graphs.for_demo_model(part, row.prompt, size=DEMO_SIZE, batch=DEMO_BATCH)
        else:
            graph = graphs.for_checkpoint(part, checkpoint.name, row.prompt, options.size)
        graph = graphs.with_sampling(graph, cfg=row.cfg, seed=options.seed, steps=steps)
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
    source = f"scale 3 - {checkpoint.name}" if checkpoint else "the demo model (blur, scale)"
    return f"Smoothed Energy Guidance - {source} - the same seed {options.seed} everywhere"
