"""`dev.py evaluate`: what guidance does to images, measured, through the real server."""

from __future__ import annotations

import argparse
from pathlib import Path

from dev.places import ARTIFACTS
from dev.say import Failure

NEEDS_CHECKPOINT = ("reference", "prompts", "size", "cfg", "sigmas", "scales")


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Evaluate the demo model, its states of training, or a person's checkpoint."""
    del rest
    # The libraries that do the work are only in the environment that `dev.py` has entered by now.
    from dev.evaluation import checkpoint, demo, history

    out = Path(options.out or ARTIFACTS / "evaluate").resolve()
    if options.checkpoint is not None:
        if options.reference is None:
            raise Failure("--checkpoint needs --reference: a folder of images as they should be.")
        return checkpoint.evaluate(options, out)
    for name in NEEDS_CHECKPOINT:
        if getattr(options, name) is not None:
            raise Failure(f"--{name} needs --checkpoint; the demo model brings its own.")
    if options.weights:
        return history.evaluate(options, out)
    return demo.evaluate(options, out)
