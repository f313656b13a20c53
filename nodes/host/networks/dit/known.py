"""Which family a network is of, by the names of classes: so a ComfyUI without one imports this."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from .families import FAMILIES, Family

_BY_CLASS = {f"comfy.ldm.{family.network}": family for family in FAMILIES}


def family_of(network: object, model: object) -> Family | None:
    """Return the row of a network; None if it is of no known family.

    Where another node has exchanged the network's class, that which the host's model makes counts.
    """
    made = [named for cls in type(model).__mro__ for named in _named_by(vars(cls).get("__init__"))]
    classes = [cls for one in (type(network), *made) for cls in one.__mro__]
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in classes]
    return next((_BY_CLASS[name] for name in names if name in _BY_CLASS), None)


def _named_by(init: Any) -> list[type]:
    """Return the classes of networks that a model of the host names where it makes one."""
    if not inspect.isfunction(init):
        return []
    words = {"comfy", "ldm", *init.__code__.co_names}
    modules = [module for name, module in sys.modules.items() if {*name.split(".")} <= words]
    spaces = [init.__globals__, *(vars(module) for module in modules)]
    found = [space.get(word) for space in spaces for word in words]
    return [one for one in (*(init.__defaults__ or ()), *found) if isinstance(one, type)]
