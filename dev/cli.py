"""Command line of `dev.py`: parse, enter the environment, hand over to the command."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

from dev import environment
from dev.say import Failure, say

DESCRIPTION = "Developer commands of the Smoothed Energy Guidance node pack."
EPILOG = """\
environment variables:
  COMFYUI_PATH   run on this ComfyUI instead of the pinned one
  SEG_DEV_CACHE  keep downloads and made checkpoints here instead of the per-user cache
  SEG_CHROMIUM   the Chromium or Chrome that the browser tests start
  CI             when set, a missing browser is a failure instead of a skip

A checkout that lies in <ComfyUI>/custom_nodes runs on that ComfyUI. Every command works in
the checkout's own .venv, made from dev/requirements.txt; your ComfyUI's Python is not touched.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="dev.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="render images without and with SEG"))
    _add_evaluate(commands.add_parser("evaluate", help="measure what guidance does to images"))
    test = commands.add_parser(
        "test", help="run the tests; other arguments go to pytest", allow_abbrev=False
    )
    test.add_argument("--all", action="store_true", help="with the long ones: before a release")
    test.add_argument("--comfyui", metavar="VERSION", help="with arguments: run on this version")
    serve = commands.add_parser("serve", help="open ComfyUI with the pack installed")
    serve.add_argument("--port", type=int, default=8188)
    serve.add_argument("--comfyui", metavar="VERSION", help="version of the host to serve")
    commands.add_parser(
        "bench", help="run benchmarks/run.py; arguments go to it", allow_abbrev=False
    )
    return top


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    try:
        size = int(width), int(height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like 1024x1024, got {text}") from None
    if min(size) < 64 or size[0] % 8 or size[1] % 8:
        raise argparse.ArgumentTypeError(f"sides must be multiples of 8 from 64 up, got {text}")
    return size


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like 1,2,3, got {text}") from None
    if min(numbers) <= 0:
        raise argparse.ArgumentTypeError(f"numbers must be above 0, got {text}")
    return numbers


def _sigmas(text: str) -> tuple[float, ...]:
    return _numbers(text.replace("infinite", "inf"))


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--checkpoint", metavar="FILE", help="an SD1.5 or SDXL checkpoint of yours")
    demo.add_argument("--prompt", metavar="TEXT", help="prompt of the second row")
    demo.add_argument("--size", type=_size, metavar="WxH", help="image size in pixels")
    demo.add_argument("--steps", type=int, help="sampling steps")
    demo.add_argument("--seed", type=int, default=7, help="noise seed, the same in all images")
    demo.add_argument("--out", metavar="FILE", help="where to write the PNG")


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("--images", type=int, help="images for each setting")
    evaluate.add_argument("--steps", type=int, help="sampling steps")
    evaluate.add_argument("--out", metavar="FOLDER", help="where the tables and pictures go")
    evaluate.add_argument(
        "--weights", nargs="+", metavar="FILE", help="states of the demo model, to compare"
    )
    own = evaluate.add_argument_group("your own checkpoint; stop and start again as you like")
    own.add_argument("--checkpoint", metavar="FILE", help="an SD1.5 or SDXL checkpoint of yours")
    own.add_argument("--reference", metavar="FOLDER", help="images as they should be")
    own.add_argument("--prompts", metavar="FILE", help="one prompt a line; without it, no prompt")
    own.add_argument("--size", type=_size, metavar="WxH", help="image size, 512x512 if not given")
    own.add_argument("--cfg", type=float, help="cfg; 5 with prompts, 1 without, if not given")
    own.add_argument("--sigmas", type=_sigmas, metavar="LIST", help="such as 2,10,infinite")
    own.add_argument("--scales", type=_numbers, metavar="LIST", help="such as 1,3")
    own.add_argument(
        "--features",
        choices=("random", "inception"),
        help="what images are compared in; inception is FID and needs torch-fidelity",
    )


def main(arguments: list[str]) -> int:
    """Run one command and return the exit status."""
    options, rest = parser().parse_known_args(arguments)
    if rest and options.command in ("demo", "evaluate", "serve"):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    signal.signal(signal.SIGTERM, _stop)
    try:
        status = environment.enter(arguments)
        if status is None:
            command = importlib.import_module(f"dev.{options.command}")
            status = command.run(options, rest)
        return status
    except Failure as failure:
        say(f"Failed: {failure}")
        return 1
    except KeyboardInterrupt:
        say("Stopped.")
        return 130


def _stop(signum: int, frame: object) -> None:
    """Leave through the ordinary clean-up when asked to terminate."""
    del signum, frame
    sys.exit(143)
