"""The real frontend in headless Chromium, on a real server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from choice import some

from dev import browser, stock_checkpoint
from dev.comfy_tree import newest_frontend
from dev.host import Server
from dev.machine import link_file

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.append(HERE)  # for `frontend`


FRONTENDS = {"pinned": lambda: None, "newest": newest_frontend}


def pytest_generate_tests(metafunc):
    """Run every test on each frontend; the newest one is left to `--all`."""
    if "host" in metafunc.fixturenames:
        metafunc.parametrize("host", some(FRONTENDS, "pinned"), indirect=True)


@pytest.fixture(scope="session")
def served() -> Iterator[Callable[[str], Server]]:
    """Servers with this pack and the demo model, which draws in seconds; started when asked for."""
    tree = Path(os.environ["COMFYUI_PATH"]).resolve()
    made = stock_checkpoint.files(tree)["checkpoints"]
    with ExitStack() as running:

        @cache
        def server(frontend: str) -> Server:
            started = Server(tree, demo=True, frontend=FRONTENDS[frontend]())
            running.enter_context(started)
            link_file(made, started.base / "models" / "checkpoints" / made.name)
            (started.base / "user" / "default").mkdir(parents=True, exist_ok=True)
            return started

        yield server


@pytest.fixture
def host(request, served) -> Server:
    """The running server with the frontend that the test is for."""
    return served(request.param)


@pytest.fixture
def rendering(request) -> str:
    """How the frontend draws nodes: `classic` on a canvas, or `Nodes 2.0` in the page."""
    return getattr(request, "param", "classic")


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
def page(chromium, host, rendering) -> Iterator[object]:
    """A page with the frontend loaded and no workflow of an earlier visit."""
    context = chromium.new_context(viewport={"width": 1600, "height": 1100})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    # English, and no greeting over the graph or the app.
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.OnboardingCoachmarks.Seen": ["appMode"],
        "Comfy.Locale": "en",
    }
    host.post("/settings", {**settings, "Comfy.VueNodes.Enabled": rendering == "Nodes 2.0"})
    opened.goto(host.url)
    opened.wait_for_function(browser.READY, timeout=120_000)
    yield opened
    context.close()
