"""The choice of combinations: nothing is lost, and the ordinary run holds what it promises."""

from __future__ import annotations

import itertools

from choice import each, pairs, some

AXES = {"kind": "abcdefg", "cfg": (1.0, 7.0), "reuse": (True, False), "order": (1, 2, 3)}


def possible(kind, cfg, **_):
    return not (kind == "b" and cfg == 1.0)


def split(choice):
    names, cases = choice
    assert names == tuple(AXES)
    return [c.values for c in cases], [c.values for c in cases if not c.marks]


def covered(cases, size):
    return {part for case in cases for part in itertools.combinations(enumerate(case), size)}


def test_all_combinations_are_there_and_few_of_them_hold_each_value_or_pair():
    for choose, size, most in ((each, 1, 7), (pairs, 2, 24)):
        everything, few = split(choose(possible, **AXES))
        assert len(everything) == 7 * 2 * 2 * 3 - 6
        assert len(few) <= most
        assert covered(few, size) == covered(everything, size)
        assert len(few) < len(everything)


def test_some_combinations_are_taken_in_any_case():
    _, few = split(each(possible, lambda kind, **_: kind == "c", **AXES))
    assert sum(case[0] == "c" for case in few) == 2 * 2 * 3


def test_chosen_values_are_in_the_ordinary_run():
    assert [p.values[0] for p in some("abcd", "b", "d") if not p.marks] == ["b", "d"]
