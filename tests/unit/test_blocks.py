"""The block selector language, on catalogues like those of real models."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seg_core.blocks import (
    Block,
    Target,
    describe,
    describe_targets,
    select,
    select_heads,
    select_random,
)

SDXL = (
    *(Block("input", index, depth) for index, depth in ((4, 2), (5, 2), (7, 10), (8, 10))),
    Block("middle", 1, 10),
    *(Block("output", index, 10 if index < 3 else 2) for index in range(6)),
)
SD15 = (
    *(Block("input", index) for index in (1, 2, 4, 5, 7, 8)),
    Block("middle", 1),
    *(Block("output", index) for index in range(3, 12)),
)
FLUX = (*(Block("double", n) for n in range(19)), *(Block("single", n) for n in range(38)))
WAN = tuple(Block("blocks", n) for n in range(30))
CATALOGUES = (SDXL, SD15, FLUX, WAN)


def layers(part, index, *numbers):
    return tuple(Target(part, index, n) for n in numbers)


AUTO = layers("middle", 1, *range(10))


@pytest.mark.parametrize(
    ("selector", "catalogue", "expected"),
    [
        ("middle", SDXL, layers("middle", 1, *range(10))),
        ("m0", SD15, layers("middle", 1, 0)),
        ("d0", SDXL, layers("input", 4, 0, 1)),
        ("u5", SDXL, layers("output", 5, 0, 1)),
        ("d4-5", SD15, layers("input", 7, 0) + layers("input", 8, 0)),
        ("u0.2", SDXL, layers("output", 0, 2)),
        ("d2.2-4", SDXL, layers("input", 7, 2, 3, 4)),
        (" D2 . 2 - 4 ", SDXL, layers("input", 7, 2, 3, 4)),
        (",d2.2-\n4,,", SDXL, layers("input", 7, 2, 3, 4)),
        ("d0-2.1", SDXL, tuple(Target("input", n, 1) for n in (4, 5, 7))),
        ("double.7-9", FLUX, tuple(Target("double", n) for n in (7, 8, 9))),
        ("single.3", FLUX, layers("single", 3, 0)),
        ("7-9", WAN, tuple(Target("blocks", n) for n in (7, 8, 9))),
        ("DOUBLE.0", (Block("Double", 0),), layers("Double", 0, 0)),
        ("3-8", (Block("joint", 3), Block("joint", 8)), (Target("joint", 3), Target("joint", 8))),
        ("auto", SDXL, AUTO),
        ("auto, u0.3", SDXL, (*AUTO, Target("output", 0, 3))),
    ],
)
def test_a_term_names_its_layers(selector, catalogue, expected):
    assert select(selector, catalogue, AUTO) == expected
    assert select_heads(selector, catalogue, AUTO) == dict.fromkeys(expected)


REFUSED = (
    (SDXL, ("", " , ", "auto", "d4", "d3-4", "u0.10", "d0-2.2", "7", "double", "input.4")),
    (SD15, ("m1", "m", "d", "x0", "d0.", "d-1", "d1 2", "d1 d2", "d1;d2")),
    (FLUX, ("7", "double.19", "double.7.0", "triple.1", "middle", "m0")),
    (WAN, ("-1", "30")),
)


@pytest.mark.parametrize(
    ("selector", "catalogue"),
    [(selector, catalogue) for catalogue, selectors in REFUSED for selector in selectors],
)
def test_what_does_not_exist_is_refused_with_what_does(selector, catalogue):
    with pytest.raises(ValueError, match="this model has") as caught:
        select(selector, catalogue)
    assert describe(catalogue) in str(caught.value)


def test_wrong_ranges_and_what_a_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match="upwards, got 'd2-1'"):
        select("d2-1", SDXL)
    with pytest.raises(ValueError, match="no self-attention blocks"):
        select("auto", ())
    with pytest.raises(ValueError, match="heads cannot be chosen here, only whole blocks"):
        select("7:h0", WAN)


@pytest.mark.parametrize(
    ("catalogue", "text"),
    [
        (SDXL, "d0-1.0-1, d2-3.0-9, m0.0-9, u0-2.0-9, u3-5.0-1"),
        (SD15, "d0-5, m0, u0-8"),
        (FLUX, "double.0-18, single.0-37"),
        (WAN, "0-29"),
    ],
)
def test_a_description_is_a_selector_of_everything(catalogue, text):
    assert describe(catalogue) == text
    everything = [Target(b.part, b.index, n) for b in catalogue for n in range(b.transformers)]
    assert list(select(text, catalogue)) == everything


def test_a_selection_is_described_by_whole_blocks_and_layers():
    chosen = select("middle, d2.2-9, d0.0, u0-1.0, u0.5", SDXL)
    assert describe_targets(chosen, SDXL) == "d0.0, d2.2-9, m0, u0.0, u0.5, u1.0"
    assert describe_targets((), SDXL) == ""


@settings(max_examples=50)
@given(data=st.data(), catalogue=st.sampled_from(CATALOGUES))
def test_every_selection_survives_its_description(data, catalogue):
    everything = [Target(b.part, b.index, n) for b in catalogue for n in range(b.transformers)]
    wanted = data.draw(st.sets(st.sampled_from(everything), min_size=1))
    chosen = select(describe_targets(wanted, catalogue), catalogue)
    assert set(chosen) == wanted
    assert list(chosen) == [target for target in everything if target in wanted]


@given(selector=st.text(alphabet="dmu0123456789.-, auto", max_size=12))
def test_any_text_selects_layers_or_is_refused(selector):
    try:
        chosen = select(selector, SDXL, (Target("middle", 1, 0),))
    except ValueError:
        return
    assert chosen


HEADS = [
    ("m0.3:h2,5", SDXL, {("middle", 1, 3): (2, 5)}),
    ("m0.3 : H2 , 5 , u5.0", SDXL, {("middle", 1, 3): (2, 5), ("output", 5, 0): None}),
    ("7:h0-3", WAN, {("blocks", 7, 0): (0, 1, 2, 3)}),
    ("7:h0-1,4,9-10", WAN, {("blocks", 7, 0): (0, 1, 4, 9, 10)}),
    ("9,7:h0,8:h1", WAN, {("blocks", 7, 0): (0,), ("blocks", 8, 0): (1,), ("blocks", 9, 0): None}),
    ("7:h0,7:h3", WAN, {("blocks", 7, 0): (0, 3)}),
    ("double.7:h3,single.1", FLUX, {("double", 7, 0): (3,), ("single", 1, 0): None}),
    ("u5:h1", SDXL, {("output", 5, 0): (1,), ("output", 5, 1): (1,)}),
    ("m0.3:h2,m0.3", SDXL, {("middle", 1, 3): None}),
    ("auto:h4", WAN, {("blocks", 12, 0): (4,)}),
]


@pytest.mark.parametrize(("selector", "catalogue", "expected"), HEADS)
def test_heads_of_layers(selector, catalogue, expected):
    auto = [Target("blocks", 12)]
    found = select_heads(selector, catalogue, auto)
    assert {(t.part, t.index, t.transformer): heads for t, heads in found.items()} == expected
    text = describe_targets(found, catalogue, found)
    assert select_heads(text, catalogue) == found, text


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("7:h0,24", "block 7 has 24 heads, 0 to 23, so there is no head 24"),
        ("7:h", "heads must be written as in 7:h0-3, got '7:h'"),
        ("7:2", "heads must be written as in 7:h0-3, got '7:2'"),
        ("7:h3-1", "a range must run upwards, got '7:h3-1'"),
        ("7:h1,3-2", "a range must run upwards, got '3-2'"),
        (":h1", "the blocks must be written in the selector language, got ''"),
        ("7:h0,double.7", ".*got 'double.7'"),
    ],
)
def test_wrong_heads_are_errors_that_say_why(selector, message):
    with pytest.raises(ValueError, match="^" + message):
        select_heads(selector, WAN, count=lambda _: 24)


@pytest.mark.parametrize("selector", ["random:2", "random:2,,", " ,Random : 2, \n,"])
def test_empty_terms_do_not_matter_where_blocks_are_drawn(selector):
    assert select_random(selector, SDXL, AUTO) == (AUTO, 2)
    among = select_random(f"{selector},,m0.2-4,", SDXL, AUTO)
    assert among == (layers("middle", 1, 2, 3, 4), 2)
    assert select_random(",,m0", SDXL, AUTO) is None
