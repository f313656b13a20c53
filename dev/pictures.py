"""The pictures of the documentation: `python -m dev.pictures [demo] [help]`.

`demo` is the README's picture, the output of `dev.py demo`. `help` are the pictures of
the nodes' help pages, the icon and the banner. Thumbnails of workflows: `dev/templates.py`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from dev import help_pictures
from dev.environment import python_command
from dev.places import ROOT, made_folder
from dev.say import Failure, say

DEMO = ROOT / "docs" / "demo.jpg"


def demo() -> None:
    """Run the demo and keep its picture for the README."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "demo.png"
        command = python_command(ROOT / "dev.py", "demo", "--out", made)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise Failure("The demo did not run, so there is no picture.")
        picture = Image.open(made).convert("RGB")
    made_folder(DEMO.parent)
    picture.save(DEMO, quality=92, subsampling=0, optimize=True)
    say(f"{DEMO}: {DEMO.stat().st_size // 1024} KiB")


def main(arguments: list[str]) -> int:
    """Make the named pictures, or all."""
    makers = {"demo": demo, "help": help_pictures.make_all}
    for name, make in makers.items():
        if not arguments or name in arguments:
            make()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
