"""Where things lie: the checkout, the per-user cache, and locks between checkouts."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dev.say import Failure, disk_errors, step

ROOT = Path(__file__).resolve().parents[1]
PACK_FOLDER = "seg-pack-under-development"
DEMO_FOLDER = "seg-demo-pack"
DEMO_PACK = ROOT / "dev" / "demo_pack"
ARTIFACTS = ROOT / ".artifacts"
WINDOWS = os.name == "nt"
GIB = 2**30


def cache_root() -> Path:
    """Return the per-user cache that all checkouts share; `SEG_DEV_CACHE` overrides it."""
    own = os.environ.get("SEG_DEV_CACHE")
    if own:
        return Path(own).expanduser().resolve()
    if WINDOWS:
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "smoothed-energy-guidance"


def made_folder(path: Path) -> Path:
    """Create a folder with its parents and return it."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def require_space(path: Path, gib: float, purpose: str) -> None:
    """Refuse to start a download that cannot fit."""
    free = shutil.disk_usage(made_folder(path)).free
    if free < gib * GIB:
        raise Failure(
            f"{purpose} needs {gib:g} GiB free in {path}, but only {free / GIB:.1f} GiB are left."
        )


@contextmanager
def locked(path: Path, purpose: str) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system drops it when the process dies."""
    made_folder(path.parent)
    with disk_errors(path):
        handle = path.open("a+b")
    with handle:
        if not _try_lock(handle, wait=False):
            step(f"Waiting for another process that is busy with {purpose}")
            while not _try_lock(handle, wait=True):
                pass
        yield


def made_once(folder: Path, what: str, gib: float, make: Callable[[Path], Path]) -> Path:
    """Return a folder of the cache, which is made at its first use, whole or not at all.

    Args:
        folder: where it is kept.
        what: what messages call it.
        gib: the free space that it needs.
        make: fills a scratch folder, and returns the folder in there that is to be kept.
    """
    with locked(cache_root() / "locks" / folder.name, f"fetching {what}"):
        if not folder.exists():
            step(f"Fetching {what}, kept in {folder}")
            require_space(folder.parent, gib, what)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as scratch:
                made = make(Path(scratch))
                with disk_errors(folder):
                    made.replace(folder)
    return folder


def _try_lock(handle: BinaryIO, *, wait: bool) -> bool:
    try:
        if WINDOWS:
            import msvcrt

            handle.seek(0)  # LK_LOCK itself gives up after ten seconds
            msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
