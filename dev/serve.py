"""`dev.py serve`: the host with the pack installed, for a browser."""

from __future__ import annotations

import argparse
import time

from dev.comfy_tree import host_tree, own_tree
from dev.host import Server
from dev.say import Failure, say, step


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Serve until interrupted."""
    del rest
    tree = host_tree(options.comfyui)
    step(f"Starting ComfyUI on port {options.port}; its log follows")
    models = tree / "models" if tree == own_tree() else None
    with Server(tree, demo=True, port=options.port, models=models, on_line=_show) as host:
        step(f"Open {host.url} - models go to {host.base / 'models'} - stop with Ctrl-C")
        while host.is_alive():
            time.sleep(0.5)
    raise Failure("ComfyUI stopped by itself; see its last lines above.")


def _show(line: str) -> None:
    say(f"   {line}")
