"""Finding a Chromium for the browser tests, or installing one where that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from dev.environment import python_command
from dev.places import WINDOWS
from dev.say import Failure, say, step

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
READY = (  # JavaScript: the frontend is up and knows our node
    "!!(window.app?.extensionManager && app.graph"
    " && window.LiteGraph?.registered_node_types?.SEGuidance)"
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
INSTALLED = {
    "darwin": (
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
        "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    ),
    "win32": (
        r"%ProgramFiles%\Google\Chrome\Application\chrome.exe",
        r"%ProgramFiles(x86)%\Google\Chrome\Application\chrome.exe",
        r"%LocalAppData%\Google\Chrome\Application\chrome.exe",
        r"%ProgramFiles(x86)%\Microsoft\Edge\Application\msedge.exe",
    ),
}


def find() -> Path | None:
    """Return a Chromium or Chrome of this machine, or None."""
    named = os.environ.get("SEG_CHROMIUM")
    if named:
        if not Path(named).is_file():
            raise Failure(f"SEG_CHROMIUM is {named}, but there is no such file.")
        return Path(named)
    on_path = (shutil.which(name) for name in NAMES)
    elsewhere = (os.path.expandvars(place) for place in INSTALLED.get(sys.platform, ()))
    candidates = [place for place in (*on_path, *elsewhere) if place and Path(place).is_file()]
    return Path(candidates[0]) if candidates else _playwrights_own()


def _playwrights_own() -> Path | None:
    question = (
        "from playwright.sync_api import sync_playwright as start\n"
        "with start() as p: print(p.chromium.executable_path)"
    )
    answer = subprocess.run(
        python_command("-c", question), capture_output=True, text=True, check=False
    )
    place = answer.stdout.strip()
    return Path(place) if place and Path(place).is_file() else None


def ensure() -> Path | None:
    """Find a browser, else try to install one; None where neither is possible."""
    found = find()
    if found is None:
        _install()
        found = find()
    if found is None:
        say("   No Chromium here and none could be installed: set SEG_CHROMIUM to run those tests")
    return found


def _install() -> None:
    is_root = not WINDOWS and os.geteuid() == 0
    if is_root and shutil.which("apt-get"):
        step("Installing Chromium with apt-get for the browser tests")
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-qq"], ["install", "-y", "-qq", "chromium"]):
            _attempt(["apt-get", *words], quiet)
    else:
        step("Installing Chromium with playwright for the browser tests")
        _attempt(python_command("-m", "playwright", "install", "chromium"), dict(os.environ))


def _attempt(command: list[str], environment: dict[str, str]) -> None:
    answer = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if answer.returncode:
        last = (answer.stderr or answer.stdout).strip().splitlines()[-1:]
        say(f"   {' '.join(command[:3])} failed: {' '.join(last)}")
