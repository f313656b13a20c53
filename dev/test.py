"""`dev.py test`: lint and every kind of test, kind by kind, closed by one line of counts."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from dev import browser, registry_tools
from dev.comfy_tree import CURRENT, FLOOR, host_tree, pinned_tree, version_of
from dev.environment import python_command
from dev.places import ROOT, WINDOWS
from dev.say import say, step

WORKERS = min(os.cpu_count() or 1, 4)


@dataclass(frozen=True)
class Kind:
    """One pytest run: what it selects, on which ComfyUI, and whether it uses all cores."""

    name: str
    selection: tuple[str, ...]
    tree: Path
    parallel: bool = False


@dataclass
class Outcome:
    """What one kind came to."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Run everything, or with arguments just what pytest makes of them."""
    if rest:
        return _pytest(rest, host_tree(options.comfyui))
    begin = time.monotonic()
    current = host_tree(options.comfyui)
    kinds = _kinds(current, pinned_tree(FLOOR))
    browser.ensure()
    os.environ["SEG_REGISTRY_TOOLS"] = str(registry_tools.ensure())
    outcomes = [_run_kind(kind) for kind in kinds]
    _summary(outcomes, time.monotonic() - begin)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def _kinds(current: Path, floor: Path) -> list[Kind]:
    version = version_of(current) or CURRENT
    return [
        Kind("lint", ("tests/test_lint.py",), current),
        Kind("unit", ("tests/unit",), current, parallel=True),
        Kind(f"host {version}", ("tests/host",), current, parallel=True),
        Kind(f"host {FLOOR}", ("tests/host", "-m", "not current_only"), floor, parallel=True),
        Kind("server", ("tests/server",), current),
        Kind("browser", ("tests/browser",), current),
    ]


def _pytest(arguments: list[str], tree: Path, **extra: str) -> int:
    calm = {"OMP_WAIT_POLICY": "PASSIVE"}  # spinning threads crawl when the cores are shared
    environment = {**calm, **os.environ, "COMFYUI_PATH": str(tree), **extra}
    command = python_command("-m", "pytest", *arguments)
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        return process.wait()
    except BaseException:
        _interrupt(process)
        raise


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Let pytest leave in order, so that it stops the servers it started."""
    if not WINDOWS:  # there, and at a terminal, Ctrl-C has reached it already
        process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


def _run_kind(kind: Kind) -> Outcome:
    step(f"Tests: {kind.name}")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="seg-test-") as scratch:
        report = Path(scratch) / "report.xml"
        arguments = [*kind.selection, "-q", "--durations=3", f"--junitxml={report}"]
        threads = {}
        if kind.parallel and WORKERS > 1:
            arguments += ["-n", str(WORKERS), "--dist", "worksteal"]
            threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        status = _pytest(arguments, kind.tree, **threads)
        outcome = _read_report(kind.name, report)
    outcome.seconds = time.monotonic() - begin
    if status and not outcome.failed:  # no test collected, or pytest itself failed
        outcome.failed = 1
    return outcome


def _read_report(name: str, report: Path) -> Outcome:
    outcome = Outcome(name)
    if not report.exists():
        return outcome
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed += 1
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    return outcome


def _summary(outcomes: list[Outcome], seconds: float) -> None:
    say(f"\n{'kind':<14}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for each in outcomes:
        say(f"{each.name:<14}{each.passed:>8}{each.failed:>8}{each.skipped:>9}{each.seconds:>9.0f}")
    passed, failed, skipped = (
        sum(getattr(each, count) for each in outcomes) for count in ("passed", "failed", "skipped")
    )
    say(f"{'all':<14}{passed:>8}{failed:>8}{skipped:>9}{seconds:>9.0f}\n")
    say(f"{passed} passed, {failed} failed, {skipped} skipped")
