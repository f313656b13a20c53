"""Which family a network belongs to, and where its blocks are."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch

from ...batch.compiled import eager
from .families import FAMILIES, Family

_BY_CLASS = {
    f"comfy.ldm.{name}": family
    for family in FAMILIES
    for name in (family.network, *family.variants)
}


def family_of(network: object) -> Family | None:
    """Return the row of a network, by the names of its classes; None if it is of no known family.

    Names, so that a ComfyUI without a family still imports this. A subclass that the table does not
    name belongs to its parent's family unless it replaces methods or brings blocks: it lays out
    tokens, or runs blocks, in a way that the row says nothing of.
    """
    replaced: set[str] = set()
    for cls in type(network).__mro__:
        family = _BY_CLASS.get(f"{cls.__module__}.{cls.__qualname__}")
        if family is None:
            replaced.update(vars(cls))
        elif replaced and (replaced & _methods(cls) or _has_foreign_blocks(network, family, cls)):
            return None
        else:
            return family
    return None


def _methods(cls: type) -> set[str]:
    """Return the names of a network's methods, other than those that every module has."""
    own = [base for base in cls.__mro__ if base not in torch.nn.Module.__mro__]
    names = {name for base in own for name, value in vars(base).items() if callable(value)}
    return {name for name in names if not name.startswith("__")}


def _has_foreign_blocks(network: Any, family: Family, cls: type) -> bool:
    """Tell whether any block is of a class that the module of a network's class does not use."""
    known = vars(sys.modules[cls.__module__])
    blocks = [eager(block) for path in family.parts.values() for block in modules_at(network, path)]
    return any(known.get(type(block).__name__) is not type(block) for block in blocks)


def modules_at(network: Any, path: str) -> list[torch.nn.Module]:
    """Return the module at a path, or those of the list that stands there; none if none does."""
    try:
        found = operator.attrgetter(path)(network)
    except AttributeError:
        return []
    if found is None:
        return []
    if isinstance(found, torch.nn.ModuleDict):
        return list(found.values())
    return list(found) if hasattr(found, "__len__") else [found]
