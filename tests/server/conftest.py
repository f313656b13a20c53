"""One real ComfyUI server for all tests of this folder, with the made checkpoint in place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev import stock_checkpoint
from dev.host import Server
from dev.machine import link_file


@pytest.fixture(scope="session")
def host() -> Iterator[Server]:
    """A running server."""
    tree = Path(os.environ["COMFYUI_PATH"]).resolve()
    with Server(tree, demo=True) as server:
        for folder, file in stock_checkpoint.files(tree).items():
            link_file(file, server.base / "models" / folder / file.name)
        yield server
