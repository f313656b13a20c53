"""Diffusion transformers: which blocks there are, and where the image's tokens lie.

What differs from family to family stands in the table.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from .....seg_core import Block, Target, TokenGrid
from ...batch.call import Call
from ...batch.widening import Options, own_options
from ...settings.changes import Auto
from ...settings.errors import HOW_TO_REPORT, GuidanceError
from ..adapter import NetworkAdapter
from ..attention import OVERRIDE, Attention, Span
from ..blocks import Carried
from ..editing import AttentionEditor
from .families import Family, auto_range
from .grids import references
from .recognition import family_of, modules_at

_REFERENCES = "reference_image_num_tokens"
_HEADS = ("num_heads", "n_heads", "heads", "n_local_heads", "num_attention_heads")


class DiT(NetworkAdapter):
    """The blocks of a diffusion transformer in which an image's tokens attend to each other."""

    def __init__(self, network: Any, family: Family, *, video: bool = False) -> None:
        self.network = network
        self.family = family
        self.kind = family.name
        self.axes = family.axes
        self._patch = family.patch(network)
        self.one_picture = "" if video else f"{family.name} makes single pictures"
        parts = {part: modules_at(network, path) for part, path in family.parts.items()}
        self.catalogue = [Block(part, n) for part, some in parts.items() for n in range(len(some))]
        self.blocks = [block for some in parts.values() for block in some]
        self.shared = [module for name in family.shared for module in modules_at(network, name)]

    @staticmethod
    def of(network: object, model: object) -> DiT | None:
        """Return the adapter of a model's network; None if its family is not in the table.

        Raises:
            ValueError: if its family is known to be out of reach; says why.
        """
        family = family_of(network)
        if family is None:
            return None
        if family.unsupported:
            raise GuidanceError(
                f"{family.name} models ({type(network).__name__}) cannot be guided by perturbed "
                f"attention: {family.unsupported}."
            )
        if not all(modules_at(network, path) for path in family.parts.values()):
            raise GuidanceError(
                f"The network {type(network).__name__} ({type(network).__module__}) of this "
                f"{family.name} model does not have the blocks of ComfyUI's own, so they cannot "
                "be reached. Load the model with ComfyUI's own loader to guide it."
            )
        dimensions = getattr(getattr(model, "latent_format", None), "latent_dimensions", 2)
        return DiT(network, family, video=family.video and dimensions > 2)

    def fork(self, target: Target) -> int:
        """Return the number of a target's block."""
        return self.catalogue.index(Block(target.part, target.index))

    def module(self, target: Target) -> torch.nn.Module:
        """Return a target's block."""
        return self.blocks[self.fork(target)]

    def auto(self, purpose: Auto) -> Sequence[Target]:
        """Return a middle range of the depth, or the blocks that are usually skipped."""
        depth = len(self.catalogue)
        usual = self.family.skip(self.network) if purpose == "skip" else ()
        numbers = usual if usual and max(usual) < depth else auto_range(depth)
        return [Target(self.catalogue[n].part, self.catalogue[n].index) for n in numbers]

    def heads(self, target: Target) -> int | None:
        """Return the number of heads of a block, by the names that networks give it."""
        modules = [vars(module) for module in self.module(target).modules()]
        found = (space[name] for space in modules for name in _HEADS if name in space)
        return next((count for count in found if isinstance(count, int)), None)

    def frames(self, call: Call) -> int:
        """Return the number of frames that attend to each other in one call."""
        return self._grid(call).frames

    def carried(self, target: Target) -> Carried:
        """Return which arguments of a target's block become its result."""
        return self.family.carried.get(target.part, Carried((), None))

    def span(self, call: Call, queries: int, keys: int, options: Options) -> Span | None:
        """Return where the image's tokens lie among the queries; None if they cannot be there.

        Raises:
            ValueError: if there are tokens that the family does not explain.
        """
        if keys < queries:
            return None  # cross-attention
        family, grid = self.family, self._grid(call)
        row = family.row(self.network, call, grid)
        length = grid.frames * grid.height * row
        beside = family.beside(self.network, call, grid)
        others = queries - length - beside
        # A cache of reference images leaves their queries out.
        references_behind = self._references(call, options) * (queries == keys)
        start = beside if family.anchor == "start" else others - references_behind
        if not 0 <= start <= queries - length:
            return None
        expected = family.others(self.network, call)
        if expected is not None and others != expected:
            network = type(self.network)
            raise GuidanceError(
                f"{self.kind}: {network.__name__} ({network.__module__}) has {others} tokens "
                f"beside those of the image, and {expected} were expected, so it is not known "
                "which are the image's. Leave out what brings them: reference images, or another "
                f"node. If it is ComfyUI's own, {HOW_TO_REPORT}."
            )
        return Span(start, grid, row, keys - queries if family.cached_keys else 0, self._patch)

    def _attends_to_image(self, call: Call, keys: int) -> bool:
        """Tell whether the image is in an attention call, if each part of a sequence has its own.

        Only the image's, the last, has all keys.
        """
        prefix = self.family.prefix(self.network, call)
        return prefix is None or keys == prefix + self._grid(call).tokens

    def _grid(self, call: Call) -> TokenGrid:
        """Return the token grid of a call."""
        return self.family.grid(call, self._patch)

    def _references(self, call: Call, options: Options) -> int:
        """Return the number of tokens of reference images at the end."""
        if _REFERENCES in options:
            return sum(options[_REFERENCES])
        # Older versions of the host do not count them.
        return references(call, self._patch) if self.family.references else 0

    def obstacle(self, call: Call) -> str:
        """Return why a call cannot take more rows; empty if it can."""
        return self.family.obstacle(call)

    def edited_attention(self, call: Call, editor: AttentionEditor) -> AbstractContextManager[None]:
        """Change the self-attention of some rows for the length of one call, or measure it."""
        targets = editor.targets

        def own(number: int, options: Options) -> Options:
            override = self._override(call, options, editor, targets[number])
            return {**options, OVERRIDE: override}

        return own_options([self.module(target) for target in targets], call.options, own)

    def _override(
        self, call: Call, options: Options, editor: AttentionEditor, target: Target
    ) -> Callable[..., torch.Tensor]:
        """Return the attention override of one run of a block, around another node's if any.

        A block may attend more than once. In some families only its first attention is the image's
        self-attention; saliency is measured in the first, in which all tokens are.
        """
        before = options.get(OVERRIDE)
        editors = itertools.chain([editor], itertools.repeat(replace(editor, measured=())))

        def override(func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
            attend = func if before is None else functools.partial(before, func)
            attention = Attention(attend, args, kwargs, chained=before is not None)
            if not self._attends_to_image(call, attention.keys):
                return attention.run()
            here = next(editors)
            if self.family.first_only and here is not editor:
                return attention.run()
            seen = kwargs.get("transformer_options") or {}
            span = self.span(call, attention.queries, attention.keys, seen)
            return attention.run() if span is None else here.run(attention, target, span)

        return override
