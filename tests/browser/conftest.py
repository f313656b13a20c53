"""The real frontend in headless Chromium, on a real server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev import browser, stock_checkpoint
from dev.host import Server
from dev.machine import link_file

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.append(HERE)  # for `frontend`


@pytest.fixture(scope="session")
def host() -> Iterator[Server]:
    """A running server with this pack, and the demo model, which draws in seconds."""
    tree = Path(os.environ["COMFYUI_PATH"]).resolve()
    made = stock_checkpoint.files(tree)["checkpoint"]
    with Server(tree, demo=True) as server:
        link_file(made, server.base / "models" / "checkpoints" / made.name)
        (server.base / "user" / "default").mkdir(parents=True, exist_ok=True)
        yield server


@pytest.fixture(scope="session")
def chromium() -> Iterator[object]:
    """A started browser; without one the tests are skipped, under CI they fail."""
    from playwright.sync_api import sync_playwright

    place = browser.find()
    if place is None:
        message = "no Chromium or Chrome found; install one or set SEG_CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=place, args=list(browser.FLAGS))
        yield started
        started.close()


@pytest.fixture
def page(chromium, host) -> Iterator[object]:
    """A page with the frontend loaded and no workflow of an earlier visit."""
    context = chromium.new_context(viewport={"width": 1600, "height": 1100})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    # English, and no greeting over the graph.
    host.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en"})
    opened.goto(host.url)
    opened.wait_for_function(browser.READY, timeout=120_000)
    yield opened
    context.close()
