"""`dev.py test`: lint and every kind of test, kind by kind, closed by one line of counts.

Without `--all`, what is marked `long` is left out, and the oldest supported ComfyUI runs what is
marked `floor`. `tests/README.md` says what that covers.
"""

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
    cpu: float = 0.0


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Run every kind, or with arguments just what pytest makes of them."""
    depth = ["--all"] if options.all else []
    if rest:
        return _pytest([*depth, *rest], host_tree(options.comfyui))
    begin = time.monotonic()
    current = host_tree(options.comfyui)
    kinds = _kinds(current, pinned_tree(FLOOR), options.all)
    browser.ensure()
    os.environ["SEG_REGISTRY_TOOLS"] = str(registry_tools.ensure())
    outcomes = [_run_kind(kind, depth) for kind in kinds]
    _summary(outcomes, time.monotonic() - begin)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def _kinds(current: Path, floor: Path, everything: bool) -> list[Kind]:
    version = version_of(current) or CURRENT
    on_floor = "not current_only" if everything else "floor and not current_only"
    return [
        Kind("lint", ("tests/test_lint.py",), current),
        Kind("unit", ("tests/unit",), current, parallel=True),
        Kind(f"host {version}", ("tests/host",), current, parallel=True),
        Kind(f"host {FLOOR}", ("tests/host", "-m", on_floor), floor, parallel=everything),
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


def _run_kind(kind: Kind, depth: list[str]) -> Outcome:
    step(f"Tests: {kind.name}")
    begin, cpu = time.monotonic(), _cpu_of_children()
    with tempfile.TemporaryDirectory(prefix="seg-test-") as scratch:
        report = Path(scratch) / "report.xml"
        arguments = [*kind.selection, *depth, "-q", "--durations=3", f"--junitxml={report}"]
        threads = {}
        if kind.parallel and WORKERS > 1:
            arguments += ["-n", str(WORKERS), "--dist", "worksteal"]
            threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        status = _pytest(arguments, kind.tree, **threads)
        outcome = _read_report(kind.name, report)
    outcome.seconds, outcome.cpu = time.monotonic() - begin, _cpu_of_children() - cpu
    if status and not outcome.failed:  # no test collected, or pytest itself failed
        outcome.failed = 1
    return outcome


def _cpu_of_children() -> float:
    """Return the processor seconds of all processes that have been waited for; Windows says 0."""
    times = os.times()
    return times.children_user + times.children_system


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
    total = Outcome("all", seconds=seconds)
    for count in ("passed", "failed", "skipped", "cpu"):
        setattr(total, count, sum(getattr(each, count) for each in outcomes))
    say(f"\n{'kind':<14}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}{'cpu':>7}")
    for each in (*outcomes, total):
        say(
            f"{each.name:<14}{each.passed:>8}{each.failed:>8}{each.skipped:>9}"
            f"{each.seconds:>9.0f}{each.cpu:>7.0f}"
        )
    say(f"\n{total.passed} passed, {total.failed} failed, {total.skipped} skipped")
