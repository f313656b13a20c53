"""The environment of a checkout: `.venv`, made by uv from `dev/requirements.txt`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import deque
from pathlib import Path

from dev.places import ROOT, WINDOWS, cache_root, locked, made_once, require_space
from dev.say import Failure, disk_errors, say, step

UV_VERSION = "0.13.8"
SUPPORTED = ((3, 10), (3, 14))
LOCK = ROOT / "dev" / "requirements.txt"
VENV = ROOT / ".venv"
STAMP = VENV / "made-from.json"
SCRIPTS = VENV / ("Scripts" if WINDOWS else "bin")
BASE = getattr(sys, "_base_executable", None) or sys.executable  # also from within `.venv`
PYTHON = SCRIPTS / ("python.exe" if WINDOWS else "python")
REASONS = (
    (r"no space left|os error 28|disk quota|not enough space", "the disk is full"),
    (
        r"dns error|error sending request|failed to fetch|name resolution|name or service"
        r"|network is unreachable|newconnectionerror|connection (refused|reset|aborted|broken)"
        r"|from versions: none|timed out|incomplete read|tunnel connection|failed to download",
        "the network or the package index cannot be reached, or the download was interrupted",
    ),
    (
        r"no solution found|no matching distribution|no wheels with a matching|doesn't have a",
        "a pinned package is not available for this Python and system",
    ),
)


def enter(arguments: list[str]) -> int | None:
    """Make `.venv` current and run there: None when already inside, else the exit status."""
    inside = Path(sys.prefix).resolve() == VENV.resolve()
    if inside and is_current():
        return None
    if not inside:
        _require_supported_python()
        ensure()
    return _replace_process([BASE if inside else str(PYTHON), str(ROOT / "dev.py"), *arguments])


def ensure() -> None:
    """Make `.venv` unless it is current; a half-made one is made again."""
    name = hashlib.sha256(str(ROOT).encode()).hexdigest()[:16]
    with locked(cache_root() / "locks" / f"venv-{name}", "this checkout's .venv"):
        if not is_current():
            _make()


def is_current() -> bool:
    """Tell whether `.venv` was finished, from this lock file and in this place."""
    try:
        return PYTHON.exists() and json.loads(STAMP.read_text()) == _wanted()
    except (OSError, ValueError):
        return False


def _wanted() -> dict[str, str]:
    lock = hashlib.sha256(LOCK.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    return {"lock": lock, "place": str(VENV), "uv": UV_VERSION}


def _require_supported_python() -> None:
    version = sys.version_info[:2]
    if not SUPPORTED[0] <= version <= SUPPORTED[1] or sys.maxsize < 2**32:
        low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
        raise Failure(
            f"dev.py needs a 64-bit Python {low} to {high}, but {sys.executable} is Python "
            f"{version[0]}.{version[1]}."
        )


def _make() -> None:
    step(f"Making {VENV} (PyTorch, ComfyUI's requirements, test tools; first time: minutes)")
    require_space(ROOT, 1, "The environment")
    uv, environment = uv_command(), registry_settings()
    with disk_errors(STAMP):
        STAMP.unlink(missing_ok=True)
    stream([uv, "venv", "--quiet", "--clear", "--python", BASE, VENV], environment, "make .venv")
    stream(
        [uv, "pip", "install", "--python", PYTHON, "--requirement", LOCK],
        environment,
        "install the packages of dev/requirements.txt",
        quiet=r"^ [+~-] ",
    )
    with disk_errors(STAMP):
        STAMP.write_text(json.dumps(_wanted()))
    say(f"   {VENV} is ready")


def uv_command() -> Path:
    """Return the pinned uv, fetched by pip into the shared cache at its first use."""
    folder = cache_root() / "tools" / f"uv-{UV_VERSION}"
    made_once(folder, f"uv {UV_VERSION}", 0.2, _fetched_uv)
    found = [*folder.glob("bin/uv"), *folder.glob("bin/uv.exe"), *folder.glob("Scripts/uv.exe")]
    if not found:
        raise Failure(f"{folder} holds no uv; delete that folder and try again.")
    return found[0]


def _fetched_uv(scratch: Path) -> Path:
    target = scratch / "uv"
    pip = [BASE, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        raise Failure(f"{BASE} has no pip; install it (Debian: apt install python3-pip).")
    wanted = ["--no-deps", "--only-binary", ":all:", "--target", target, f"uv=={UV_VERSION}"]
    stream([*pip, "install", *wanted], registry_settings(), "fetch uv with pip")
    return target


def fetch_pinned(requirement: str, digest: str, scratch: Path, *way: object) -> None:
    """Let pip fetch the one file that has this SHA-256; `way` is its command, and where to."""
    pinned = scratch / "pinned.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{digest}\n")
    command = python_command(
        *("-m", "pip", "--disable-pip-version-check", *way, "--quiet", "--no-deps"),
        *("--require-hashes", "--requirement", pinned),
    )
    stream(command, registry_settings(), f"fetch {requirement} with pip")


def registry_settings() -> dict[str, str]:
    """Return this process's environment with pip's index settings, spelled for uv too."""
    environment = dict(os.environ)
    environment.update(UV_PYTHON_DOWNLOADS="never")
    environment.pop("VIRTUAL_ENV", None)
    listing = subprocess.run(
        [BASE, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    pattern = r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$"
    settings = {key: value.split() for key, value in re.findall(pattern, listing, re.MULTILINE)}
    names = {
        "index-url": ("UV_DEFAULT_INDEX", "PIP_INDEX_URL", " "),
        "extra-index-url": ("UV_INDEX", "PIP_EXTRA_INDEX_URL", " "),
        "find-links": ("UV_FIND_LINKS", "PIP_FIND_LINKS", ","),
        "trusted-host": ("UV_INSECURE_HOST", "PIP_TRUSTED_HOST", " "),
        "cert": ("SSL_CERT_FILE", "PIP_CERT", " "),
        "default-timeout": ("UV_HTTP_TIMEOUT", "PIP_DEFAULT_TIMEOUT", " "),
    }
    for key, (for_uv, for_pip, joint) in names.items():
        values = [value for value in settings.get(key, []) if _is_usable(value)]
        if values:
            environment.setdefault(for_uv, joint.join(values))
            environment.setdefault(for_pip, " ".join(values))
    environment.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # as pip chooses
    return environment


def _is_usable(value: str) -> bool:
    """Drop local folders that do not exist: pip overlooks them, uv stops."""
    local = value.removeprefix("file://")
    is_address = "://" in local or not local.startswith(("/", "."))
    return is_address or Path(local).exists()


def stream(
    command: list[object], environment: dict[str, str], purpose: str, *, quiet: str = r"^$"
) -> None:
    """Run a command with its output shown as it comes; say in one sentence why it failed."""
    tail: deque[str] = deque(maxlen=60)
    with subprocess.Popen(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            tail.append(line.rstrip())
            if not re.search(quiet, line):
                say("   " + line.rstrip())
    if process.returncode:
        raise Failure(f"Could not {purpose}: {reason(list(tail))}.")


def reason(lines: list[str]) -> str:
    """Name the cause of a failed command from the end of its output."""
    text = "\n".join(lines)
    for pattern, meaning in REASONS:
        if re.search(pattern, text, re.IGNORECASE):
            return meaning
    return next((line.strip().rstrip(".") for line in reversed(lines) if line.strip()), "no output")


def _replace_process(command: list[str]) -> int:
    if not WINDOWS:
        sys.stdout.flush()
        os.execv(command[0], command)
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the child got it too and is cleaning up
            continue


def python_command(*arguments: object) -> list[str]:
    """Return a command line for the environment's Python."""
    return [str(PYTHON), *map(str, arguments)]
