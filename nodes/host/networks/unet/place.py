"""Where one call of a UNet is: which self-attention is computed, and on which grid of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .....seg_core import Target, TokenGrid, describe_targets
from ...calls.blocks import hooked


class Place:
    """Which target's transformer block runs, if any, and how large its image is."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet  # the view, which stands above
        self.target: Target | None = None
        self.over_time = False
        """The attention that runs is that over frames, at each place by itself."""
        self._size: tuple[int, int] = (0, 0)

    def grid(self, tokens: torch.Tensor, label: str) -> TokenGrid:
        """Return the grid of a block's tokens, for the guidance of this name.

        Raises:
            ValueError: if the tokens are not that grid.
        """
        height, width = self._size
        if self.over_time:
            return TokenGrid(tokens.shape[1], 1, 1)
        if height * width == tokens.shape[1]:
            return TokenGrid(1, height, width)
        raise ValueError(
            f"{label}: block {self.name} has {tokens.shape[1]} tokens, which is "
            f"not its grid of {height}x{width} = {height * width}. A node before it merges or "
            "tiles tokens in a way of its own; leave that node out, or choose other blocks."
        )

    @property
    def name(self) -> str:
        """Return the running block in the selector language."""
        return describe_targets([self.target] if self.target else [], self.unet.catalogue)

    @property
    def attn(self) -> Any:
        """Return the running self-attention."""
        module = self.unet.module_over_time if self.over_time else self.unet.module
        return module(self.target).attn1

    @contextmanager
    def followed(self, targets: Iterable[Target], over_time: bool = False) -> Iterator[None]:
        """Follow one call through the blocks of some targets, and those over time beside them.

        Blocks are known by their modules, so that attention over time, which runs through the
        same code with the same names, is not taken for that over the image.
        """
        chosen = list(targets)
        layers = list(dict.fromkeys(self.unet.spatial(target) for target in chosen))
        blocks = [self.unet.module(target) for target in chosen]
        beside = [self.unet.module_over_time(target) for target in chosen] if over_time else []

        def enter_layer(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["x"]
            self._size = tuple(x.shape[-2:])

        def enter(number: int, *_: Any) -> None:
            self.target = chosen[number % len(chosen)]
            self.over_time = number >= len(chosen)

        def leave(*_: Any) -> None:
            self.target = None

        both = [*blocks, *beside]
        with hooked(layers, enter_layer, lambda *_: None), hooked(both, enter, leave):
            yield
