"""Tensors inside of whatever networks hand on: lists, tuples, dictionaries, records."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return a copy of a value with its tensors changed; what holds none comes back itself."""
    if torch.is_tensor(value):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(change, one) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, one) for one in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, one) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            one = map_tensors(change, getattr(value, field.name))
            object.__setattr__(changed, field.name, one)
        return changed
    return value


def merged(
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], one: Any, other: Any
) -> Any:
    """Return the second of two values of one structure, its tensors changed with the first's."""
    if torch.is_tensor(other):
        return change(one, other)
    if isinstance(other, list | tuple):
        pairs = zip(one, other, strict=True)
        return type(other)(merged(change, mine, theirs) for mine, theirs in pairs)
    return other


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
    first = values[0]
    if len(values) == 1:
        return first
    if torch.is_tensor(first):
        return torch.cat(values)
    return type(first)(joined([value[n] for value in values]) for n in range(len(first)))
