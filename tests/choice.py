"""Which combinations of settings the ordinary run takes, and which are left to `--all`.

Every combination is a case of its own. Those that the ordinary run leaves out carry the marker
`long`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Case = tuple[int, ...]
"""Which value each axis has, counted from 0."""

Rule = Callable[..., bool]


def some(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """Return all values for `parametrize`, of which the ordinary run takes the chosen ones."""
    values = list(values)
    assert set(chosen) <= set(values), f"{chosen} are not all among {values}"
    return [pytest.param(value, marks=_marks(value in chosen)) for value in values]


def each(possible: Rule | None = None, always: Rule | None = None, /, **axes: Iterable[Any]):
    """Return the arguments of `parametrize`; the ordinary run takes each value once or more.

    Args:
        possible: tells of a combination, given by name, whether it exists.
        always: tells whether the ordinary run takes it in any case.
        axes: name of the argument -> its values.
    """
    return _chosen(1, possible, always, axes)


def pairs(possible: Rule | None = None, always: Rule | None = None, /, **axes: Iterable[Any]):
    """As `each`, but the ordinary run takes each *pair* of values of different arguments."""
    return _chosen(2, possible, always, axes)


def _chosen(size: int, possible: Rule | None, always: Rule | None, axes: dict[str, Iterable[Any]]):
    values = [list(axis) for axis in axes.values()]

    def named(case: Case) -> dict[str, Any]:
        return {
            name: values[n][index] for n, (name, index) in enumerate(zip(axes, case, strict=True))
        }

    cases = [
        case
        for case in itertools.product(*(range(len(axis)) for axis in values))
        if possible is None or possible(**named(case))
    ]
    short = _covering(cases, size)
    if always is not None:
        short |= {case for case in cases if always(**named(case))}
    return tuple(axes), [
        pytest.param(*named(case).values(), marks=_marks(case in short)) for case in cases
    ]


def _marks(short: bool) -> tuple[Any, ...]:
    return () if short else (pytest.mark.long,)


def _covering(cases: list[Case], size: int) -> set[Case]:
    """Return few cases that hold every combination of `size` values that some case holds.

    Greedy: the case with the most combinations that are still missing comes next, of equals the
    one with the most of one value more, and of those the one whose values were taken least.
    """
    parts = [
        {case: set(itertools.combinations(enumerate(case), n)) for case in cases}
        for n in (size, size + 1)
    ]
    missing = [set().union(*part.values()) for part in parts]
    taken: Counter[tuple[int, int]] = Counter()
    chosen: set[Case] = set()

    def gain(case: Case) -> tuple[int, ...]:
        news = (len(part[case] & left) for part, left in zip(parts, missing, strict=True))
        return (*news, -sum(taken[value] for value in enumerate(case)))

    while missing[0]:
        best = max(cases, key=gain)
        chosen.add(best)
        for part, left in zip(parts, missing, strict=True):
            left -= part[best]
        taken.update(enumerate(best))
    return chosen
