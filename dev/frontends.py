"""Frontends other than the one of the environment, which is that of the pinned ComfyUI."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dev import environment
from dev.places import cache_root, locked, made_folder, require_space
from dev.say import disk_errors, step

PACKAGE = "comfyui-frontend-package"
NEWEST = "1.58.1"
DIGEST = "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9"


def newest() -> Path:
    """Return the folder with the newest frontend known to work, fetched at its first use."""
    folder = cache_root() / "frontends" / NEWEST
    with locked(cache_root() / "locks" / "frontend", "fetching ComfyUI's newest frontend"):
        if not folder.exists():
            step(f"Fetching ComfyUI's frontend {NEWEST} (29 MB, kept in {folder})")
            _fetch(folder)
    return folder / "comfyui_frontend_package" / "static"


def _fetch(folder: Path) -> None:
    require_space(folder.parent, 0.5, "The frontend")
    with tempfile.TemporaryDirectory(dir=made_folder(folder.parent), prefix=".part-") as scratch:
        pinned, target = Path(scratch) / "pinned.txt", Path(scratch) / "target"
        pinned.write_text(f"{PACKAGE}=={NEWEST} --hash=sha256:{DIGEST}\n")
        command = environment.python_command(
            *("-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--quiet"),
            *("--require-hashes", "--target", target, "--requirement", pinned),
        )
        environment.stream(
            command, environment.registry_settings(), f"fetch {PACKAGE} {NEWEST} with pip"
        )
        with disk_errors(folder):
            target.replace(folder)
