"""One call of the host's attention function: where the image's tokens lie, and what they draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ....seg_core import Target, TokenGrid, column_mass, frame_shares

OVERRIDE = "optimized_attention_override"
"""Where the host's options hold what stands around its attention function."""


@dataclass(frozen=True)
class Span:
    """Where the image's tokens lie in a sequence.

    Attributes:
        start: of the image's tokens.
        grid: their order.
        row: tokens from one row of the image to the next.
        key_offset: keys and values before those of the queries' own tokens.
        patch: latent cells along a token's sides; None where the grid is stretched over the latent.
    """

    start: int
    grid: TokenGrid
    row: int
    key_offset: int = 0
    patch: tuple[int, int, int] | None = None

    @property
    def length(self) -> int:
        """Return the length of the part of the sequence that holds the image."""
        return self.grid.frames * self.grid.height * self.row

    @property
    def is_solid(self) -> bool:
        """Tell whether nothing else lies between the image's rows."""
        return self.row == self.grid.width

    def view(self, tensor: torch.Tensor, axis: int, offset: int = 0) -> torch.Tensor:
        """Return the image's rows as a view; two axes in place of the tokens' one."""
        part = tensor.narrow(axis, self.start + offset, self.length)
        return part.unflatten(axis, (-1, self.row)).narrow(axis + 1, 0, self.grid.width)


@dataclass(frozen=True)
class Mass:
    """How much attention each token of an image drew in a block.

    Attributes:
        mass: in shares of the average, row-major over the grid.
        grid: the tokens of the image.
        patch: latent cells along a token's sides, as in `Span`.
    """

    mass: torch.Tensor
    grid: TokenGrid
    patch: tuple[int, int, int] | None = None


class Attention:
    """One call of the host's attention function, whatever the layout of its tensors.

    Attributes:
        query: `(rows, tokens, heads x dim)`, or `(rows, heads, tokens, dim)`.
        key: in the layout of the queries; heads may be apart, `(rows, tokens, heads, dim)`, and
            fewer than those of the queries.
        value: in the layout of the keys.
        rows, queries, keys: how many there are.
        heads: number of heads of the queries.
        mask: of the logits, or None.
        scale: factor of the logits; None for the usual one.
        axis: the tokens' axis of queries, keys and values.
        out_axis: the tokens' axis of the output.
        chained: another node's code computes it, and may count on as many queries as tokens.
    """

    def __init__(
        self,
        attend: Callable[..., torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        chained: bool,
    ) -> None:
        self._attend = attend
        self._args = args
        self._kwargs = kwargs
        self.chained = chained
        self.query: torch.Tensor = args[0]
        self.key: torch.Tensor = args[1]
        self.value: torch.Tensor = args[2]
        self.heads: int = args[3] if len(args) > 3 else kwargs["heads"]
        self.mask: torch.Tensor | None = args[4] if len(args) > 4 else kwargs.get("mask")
        self.scale: float | None = kwargs.get("scale")
        self.axis = 2 if kwargs.get("skip_reshape") else 1
        self.out_axis = 2 if kwargs.get("skip_output_reshape") else 1
        self.rows, self.queries = self.query.shape[0], self.query.shape[self.axis]
        self.keys = self.key.shape[self.axis]

    @property
    def masks_queries(self) -> bool:
        """Tell whether a mask treats queries differently."""
        return self.mask is not None and self.mask.shape[-2] != 1

    def mask_of(self, span: Span) -> torch.Tensor | None:
        """Return the mask of an image's queries, as `(batch, heads, queries, keys)`."""
        mask = self.mask
        if mask is None:
            return None
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
        return mask if mask.shape[2] == 1 else span.view(mask, 2).flatten(2, 3)

    def of(self, rows: slice) -> Attention:
        """Return the attention of some rows of the queries."""
        batch = self.rows
        if rows.stop - rows.start == batch:
            return self

        def part(value: Any) -> Any:
            of_rows = torch.is_tensor(value) and value.ndim > 2 and value.shape[0] == batch
            return value[rows] if of_rows else value

        args = tuple(part(value) for value in self._args)
        kwargs = {name: part(value) for name, value in self._kwargs.items()}
        return Attention(self._attend, args, kwargs, chained=self.chained)

    def run(self, query: torch.Tensor | None = None) -> torch.Tensor:
        """Compute it, with other queries if given, in the layout of its own."""
        query = self.query if query is None else query
        return self._attend(query, *self._args[1:], **self._kwargs)

    def by_heads(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Return a view of a tensor whose tokens are on `axis`: `(rows, tokens, heads, dim)`."""
        if axis == 2:
            return tensor.transpose(1, 2)
        dim = self.query.shape[-1] // (1 if self.axis == 2 else self.heads)
        return tensor if tensor.ndim == 4 else tensor.unflatten(2, (-1, dim))

    def of_each_head(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return keys or values by heads, repeated where several heads of queries share them."""
        tensor = self.by_heads(tensor, self.axis)
        shared = self.heads // tensor.shape[2]
        return tensor if shared == 1 else tensor.repeat_interleave(shared, dim=2)

    def image_mass(self, span: Span, rows: slice) -> Mass:
        """Return how much attention the image's tokens draw from each other, in some rows."""
        own = self.of(rows)
        image = span.view(own.by_heads(own.query, own.axis), 1).flatten(1, 2).flatten(2)
        key = own.of_each_head(own.key).flatten(2)
        mass = column_mass(image, key, own.heads, scale=own.scale, mask=own.mask_of(span))
        image_keys = span.view(mass, 1, span.key_offset).flatten(1, 2)
        return Mass(frame_shares(image_keys, span.grid), span.grid, span.patch)


@dataclass(frozen=True)
class SaliencyRequest:
    """Somebody who asks for the attention that tokens draw in some layers.

    Attributes:
        label: whose guidance it is, in messages.
        targets: the layers.
        keep: is given the layer, how many rows its tensors have for each of the batch, and a
            function that measures rows.
    """

    label: str
    targets: tuple[Target, ...]
    keep: Callable[[Target, int, Callable[[slice], Mass]], None]


def laid_out(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """Return `(rows, tokens, heads, dim)` in the layout whose tokens are on `axis`."""
    return tensor.transpose(1, 2) if axis == 2 else tensor.flatten(2)
