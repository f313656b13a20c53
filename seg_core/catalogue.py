"""What the host says about a model's self-attention, and the short text for it.

Reading such text is the business of `blocks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

_Thing = TypeVar("_Thing")

# UNet parts have a letter and count attention-bearing blocks; other parts use the host's numbers.
LETTERS = {"input": "d", "middle": "m", "output": "u"}


@dataclass(frozen=True)
class Block:
    """A block of the model that has self-attention.

    Attributes:
        part: ``"input"``, ``"middle"`` or ``"output"`` of a UNet, or the name of a list of
            transformer blocks.
        index: the host's number of the block within its part.
        transformers: number of self-attention layers in the block.
    """

    part: str
    index: int
    transformers: int = 1


@dataclass(frozen=True)
class Target:
    """One self-attention layer to perturb.

    Attributes:
        part: part of the model, as in `Block`.
        index: the host's number of the block, as in `Block`.
        transformer: which layer of the block, from 0.
    """

    part: str
    index: int
    transformer: int = 0


def describe(catalogue: Sequence[Block]) -> str:
    """Return all blocks of a model in the selector language.

    Args:
        catalogue: the model's blocks, in forward order.

    Returns:
        Text such as ``d0-1.0-1, d2-3.0-9, m0.0-9`` or ``double.0-18``; it selects everything.
    """
    pieces: list[str] = []
    for part in part_names(catalogue):
        sizes = [(number, block.transformers) for number, block in numbered(part, catalogue)]
        for first, last, transformers in _runs(sizes):
            layers = f".{_span(0, transformers - 1)}" if transformers > 1 else ""
            pieces.append(f"{_prefix(part, catalogue)}{_span(first, last)}{layers}")
    return ", ".join(pieces)


def describe_targets(
    targets: Iterable[Target],
    catalogue: Sequence[Block],
    heads: Mapping[Target, tuple[int, ...] | None] | None = None,
) -> str:
    """Return a selection in the selector language.

    Args:
        targets: layers of the model.
        catalogue: the model's blocks, in forward order.
        heads: the chosen heads of layers of which not all are.

    Returns:
        Text that selects exactly these layers, those with all heads first; whole blocks are named
        without their layers.
    """
    groups: dict[tuple[int, ...] | None, list[Target]] = {None: []}
    for target in targets:
        groups.setdefault((heads or {}).get(target), []).append(target)
    return ", ".join(
        f"{piece}{_heads(chosen)}"
        for chosen, group in groups.items()
        for piece in _layer_names(group, catalogue)
    )


def _heads(chosen: tuple[int, ...] | None) -> str:
    if chosen is None:
        return ""
    spans = (_span(first, last) for first, last, _ in _runs([(head, None) for head in chosen]))
    return f":h{','.join(spans)}"


def _layer_names(targets: Iterable[Target], catalogue: Sequence[Block]) -> list[str]:
    """Names of layers in the selector language, as few as will do."""
    chosen = set(targets)
    pieces: list[str] = []
    for part in part_names(catalogue):
        layers = [
            (number, _layer_spans(block, chosen)) for number, block in numbered(part, catalogue)
        ]
        for first, last, spans in _runs([entry for entry in layers if entry[1] is not None]):
            name = f"{_prefix(part, catalogue)}{_span(first, last)}"
            pieces.extend(f"{name}{span}" for span in spans or ())
    return pieces


def numbered(part: str, catalogue: Iterable[Block]) -> Iterator[tuple[int, Block]]:
    """Blocks of a part with the numbers that the language gives them."""
    blocks = [block for block in catalogue if block.part == part]
    for ordinal, block in enumerate(blocks):
        yield (ordinal if part in LETTERS else block.index), block


def part_names(catalogue: Iterable[Block]) -> list[str]:
    """Names of the parts, in forward order."""
    return list(dict.fromkeys(block.part for block in catalogue))


def _prefix(part: str, catalogue: Iterable[Block]) -> str:
    if part in LETTERS:
        return LETTERS[part]
    return "" if len(part_names(catalogue)) == 1 else f"{part}."


def all_targets(blocks: Iterable[Block]) -> Iterator[Target]:
    """All layers of the blocks, in forward order."""
    for block in blocks:
        for layer in range(block.transformers):
            yield Target(block.part, block.index, layer)


def _layer_spans(block: Block, chosen: set[Target]) -> tuple[str, ...] | None:
    """The chosen layers as suffixes; one empty suffix for a whole block, None for no layer."""
    layers = [n for n in range(block.transformers) if Target(block.part, block.index, n) in chosen]
    if not layers:
        return None
    if len(layers) == block.transformers:
        return ("",)
    return tuple(f".{_span(low, high)}" for low, high, _ in _runs([(n, None) for n in layers]))


def _runs(entries: Sequence[tuple[int, _Thing]]) -> Iterator[tuple[int, int, _Thing]]:
    """Join neighbouring numbers that carry the same thing."""
    if not entries:
        return
    first = entries[0][0]
    for (number, thing), (following, other) in pairwise(entries):
        if following != number + 1 or other != thing:
            yield first, number, thing
            first = following
    yield first, entries[-1][0], entries[-1][1]


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"
