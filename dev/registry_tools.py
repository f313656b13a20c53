"""The registry's own tools, in an environment of their own: their pins are not ComfyUI's."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from dev.environment import BASE, registry_settings, stream, uv_command
from dev.places import WINDOWS, cache_root, locked, made_folder
from dev.say import disk_errors, step

TOOLS = ("comfy-cli==1.23.0",)
MAPS = ("comfyui-manager==4.3",)  # for its map of node ids alone, so without what it needs
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


def ensure() -> Path:
    """Return the folder with the commands, made at its first use and shared by checkouts."""
    name = hashlib.sha256("\n".join((*TOOLS, *MAPS, PYTHON)).encode()).hexdigest()[:12]
    folder = cache_root() / "tools" / f"registry-{name}"
    scripts = folder / ("Scripts" if WINDOWS else "bin")
    stamp = folder / "finished"
    with locked(cache_root() / "locks" / "registry", "fetching the registry's tools"):
        if not stamp.exists():
            step("Fetching the registry's tools (comfy-cli)")
            _make(folder, scripts)
            with disk_errors(stamp):
                stamp.touch()
    return scripts


def _make(folder: Path, scripts: Path) -> None:
    uv, environment = uv_command(), registry_settings()
    python = scripts / ("python.exe" if WINDOWS else "python")
    made_folder(folder.parent)
    stream([uv, "venv", "--quiet", "--clear", "--python", BASE, folder], environment, "make it")
    for packages in (TOOLS, ("--no-deps", *MAPS)):
        stream(
            [uv, "pip", "install", "--python", python, *packages],
            environment,
            "install the registry's tools",
            quiet=r"^ [+~-] ",
        )
