"""The block selector language: text in, existing self-attention layers out.

Nothing here knows a model; the host says which blocks there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from .catalogue import LETTERS, numbered, part_names
from .catalogue import Block as Block
from .catalogue import Target as Target
from .catalogue import all_targets as all_targets
from .catalogue import describe as describe
from .catalogue import describe_targets as describe_targets

_PARTS = {letter: part for part, letter in LETTERS.items()}

_RANGE = r"(\d+)(?:-(\d+))?"
_UNET_TERM = re.compile(rf"([dmu]){_RANGE}(?:\.{_RANGE})?")
_LIST_TERM = re.compile(rf"(?:([^.,]*[^.,\d-])\.)?{_RANGE}")
_BROKEN_NUMBER = re.compile(r"\d\s+\d")
_HEADS = re.compile(rf"h{_RANGE}")
_MORE_HEADS = re.compile(_RANGE)
_RANDOM = re.compile(r"random(?::(\d+))?")

Heads: TypeAlias = tuple[int, ...] | None
"""Numbers of heads; None for all of a layer."""


def select(
    selector: str, catalogue: Sequence[Block], auto: Sequence[Target] = ()
) -> tuple[Target, ...]:
    """Return the layers that a selector names.

    A selector is a comma list; the result is the union of its terms:

    * ``auto``: the host's choice for this model;
    * UNets: ``input``, ``middle``, ``output``; ``d4``, ``m0``, ``u2`` for the n-th block *with
      attention* of these parts, ``d4-5``; ``u0.2``, ``d2.2-9`` for layers of a block, and
      ``d0-2.1`` for that layer of each of the blocks;
    * lists of transformer blocks: ``double``, ``double.7-9``, and plain ``7-9`` where the model
      has one list; numbers are the model's own.

    Convention: case and white space do not matter, but numbers need a comma between them; empty
    terms (a comma too many) are skipped. Terms with heads are for `select_heads`.

    Args:
        selector: the text.
        catalogue: the model's blocks, in forward order.
        auto: the host's choice.

    Returns:
        The layers in forward order, each once; never empty.

    Raises:
        ValueError: if a term does not name existing layers, or nothing is named; the message
            lists what exists.
    """
    chosen = select_heads(selector, catalogue, auto)
    named = next((heads for heads in chosen.values() if heads is not None), None)
    if named is not None:
        raise ValueError(f"heads cannot be chosen here, only whole blocks, got {selector!r}")
    return tuple(chosen)


def select_heads(
    selector: str,
    catalogue: Sequence[Block],
    auto: Sequence[Target] = (),
    count: Callable[[Target], int | None] = lambda _: None,
) -> dict[Target, Heads]:
    """Return the layers that a selector names, each with the heads of it.

    As `select`, and a term may end in heads: ``m0.3:h2,5``, ``7:h0-3``; plain numbers after them
    are heads too, up to the next term with a letter or a colon. Without them, all heads.

    Args:
        selector: the text.
        catalogue: the model's blocks, in forward order.
        auto: the host's choice.
        count: number of heads of a layer, None if that is not known.

    Returns:
        The layers in forward order, each once; never empty.

    Raises:
        ValueError: as `select`, or if a layer has no such head; the message says how many it has.
    """
    if not catalogue:
        raise ValueError("this model has no self-attention blocks that could be selected")
    terms = _terms(selector, catalogue)
    if not terms:
        raise _refusal("the blocks must name at least one block, got nothing", catalogue)
    if any(term.startswith("random:") for term in terms):
        raise _refusal(f"random must stand first, and not everywhere can blocks be drawn, "
                       f"got {selector!r}", catalogue)  # fmt: skip
    chosen: dict[Target, set[int] | None] = {}
    for term, heads in _with_heads(terms, catalogue):
        for target in _term_targets(term, catalogue, auto):
            known = chosen.get(target, set())
            chosen[target] = None if heads is None or known is None else known | heads
            require_heads(heads or (), count(target), describe_targets([target], catalogue))
    return {
        target: None if (heads := chosen[target]) is None else tuple(sorted(heads))
        for target in all_targets(catalogue)
        if target in chosen
    }


def select_random(
    selector: str, catalogue: Sequence[Block], pool: Sequence[Target], auto: Sequence[Target] = ()
) -> tuple[tuple[Target, ...], int] | None:
    """Return between which layers a selector draws, and how many; None if it names layers.

    ``random`` draws about a tenth, ``random:3`` three. A selector after a comma names between
    which: ``random:2, 8-20``. The first layer of the model is never drawn. Convention: as `select`.

    Args:
        selector: the text.
        catalogue: the model's blocks, in forward order.
        pool: all layers that can be drawn.
        auto: the host's choice.

    Raises:
        ValueError: as `select`, or if there are not as many layers, or none is to be drawn.
    """
    first, *among = _terms(selector, catalogue) or [""]
    if not first.startswith("random"):
        return None
    found = _RANDOM.fullmatch(first)
    if found is None:
        raise _refusal(f"draws must be written as random or random:3, got {selector!r}", catalogue)
    chosen = select(",".join(among), catalogue, auto) if among else pool
    never = next(all_targets(catalogue), None)
    between = tuple(target for target in chosen if target != never)
    count = int(found[1] or max(round(len(between) / 10), 1))
    if not 1 <= count <= len(between):
        names = describe_targets(between, catalogue) or "none"
        raise ValueError(
            f"random:{count} must draw at least 1 and at most the {len(between)} blocks that there "
            f"are to draw from: {names}"
        )
    return between, count


def require_heads(heads: Iterable[int], count: int | None, block: str) -> None:
    """Refuse heads that a block does not have.

    Args:
        heads: the chosen ones.
        count: how many it has, None if that is not known.
        block: its name.

    Raises:
        ValueError: if there is no such head; the message says how many there are.
    """
    wrong = [head for head in heads if count is not None and head >= count]
    if wrong:
        raise ValueError(
            f"block {block} has {count} heads, 0 to {(count or 0) - 1}, so there is no head "
            f"{wrong[0]}"
        )


def _terms(selector: str, catalogue: Sequence[Block]) -> list[str]:
    """Return the terms of a selector, without white space and those that are empty."""
    if _BROKEN_NUMBER.search(selector):
        raise _refusal(f"numbers in blocks must be parted by commas, got {selector!r}", catalogue)
    return [term for term in re.sub(r"\s", "", selector).lower().split(",") if term]


def _with_heads(
    terms: Iterable[str], catalogue: Sequence[Block]
) -> list[tuple[str, set[int] | None]]:
    """Terms without their heads, and the heads; numbers that follow heads belong to them."""
    found: list[tuple[str, set[int] | None]] = []
    for term in terms:
        if found and (known := found[-1][1]) is not None and _MORE_HEADS.fullmatch(term):
            known.update(_ends(term, *term.split("-")))
            continue
        block, colon, heads = term.partition(":")
        if not colon:
            found.append((term, None))
        elif listed := _HEADS.fullmatch(heads):
            found.append((block, set(_ends(term, *listed.groups()))))
        else:
            raise _refusal(f"heads must be written as in {block}:h0-3, got {term!r}", catalogue)
    return found


def _term_targets(
    term: str, catalogue: Sequence[Block], auto: Sequence[Target]
) -> Iterable[Target]:
    if term == "auto":
        if not auto:
            raise _refusal("'auto' has no blocks for this model; name them instead", catalogue)
        return auto
    whole = [block for block in catalogue if block.part.lower() == term]
    if whole:
        return all_targets(whole)
    if unet := _UNET_TERM.fullmatch(term):
        letter, first, last, low, high = unet.groups()
        blocks = _pick(term, _PARTS[letter], _ends(term, first, last), catalogue)
        wanted = None if low is None else _ends(term, low, high)
        return _layers(term, blocks, wanted, catalogue)
    if listed := _LIST_TERM.fullmatch(term):
        part, first, last = listed.groups()
        part = _list_name(term, part, catalogue)
        return all_targets(_pick(term, part, _ends(term, first, last), catalogue))
    raise _refusal(f"the blocks must be written in the selector language, got {term!r}", catalogue)


def _pick(term: str, part: str, wanted: range, catalogue: Sequence[Block]) -> list[Block]:
    known = dict(numbered(part, catalogue))
    if not known or wanted[0] not in known or wanted[-1] not in known:
        raise _refusal(f"the blocks must name blocks of this model, got {term!r}", catalogue)
    return [block for number, block in known.items() if number in wanted]


def _layers(
    term: str, blocks: Sequence[Block], wanted: range | None, catalogue: Sequence[Block]
) -> list[Target]:
    if wanted is None:
        return list(all_targets(blocks))
    for block in blocks:
        if wanted[-1] >= block.transformers:
            raise _refusal(f"the blocks must name layers of this model, got {term!r}", catalogue)
    return [Target(block.part, block.index, layer) for block in blocks for layer in wanted]


def _list_name(term: str, part: str | None, catalogue: Sequence[Block]) -> str:
    lists = [name for name in part_names(catalogue) if name not in LETTERS]
    matches = [name for name in lists if part is None or name.lower() == part]
    if len(matches) != 1 or (part is None and len(part_names(catalogue)) != 1):
        raise _refusal(f"the blocks must name a part of this model, got {term!r}", catalogue)
    return matches[0]


def _ends(term: str, first: str, last: str | None = None) -> range:
    low, high = int(first), int(first if last is None else last)
    if high < low:
        raise ValueError(f"a range must run upwards, got {term!r}")
    return range(low, high + 1)


def _refusal(message: str, catalogue: Sequence[Block]) -> ValueError:
    return ValueError(f"{message}; this model has {describe(catalogue)}")
