"""The style as tests: ruff, its formatter, pyright, and short files and functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECKS = {
    "ruff_finds_nothing": ("ruff", "check", "."),
    "code_is_formatted": ("ruff", "format", "--check", "."),
    "types_hold": ("pyright", "--pythonpath", sys.executable),
}
LONGEST_FILE = 250
LONGEST_FUNCTION = 40  # from its first line behind the docstring


@pytest.mark.parametrize("command", CHECKS.values(), ids=CHECKS)
def test_lint(command: tuple[str, ...]) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("folder", ["nodes", "seg_core", "dev", "tests"])
def test_files_and_functions_are_short(folder: str) -> None:
    too_long = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        lengths = {str(name): (len(text.splitlines()), LONGEST_FILE)}
        for entry in ast.walk(ast.parse(text)):
            if isinstance(entry, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths[f"{name}, {entry.name}"] = (length(entry), LONGEST_FUNCTION)
        too_long += [f"{what}: {n} lines" for what, (n, most) in lengths.items() if n > most]
    assert not too_long, "\n".join(too_long)
