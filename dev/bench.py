"""`dev.py bench`: the measured cost, by `benchmarks/run.py`."""

from __future__ import annotations

import argparse
import os
import subprocess

from dev.comfy_tree import host_tree
from dev.environment import python_command
from dev.places import ROOT


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Run the benchmarks on the host's tree with the given arguments."""
    del options
    environment = {**os.environ, "COMFYUI_PATH": str(host_tree())}
    command = python_command(ROOT / "benchmarks" / "run.py", *rest)
    return subprocess.run(command, env=environment, check=False).returncode
