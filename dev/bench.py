"""`dev.py bench`: the measured cost, by `benchmarks/run.py`."""

from __future__ import annotations

import argparse
import os
import subprocess

from dev.comfy_tree import host_tree
from dev.environment import python_command
from dev.places import ROOT
from dev.say import Failure


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Run the benchmarks on the host's tree with the given arguments."""
    del options
    script = ROOT / "benchmarks" / "run.py"
    if not script.exists():
        raise Failure(f"There are no benchmarks in this checkout: {script} is missing.")
    environment = {**os.environ, "COMFYUI_PATH": str(host_tree())}
    return subprocess.run(python_command(script, *rest), env=environment, check=False).returncode
