"""Whatever samples on ComfyUI alone samples with our nodes, whichever code is in the network."""

from __future__ import annotations

import functools

import pytest
from choice import each, some
from family_oracle import guide
from host_models import shared_model
from no_op import NOTHING, hardly, nothing, pushed, refused_or_latents
from reuse_checks import difference, outcome
from surroundings import (
    asserts_labels,
    asserts_rows,
    first_of_each_half,
    first_row_of_each_label,
    first_rows,
    halves_apart,
    longer_keys,
    masks_by_label,
    mean_of_all_rows,
    normalised_over_rows,
    windowed,
)

SETTINGS = {"size": (6, 8), "steps": 2}
UNETS = {
    "keys of each half's first": (first_of_each_half, [(7.0, 1), (7.0, 2), (7.0, 3), (1.0, 2)]),
    "keys drawn to all rows": (mean_of_all_rows, [(7.0, 1), (1.0, 2), (7.0, 3)]),
    "queries normalised by the first row": (normalised_over_rows, [(7.0, 1), (1.0, 3)]),
    "halves pushed apart": (halves_apart, [(7.0, 1), (7.0, 3), (1.0, 2)]),
    "at most two labels": (asserts_labels(1, 2), [(7.0, 1), (7.0, 2)]),
    "one label": (asserts_labels(1), [(1.0, 1), (1.0, 2)]),
    "exactly two labels": (asserts_labels(2), [(7.0, 1)]),
    "one row": (asserts_rows(1), [(1.0, 1)]),
    "two rows": (asserts_rows(2), [(7.0, 1), (1.0, 2)]),
    "a mask for each label": (masks_by_label, [(7.0, 2), (1.0, 1)]),
    "the first row of each label": (first_row_of_each_label, [(7.0, 1), (7.0, 2), (1.0, 2)]),
    "the first two rows": (first_rows(2), [(7.0, 1), (1.0, 2)]),
    "the first row": (first_rows(1), [(1.0, 1)]),
}  # fmt: skip
# Code that cannot even run without the other side of cfg may be refused by name.
MAY_BE_REFUSED = {("exactly two labels", 7.0), ("two rows", 7.0)}
UNET_CASES = [(name, *case) for name, (_, cases) in UNETS.items() for case in cases]
FIRST_CASES = [(name, *cases[0]) for name, (_, cases) in UNETS.items()]


def one_call_or_the_first(case, reuse):
    """Tell whether the ordinary run takes a case: whole passes beside a third of the codes."""
    return reuse or case in FIRST_CASES[::3]


def unet_run(cfg, batch):
    """Return what samples from a model of a UNet."""
    return lambda model: outcome(model, **SETTINGS, cfg=cfg, batch=batch).latents


@functools.cache
def unet_alone(name, cfg, batch):
    """Return the latents beside some code, without guidance; the code must act."""
    run = unet_run(cfg, batch)
    alone = run(UNETS[name][0](shared_model()))
    acts = difference(alone, run(shared_model()))
    assert acts > 1e-3
    return alone


@pytest.mark.parametrize(
    *each(None, one_call_or_the_first, case=UNET_CASES, reuse=(True, False)), ids=str
)
def test_code_that_is_right_for_the_plain_batch_alone_is_pushed_nowhere(case, reuse):
    name, cfg, batch = case
    around, run, may_refuse = UNETS[name][0], unet_run(cfg, batch), (name, cfg) in MAY_BE_REFUSED
    models = [around(nothing(shared_model(), reuse))]
    if reuse:
        models += [nothing(around(shared_model()), reuse), around(hardly(shared_model()))]
    for model in models:
        by = pushed(run, model, unet_alone(*case), may_refuse=may_refuse)
        assert by <= NOTHING


@pytest.mark.parametrize(
    *each(
        method=["SEG", "TPG", "SLG"],
        name=["keys of each half's first", "the first row of each label"],
    )
)
def test_one_call_and_whole_passes_agree_beside_code_that_knows_the_plain_batch(name, method):
    run, around = unet_run(7.0, 2), UNETS[name][0]
    one, whole = (
        run(guide(method, around(shared_model()), 3.0, reuse=reuse, blocks="d0,m0"))
        for reuse in (True, False)
    )
    apart = difference(one, whole)
    assert apart <= NOTHING
    acts = difference(one, unet_alone(name, 7.0, 2))
    assert acts > 1e-3


# Keys of a block that others lengthen, rows that they multiply.


def test_keys_that_a_patch_adds_to_a_changed_block_are_exact_or_refused():
    run = unet_run(7.0, 1)
    alone = run(longer_keys(shared_model()))
    for reuse in (True, False):
        by = pushed(run, longer_keys(nothing(shared_model(), reuse)), alone, may_refuse=True)
        assert by <= NOTHING
    one, whole = (
        run(longer_keys(guide("SEG", shared_model(), 3.0, reuse=r))) for r in (True, False)
    )
    assert difference(one, whole) <= NOTHING
    assert difference(one, alone) > 1e-3


METHODS = {
    "SEG": ("SEG", {}),
    "PAG": ("PAG", {}),
    "heads": ("PAG", {"blocks": "m0:h1"}),
    "attention": ("SLG", {"what": "attention"}),
    "TPG": ("TPG", {"blocks": "m0"}),
    "SLG": ("SLG", {"blocks": "m0"}),
}


@pytest.mark.parametrize(*each(method=METHODS, cfg=(7.0, 1.0)))
def test_windows_in_a_changed_block_give_an_exact_result_or_a_refusal(method, cfg):
    name, widgets = METHODS[method]
    run = unet_run(cfg, 1)
    alone = run(windowed(shared_model()))
    for reuse in (True, False):
        barely = guide(name, windowed(shared_model()), 1e-6, reuse=reuse, **widgets)
        by = pushed(run, barely, alone, may_refuse=True)
        assert by <= 1e-4
    one, whole = (
        refused_or_latents(run, guide(name, windowed(shared_model()), 3.0, reuse=reuse, **widgets))
        for reuse in (True, False)
    )
    assert (one is None) == (whole is None)
    if one is not None:
        assert difference(one, whole) <= NOTHING
        assert difference(one, alone) > 1e-3


@pytest.mark.parametrize("reuse", some([True, False], True))
def test_windows_in_the_block_of_an_identity_map_that_changes_nothing(reuse):
    for widgets in ({}, {"blocks": "m0:h1"}):
        run = unet_run(7.0, 2)
        model = windowed(nothing(shared_model(), reuse, **widgets))
        by = pushed(run, model, run(windowed(shared_model())), may_refuse=True)
        assert by <= NOTHING
