"""Shape annotations: checked while testing, inert at run time.

This module deliberately adds no dependency: without jaxtyping the annotations stay strings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float as Float
    from jaxtyping import Int as Int
else:
    try:
        from jaxtyping import Float, Int
    except ImportError:
        Float = Int = None
