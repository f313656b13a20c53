"""What other nodes' functions are made of, to tell what they go by without running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from types import CodeType
from typing import Any


def codes_of(*functions: Callable[..., Any]) -> Iterator[CodeType]:
    """Return the code of functions, and of all that they hold on to: they may run it."""
    found: list[Any] = list(functions)
    for one in found:
        function = getattr(one, "__func__", one)
        code = getattr(function, "__code__", None)
        held = [] if code is not None else [type(one).__call__]
        held += [getattr(function, name, None) for name in ("func", "__wrapped__")]
        held += getattr(function, "args", ())
        for cell in getattr(function, "__closure__", None) or ():
            with suppress(ValueError):  # a name that has no value yet
                held.append(cell.cell_contents)
        found += [new for new in held if callable(new) and not any(new is old for old in found)]
        codes = [code]
        for code in codes:
            if isinstance(code, CodeType):
                yield code
                codes += code.co_consts
