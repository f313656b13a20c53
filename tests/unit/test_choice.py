"""The choice of combinations: nothing is lost, and the ordinary run holds what it promises."""

from __future__ import annotations

import itertools

from choice import each, pairs, some

AXES = {"kind": "abcdefg", "cfg": (1.0, 7.0), "reuse": (True, False), "order": (1, 2, 3)}


def test_all_combinations_are_there_and_few_of_them_hold_each_value_or_pair():
    for choose, size, most in ((each, 1, 7), (pairs, 2, 24)):
        names, cases = choose(lambda kind, cfg, **_: kind != "b" or cfg == 7.0, **AXES)
        everything = [case.values for case in cases]
        few = [case.values for case in cases if not case.marks]
        assert names == tuple(AXES)
        assert len(everything) == 7 * 2 * 2 * 3 - 6
        assert len(few) <= most
        held = [
            {part for case in chosen for part in itertools.combinations(enumerate(case), size)}
            for chosen in (everything, few)
        ]
        assert held[0] == held[1]


def test_what_is_chosen_by_hand_is_in_the_ordinary_run():
    _, cases = each(None, lambda kind, **_: kind == "c", **AXES)
    assert sum(case.values[0] == "c" for case in cases if not case.marks) == 2 * 2 * 3
    assert [p.values[0] for p in some("abcd", "b", "d") if not p.marks] == ["b", "d"]
