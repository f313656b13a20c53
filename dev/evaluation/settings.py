"""The guidance settings that an evaluation compares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dev.graphs import GUIDANCE, OFF, WHOLE

REQUIRED = {"SAG": {"blur_sigma": 2.0}}  # inputs without which the server refuses a node


@dataclass(frozen=True)
class Setting:
    """One guidance node with its inputs; no node is *off*.

    Attributes:
        name: what tables and pictures call it.
        method: `off`, `SAG`, `PAG`, `TPG`, `SSG`, `SLG` or `SEG`.
        node: the node's id, or None.
        inputs: of the node, but for the model.
        chooses: False for a variant that shows something but is not a candidate.
    """

    name: str
    method: str
    node: str | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    chooses: bool = True


def off() -> Setting:
    """Return sampling without guidance."""
    return Setting(OFF, OFF)


def other(method: str, scale: float, **more: Any) -> Setting:
    """Return a method beside SEG in all of sampling; `more` are other inputs of its node."""
    inputs = {"scale": scale, **REQUIRED.get(method, {}), **WHOLE, **more}
    return Setting(f"{method} scale {scale:g}", method, f"{GUIDANCE}{method}", inputs)


def seg(sigma: float, scale: float, **more: Any) -> Setting:
    """Return Smoothed Energy Guidance; `more` are other inputs of its node."""
    blur = {"infinite_blur": math.isinf(sigma), "blur_sigma": 0.0 if math.isinf(sigma) else sigma}
    words = ", ".join(f"{name} {value:g}" for name, value in more.items())
    name = f"SEG {'infinite' if math.isinf(sigma) else f'sigma {sigma:g}'}, scale {scale:g}"
    inputs = {"scale": scale, **blur, **WHOLE, **more}
    return Setting(f"{name}, {words}" if words else name, "SEG", GUIDANCE, inputs, not more)


def demo_grid() -> list[Setting]:
    """Return what is compared on the demo model."""
    return [
        off(),
        *(other("SAG", scale) for scale in (0.25, 0.5, 0.75, 1.5)),
        *(other("PAG", scale) for scale in (0.25, 0.5, 1.0, 2.0, 3.0)),
        # The demo model attends in its middle block alone.
        *(other("TPG", scale, blocks="middle") for scale in (0.1, 0.25, 0.5, 1.0)),
        *(other("SSG", scale) for scale in (0.1, 0.25, 0.5, 1.0)),
        *(other("SLG", scale) for scale in (0.1, 0.25, 0.5, 1.0)),
        *(seg(sigma, scale) for sigma in (1.0, 2.0, 4.0) for scale in (0.25, 0.5, 1.0)),
        *(seg(math.inf, scale) for scale in (0.1, 0.25, 0.5, 1.0, 3.0)),
        seg(math.inf, 3.0, rescale=0.7),
        seg(math.inf, 3.0, end_percent=0.5),
        *(seg(math.inf, scale, strength=0.5) for scale in (0.25, 0.5)),
    ]


def reported_grid(choice: Mapping[str, str]) -> list[Setting]:
    """Return what is shown on other seeds: the chosen, and both sweeps through them.

    Args:
        choice: for each method the name of its chosen setting, see `demo_grid`.
    """
    known = {each.name: each for each in demo_grid()}
    best = [known[name] for name in choice.values()]
    scale = next((each.inputs["scale"] for each in best if each.method == "SEG"), 1.0)
    sweeps = [
        other("PAG", 3.0),
        *(seg(sigma, scale) for sigma in (1.0, 2.0, 4.0)),
        *(each for each in known.values() if each.inputs.get("infinite_blur")),
    ]
    return list({each.name: each for each in (off(), *best, *sweeps)}.values())


def held(setting: Setting) -> list[Setting]:
    """Return a setting, and the same with its difference held for one to three steps."""
    more = [
        replace(setting, name=f"{setting.name}, every {n}", inputs={**setting.inputs, "every": n})
        for n in (2, 3, 4)
    ]
    return [setting, *more]


def history_grid() -> list[Setting]:
    """Return what is compared at every state of training."""
    inf = math.inf
    scales = (0.1, 0.25, 0.5, 1.0, 3.0)
    return [off(), other("PAG", 1.0), seg(1.0, 1.0), *(seg(inf, scale) for scale in scales)]


def shown_grid() -> list[Setting]:
    """Return the columns of `dev.py demo`: off, and the best SEG setting that `evaluate` found."""
    return [off(), seg(2.0, 0.25)]


def checkpoint_grid(sigmas: Sequence[float], scales: Sequence[float]) -> list[Setting]:
    """Return what is compared on a person's checkpoint: the paper's rivals at one setting each."""
    own = [seg(sigma, scale) for scale in scales for sigma in sigmas]
    rivals = [other("SAG", 0.75), other("PAG", 3.0), other("TPG", 3.0)]
    return [off(), *rivals, *own]
