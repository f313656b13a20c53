"""What the tests see of a diffusion transformer's attention, by means of their own.

Independent of the code under test: blocks are known by hooks on their modules, and the image's rows
by changing the latent patch by patch and looking which query moves.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator

import torch
from dit_models import KINDS, TINY, sampled, tiny_dit
from host_models import CONFIGS, noise_like, shared_model
from host_oracle import by_head, changed_attention, guided_by_hand

OVERRIDE = "optimized_attention_override"
# What networks call their lists of blocks, in forward order; each has one of them or two.
LISTS = (
    "joint_blocks", "patch_blocks", "double_blocks", "double_layers", "double_stream_blocks",
    "double_stream_layers", "transformer_blocks", "visual_transformer_blocks", "visual_blocks",
    "language_model.layers", "layers", "blocks", "pixel_blocks", "single_blocks", "single_layers",
    "single_stream_blocks", "single_stream_layers",
)  # fmt: skip
# Only the first attention of their blocks is the image's own; text, sound or control follow.
FIRST = {
    "ltxv", "ltx2", "ltx2_silent", "ltx2_keyframes", "cosmos1", "cosmos2", "anima", "kandinsky5",
    "kandinsky6", *(kind for kind in TINY if kind.startswith("wan")),
}  # fmt: skip
# They attend to each part of the sequence by itself, to the image's last.
LAST = {"qwen21"}
ONLY_FLOAT32 = {"cosmos1", "hidream_o1"}
PIXELS = {"pixeldit", "pid"}  # have blocks that the image's tokens do not enter
KEYS_TOO = {"hidream_o1"}  # hand keys on from block to block, besides tokens
# The image's place is fixed from the end of the sequence, whatever stands before.
FROM_END = {*TINY} - FIRST - {"lens", "joyimage", "hidream", "hidream_o1", "mochi"}
CORE = [kind for kind in KINDS if kind in ("flux", "sd3", "qwen", "lumina2", "wan")]


@functools.cache
def exact_model(kind):
    """Return a tiny UNet or transformer in the highest precision that it takes; clone it."""
    if kind in CONFIGS:
        return shared_model(kind)
    return tiny_dit(kind, dtype=torch.float32 if kind in ONLY_FLOAT32 else torch.float64)


def block_lists(model):
    """Return the lists of blocks of a tiny model in forward order."""
    network, lists = model.model.diffusion_model, []
    for name in LISTS:
        with contextlib.suppress(AttributeError):
            blocks = operator.attrgetter(name)(network)
            lists.append(
                list(blocks.values() if isinstance(blocks, torch.nn.ModuleDict) else blocks)
            )
    return lists


def block_modules(model):
    """Return the blocks of a tiny model in forward order."""
    return [block for blocks in block_lists(model) for block in blocks]


def selector(model, kind, numbers):
    """Return blocks, counted over all lists, in the selector language."""
    first, *second = block_lists(model)
    if not second:
        return ",".join(map(str, numbers))
    parts = ("patch", "pixel") if kind in PIXELS else ("double", "single")
    split = len(first)
    return ",".join(f"{parts[0]}.{n}" if n < split else f"{parts[1]}.{n - split}" for n in numbers)


@contextlib.contextmanager
def entered(model):
    """Know in which block the network is, and at which attention call of it."""
    state = {"block": None, "call": -1, "runs": []}

    def enter(number):
        def before(*_):
            state.update(block=number, call=-1)
            state["runs"].append(number)

        return before

    def leave(*_):
        state.update(block=None, call=-1)

    with contextlib.ExitStack() as hooks:
        for number, block in enumerate(block_modules(model)):
            hooks.enter_context(block.register_forward_pre_hook(enter(number)))
            hooks.enter_context(block.register_forward_hook(leave))
        yield state


def without_refiners(model):
    """Keep a model's refiners from mixing tokens, so that a patch stays where it is."""
    network = model.model.diffusion_model
    for name in ("noise_refiner", "ref_image_refiner"):
        for layer in getattr(network, name, ()):
            out = layer.attention.out if hasattr(layer, "attention") else layer.attn.to_out[0]
            out.weight.data.zero_()
    return model


def grid_size(kind, shape):
    """Return frames, rows and columns of a latent's tokens."""
    unit = TINY[kind].unit
    frames = shape[2] if len(shape) == 5 else 1
    return frames, math.ceil(shape[-2] / unit), math.ceil(shape[-1] / unit)


def varied(kind, shape, seed=0):
    """Return noise of batch 1 + n: the same image, and once for each patch with it changed."""
    unit = TINY[kind].unit
    base = noise_like(shape, seed)
    images = [base]
    for token in torch.cartesian_prod(*map(torch.arange, grid_size(kind, shape))).tolist():
        changed = base.clone()
        # The last cell of a patch: the host pads with the first ones of the image.
        cell = [
            min((n + 1) * unit, size) - 1 for n, size in zip(token[1:], shape[-2:], strict=True)
        ]
        index = (token[0], *cell) if len(shape) == 5 else tuple(cell)
        changed[(0, slice(None), *index)] += 3.0
        images.append(changed)
    return torch.cat(images)


def image_rows(queries):
    """Return which query row each patch moved; each must move exactly one."""
    rows = []
    for changed in queries[1:]:
        moved = (changed - queries[0]).abs().amax(-1) > 1e-3 * queries[0].abs().max()
        (row,) = moved.nonzero().flatten().tolist()
        rows.append(row)
    assert len(set(rows)) == len(rows)
    return rows


def found_rows(model, kind, shape, cond=None):
    """Return the image's rows in the queries of the first block, and the number of queries.

    Of the last attention's keys, for families that attend to each part of the tokens by itself.
    """
    noise, found = varied(kind, shape), []
    model = without_refiners(model)
    with entered(model) as state:

        def look(func, query, key, *args, **kwargs):
            if state["block"] == 0 and (not found or kind in LAST):
                before = key.shape[-2] - query.shape[-2] if kind in LAST else 0
                split = kwargs.get("skip_reshape")
                found[:] = query.transpose(1, 2).flatten(2) if split else query.clone(), before
            return func(query, key, *args, **kwargs)

        model.model_options["transformer_options"][OVERRIDE] = look
        sampled(model, kind, noise.shape, steps=1, cfg=1.0, noise=noise, cond=cond)
    queries, before = found
    return [before + row for row in image_rows(queries)], before + queries.shape[1]


def dense_guidance(model, kind, rows, length, blocks, *, scale=1.0, side="cond", **change):
    """Return a model guided away from predictions with other attention among the image's queries.

    Args:
        model: the model to guide.
        kind: its row in `TINY`.
        rows: the image's rows in the first block's queries, as `found_rows` counts them.
        length: number of queries there.
        blocks: numbers of the changed blocks.
        scale: guidance weight.
        side: as in `guided_by_hand`.
        change: as in `changed_attention`.
    """

    @contextlib.contextmanager
    def worse(_step, options):
        with entered(model) as state:

            def attention(func, query, key, value, heads, *args, **kwargs):
                state["call"] += 1
                others = kind in FIRST and state["call"] > 0
                others = others or (kind in LAST and key.shape[-2] != length)
                if state["block"] not in blocks or others:
                    return func(query, key, value, heads, *args, **kwargs)
                mask = kwargs.get("mask", args[0] if args else None)
                query, key, value = by_head((query, key, value), heads, kwargs)
                shift = query.shape[2] - length if kind in FROM_END else 0
                out = changed_attention(
                    query, key, value, torch.tensor(rows) + shift, mask=mask, **change
                )
                if kwargs.get("skip_output_reshape"):
                    return out
                return out.transpose(1, 2).flatten(2)

            options["transformer_options"][OVERRIDE] = attention
            yield

    return guided_by_hand(model, worse, scale, side)
