"""The style as tests: ruff, its formatter, and pyright."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECKS = {
    "ruff_finds_nothing": ("ruff", "check", "."),
    "code_is_formatted": ("ruff", "format", "--check", "."),
    "no_eval_no_exec": ("ruff", "check", ".", "--isolated", "--select", "S102,S307,E702"),
    "types_hold": ("pyright", "--pythonpath", sys.executable),
}


@pytest.mark.parametrize("command", CHECKS.values(), ids=CHECKS)
def test_lint(command: tuple[str, ...]) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
