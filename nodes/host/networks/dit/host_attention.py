"""One call of the host's attention function, whatever the layout of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..span import Span


@dataclass(frozen=True)
class Attention:
    """One call of the host's attention function."""

    attend: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    chained: bool
    """Another node's override computes it."""

    @property
    def axis(self) -> int:
        """Return the tokens' axis of queries, keys and values."""
        return 2 if self.kwargs.get("skip_reshape") else 1

    @property
    def out_axis(self) -> int:
        """Return the tokens' axis of the output."""
        return 2 if self.kwargs.get("skip_output_reshape") else 1

    @property
    def query(self) -> torch.Tensor:
        """Return the queries."""
        return self.args[0]

    @property
    def queries(self) -> int:
        """Return the number of queries."""
        return self.query.shape[self.axis]

    @property
    def keys(self) -> int:
        """Return the number of keys."""
        return self.args[1].shape[self.axis]

    @property
    def heads(self) -> int:
        """Return the number of heads."""
        return self.args[3] if len(self.args) > 3 else self.kwargs["heads"]

    @property
    def scale(self) -> float | None:
        """Return the factor of the logits; None for the usual one."""
        return self.kwargs.get("scale")

    @property
    def mask(self) -> torch.Tensor | None:
        """Return the mask of the logits."""
        return self.args[4] if len(self.args) > 4 else self.kwargs.get("mask")

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

    def as_sequences(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries and keys as `(batch, tokens, channels)`, of as many heads each."""
        query, key = self.args[0], self.args[1]
        if self.axis == 2:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            return query.transpose(1, 2).flatten(2), key.transpose(1, 2).flatten(2)
        key = key.flatten(2)  # of SD3 heads may be parted already
        times = query.flatten(2).shape[2] // key.shape[2]
        if times > 1:
            width = query.flatten(2).shape[2] // self.heads
            key = key.unflatten(2, (-1, width)).repeat_interleave(times, dim=2).flatten(2)
        return query.flatten(2), key

    def of(self, rows: slice) -> Attention:
        """Return the attention of some rows of the batch."""
        batch = self.query.shape[0]
        if rows.stop - rows.start == batch:
            return self

        def part(value: Any) -> Any:
            of_rows = torch.is_tensor(value) and value.ndim > 2 and value.shape[0] == batch
            return value[rows] if of_rows else value

        args = tuple(part(value) for value in self.args)
        return Attention(
            self.attend, args, {k: part(v) for k, v in self.kwargs.items()}, self.chained
        )

    def run(self, query: torch.Tensor | None = None) -> torch.Tensor:
        """Compute it, with other queries if given."""
        if query is None:
            return self.attend(*self.args, **self.kwargs)
        return self.attend(query, *self.args[1:], **self.kwargs)

    def value_as_output(self) -> torch.Tensor:
        """Return the values in the layout of the output."""
        value = self.args[2]
        if self.axis == 1:
            value = value.flatten(2)  # of SD3 they come with heads parted already
            groups = self.heads * value.shape[2] // self.query.shape[2]
            value = value.unflatten(2, (groups, -1)).transpose(1, 2)
        if value.shape[1] != self.heads:  # grouped queries
            value = value.repeat_interleave(self.heads // value.shape[1], dim=1)
        return value if self.out_axis == 2 else value.transpose(1, 2).flatten(2)
