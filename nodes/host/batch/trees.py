"""Tensors inside of whatever networks hand on: lists, tuples, dictionaries, objects."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import torch


def map_tensors(
    change: Callable[[torch.Tensor], torch.Tensor], value: Any, inside: tuple[int, ...] = ()
) -> Any:
    """Return a copy of a value with its tensors changed.

    Args:
        change: is given each tensor.
        value: tensors, and containers and objects that hold them.
        inside: identities of the objects that hold this one, which may hold each other.

    Returns:
        An object none of whose tensors has changed comes back itself: it may be written to.
    """
    if torch.is_tensor(value):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(change, one, inside) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, one, inside) for one in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, one, inside) for one in value)
    return value if id(value) in inside else _mapped_attributes(change, value, inside)


def _mapped_attributes(
    change: Callable[[torch.Tensor], torch.Tensor], value: Any, inside: tuple[int, ...]
) -> Any:
    held = _attributes(value)
    # Without a tensor or a record, whatever an object leads to is not of this call.
    if not any(is_dataclass(one) or any(True for _ in tensors_in(one)) for one in held.values()):
        return value
    changes = list[bool]()

    def noting(tensor: torch.Tensor) -> torch.Tensor:
        other = change(tensor)
        changes.append(other is not tensor)
        return other

    new = {name: map_tensors(noting, one, (*inside, id(value))) for name, one in held.items()}
    if not any(changes):
        return value
    changed = copy.copy(value)
    for name, one in new.items():
        if one is not held[name]:
            object.__setattr__(changed, name, one)  # it may be frozen
    return changed


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, whether it has a dictionary or slots for them.

    Returns:
        Nothing for modules, functions and classes: their tensors are not those of a call.
    """
    if callable(value):
        return {}
    slots = [name for cls in type(value).__mro__ for name in vars(cls).get("__slots__", ())]
    names = [*getattr(value, "__dict__", ()), *slots]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def merged(
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], one: Any, other: Any
) -> Any:
    """Return the second of two values of one structure, its tensors changed with the first's."""
    firsts = tensors_in(one)
    return map_tensors(lambda second: change(next(firsts), second), other)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Return the tensors inside of a value, in order."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def joined(values: list[Any]) -> Any:
    """Return several values of one structure as one, their tensors joined row by row."""
    if len(values) == 1:
        return values[0]
    pieces = zip(*map(tensors_in, values), strict=True)
    return map_tensors(lambda _: torch.cat(next(pieces)), values[0])
