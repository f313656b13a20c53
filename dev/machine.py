"""What a server needs of this machine: a port, links to folders and files, its device."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

from dev.environment import python_command
from dev.places import WINDOWS
from dev.say import Failure

NOT_INSTALLED = (".git", ".venv", ".artifacts", "__pycache__")


def free_port() -> int:
    """Return a port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def require_free(port: int) -> None:
    """Refuse a port on which something listens already."""
    with socket.socket() as probe:
        if not WINDOWS:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise Failure(f"Port {port} is taken; choose another with --port.") from error


def link_folder(source: Path, target: Path) -> None:
    """Make `target` show `source`: a link, on Windows a junction, else a copy."""
    try:
        if WINDOWS:
            import _winapi

            _winapi.CreateJunction(str(source), str(target))
        else:
            target.symlink_to(source, target_is_directory=True)
    except OSError:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_INSTALLED))


def link_file(source: Path, target: Path) -> None:
    """Make a large file appear at `target` without copying it where that is possible."""
    for way in (os.symlink, os.link, shutil.copyfile):
        try:
            way(source, target)
        except OSError as error:
            problem = error
        else:
            return
    raise Failure(f"Cannot place {source} at {target}: {problem.strerror}.")


def server_environment() -> dict[str, str]:
    """Return the environment of the server: no hub look-ups, unbuffered output."""
    return {
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads crawl when the cores are shared
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }


@cache
def device_flags() -> tuple[str, ...]:
    """Return `--cpu` unless the environment's PyTorch can use a GPU."""
    if sys.platform == "darwin":
        return ()
    check = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    answer = subprocess.run(python_command("-c", check), capture_output=True, check=False)
    return () if answer.returncode == 0 else ("--cpu",)
