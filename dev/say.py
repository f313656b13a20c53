"""How the tooling speaks: progress lines, and failures that are one clear sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Failure(Exception):
    """Something a person can act on; its text is the whole message."""


def say(text: str) -> None:
    """Print one line at once, also into a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def step(text: str) -> None:
    """Announce what happens next."""
    say(f"-> {text}")


@contextmanager
def disk_errors(where: object) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into one sentence."""
    try:
        yield
    except OSError as error:
        raise Failure(f"Cannot write to {where}: {error.strerror or error}.") from error
