"""What the tests see of a diffusion transformer's attention, by means of their own.

Independent of the code under test: blocks are known by hooks on their modules, and the image's rows
by changing the latent patch by patch and looking which query moves.
"""

from __future__ import annotations

import contextlib
import math
import operator
from dataclasses import dataclass

import comfy.samplers
import torch
from dit_models import TINY, latent_shape, sample_dit
from host_models import noise_like
from host_oracle import blur_map

OVERRIDE = "optimized_attention_override"
TWO_LISTS = ("double_blocks", "single_blocks")

# Lists of blocks in forward order. JOINT: each attention of a block is the image's.
JOINT = {
    "flux": TWO_LISTS,
    "flux2": TWO_LISTS,
    "chroma": TWO_LISTS,
    "radiance": TWO_LISTS,
    "hunyuan_video": TWO_LISTS,
    "hunyuan_image": TWO_LISTS,
    "sd3": ("joint_blocks",),
    "aura": ("double_layers", "single_layers"),
    "qwen": ("transformer_blocks",),
    "mage": ("transformer_blocks",),
    "lens": ("transformer_blocks",),
    "lumina2": ("layers",),
    "zimage": ("layers",),
    "krea2": ("blocks",),
    "joyimage": ("double_blocks",),
    "hidream": ("double_stream_blocks", "single_stream_blocks"),
    "omnigen2": ("layers",),
    "boogu": ("double_stream_layers", "single_stream_layers"),
    "cogvideox": ("blocks",),
    "ideogram4": ("layers",),
    "pixeldit": ("patch_blocks", "pixel_blocks"),
    "mochi": ("blocks",),
    "hidream_o1": ("language_model.layers",),
    "longcat": TWO_LISTS,
    "qwen_no_noise": ("transformer_blocks",),
    "krea2_no_noise": ("blocks",),
    "zimage_omni": ("layers",),
    "pid": ("patch_blocks", "pixel_blocks"),
}
# FIRST: only the first; text, audio or control follow.
FIRST = {
    "wan": ("blocks",),
    "wan_ref": ("blocks",),
    "wan_vace": ("blocks",),
    "wan_camera": ("blocks",),
    "wan_scail": ("blocks",),
    "wan_scail2": ("blocks",),
    "wan_humo": ("blocks",),
    "wan_s2v": ("blocks",),
    "wan_animate": ("blocks",),
    "wan_dancer": ("blocks",),
    "wan_bernini": ("blocks",),
    "ltxv": ("transformer_blocks",),
    "ltx2": ("transformer_blocks",),
    "ltx2_silent": ("transformer_blocks",),
    "cosmos2": ("blocks",),
    "anima": ("blocks",),
    "cosmos1": ("blocks",),
    "kandinsky5": ("visual_transformer_blocks",),
}
PIXELS = {"pixeldit", "pid"}  # have blocks that the image's tokens do not enter
KEYS_TOO = {"hidream_o1"}  # hand keys on from block to block, besides tokens
# The image's place is fixed from the end of the sequence, whatever stands before.
FROM_END = {
    "flux", "flux2", "chroma", "radiance", "hunyuan_video", "hunyuan_image", "sd3", "aura", "qwen",
    "mage", "lumina2", "zimage", "krea2", "omnigen2", "boogu", "cogvideox", "ideogram4", "pixeldit",
    "longcat", "qwen_no_noise", "krea2_no_noise", "zimage_omni", "pid",
}  # fmt: skip


def block_modules(model, kind):
    """Return the blocks of a tiny model in forward order."""
    modules = []
    for name in (JOINT | FIRST)[kind]:
        blocks = operator.attrgetter(name)(model.model.diffusion_model)
        modules.extend(blocks.values() if isinstance(blocks, torch.nn.ModuleDict) else blocks)
    return modules


def selector(model, kind, numbers):
    """Return blocks, counted over all lists, in the selector language."""
    lists = (JOINT | FIRST)[kind]
    if len(lists) == 1:
        return ",".join(map(str, numbers))
    parts = ("patch", "pixel") if kind in PIXELS else ("double", "single")
    first = len(getattr(model.model.diffusion_model, lists[0]))
    return ",".join(f"{parts[0]}.{n}" if n < first else f"{parts[1]}.{n - first}" for n in numbers)


@contextlib.contextmanager
def entered(model, kind):
    """Know in which block the network is, and at which attention call of it."""
    state = {"block": None, "call": -1, "runs": []}

    def enter(number):
        def before(*_):
            state.update(block=number, call=-1)
            state["runs"].append(number)

        return before

    def leave(*_):
        state.update(block=None, call=-1)

    handles = []
    for number, block in enumerate(block_modules(model, kind)):
        handles.append(block.register_forward_pre_hook(enter(number)))
        handles.append(block.register_forward_hook(leave))
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Seen:
    """One attention call: block, number of the call in it, queries as (batch, tokens, dim)."""

    block: int | None
    call: int
    query: torch.Tensor


@contextlib.contextmanager
def watched(model, kind):
    """Watch every attention call of runs of a model, as another node's override would."""
    seen = []
    with entered(model, kind) as state:

        def spy(func, *args, **kwargs):
            state["call"] += 1
            query = args[0].transpose(1, 2).flatten(2) if kwargs.get("skip_reshape") else args[0]
            seen.append(Seen(state["block"], state["call"], query.clone()))
            return func(*args, **kwargs)

        spied = model.clone()
        spied.model_options["transformer_options"][OVERRIDE] = spy
        yield spied, seen


@contextlib.contextmanager
def float64_rotary():
    """Let the plain implementation of rotary embeddings, which could, take float64."""
    try:
        from comfy_kitchen.registry import registry
    except ImportError:
        yield
        return
    changed = {}
    for (backend, _), constraints in registry._constraints.items():
        for param in constraints.params.values():
            if backend == "eager" and param.dtypes and torch.float32 in param.dtypes:
                changed[id(param)] = (param, param.dtypes)
                object.__setattr__(param, "dtypes", param.dtypes | {torch.float64})
    try:
        yield
    finally:
        for param, dtypes in changed.values():
            object.__setattr__(param, "dtypes", dtypes)


def without_refiners(model):
    """Keep a model's refiners from mixing tokens, so that a patch stays where it is."""
    network = model.model.diffusion_model
    for name in ("noise_refiner", "ref_image_refiner"):
        for layer in getattr(network, name, ()):
            out = layer.attention.out if hasattr(layer, "attention") else layer.attn.to_out[0]
            out.weight.data.zero_()
    return model


def shape_of(kind, size, *, frames=2, batch=1):
    """Return a latent's shape with two frames where the family has frames."""
    return latent_shape(kind, size, frames=frames if TINY[kind].frames else 1, batch=batch)


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


def blur_of(grid, sigma, kernel="reference"):
    """Return the dense blur of frames, each on its own."""
    frames, height, width = grid
    return torch.block_diag(*[blur_map(height, width, sigma, kernel)] * frames)


def found_rows(model, kind, shape, cond=None):
    """Return the image's rows in the queries of the first block, and the number of queries."""
    noise = varied(kind, shape)
    with watched(without_refiners(model), kind) as (spied, seen):
        sample_dit(spied, kind, noise.shape, steps=1, cfg=1.0, noise=noise, cond=cond)
    first = next(s for s in seen if s.block == 0)
    return image_rows(first.query), first.query.shape[1]


@dataclass
class DenseGuidance:
    """Guidance the slow way: whole maps of joint logits, blurred over the image's rows.

    Attributes:
        model: the model to guide.
        kind: its row in `TINY`.
        rows: the image's rows in the first block's queries.
        length: number of queries there.
        blur: dense blur of the image's rows; None draws the image's map to the identity instead.
        blocks: numbers of the perturbed blocks.
        scale: guidance weight.
        side: ``"cond"``, ``"uncond"`` or ``"free"``.
        strength: of the identity.
        heads: those that are changed; None for all.
        zero: the image's rows of the output become 0 instead.
    """

    model: object
    kind: str
    rows: list
    length: int
    blur: torch.Tensor | None
    blocks: list
    scale: float = 3.0
    side: str = "cond"
    strength: float = 1.0
    heads: list | None = None
    zero: bool = False

    def guided(self):
        """Return a guided clone."""
        model = self.model.clone()
        model.set_model_sampler_post_cfg_function(self._guide)
        return model

    def _guide(self, args):
        side = "uncond" if self.side == "free" else self.side
        options = args["model_options"].copy()
        with entered(self.model, self.kind) as state:

            def attention(func, *a, **k):
                state["call"] += 1
                if state["block"] in self.blocks and (self.kind in JOINT or state["call"] == 0):
                    return self._attention(*a, **k)
                return func(*a, **k)

            own = {**options["transformer_options"], OVERRIDE: attention}
            options["transformer_options"] = own
            (worse,) = comfy.samplers.calc_cond_batch(
                args["model"], [args[side]], args["input"], args["sigma"], options
            )
        cond = args["cond_denoised"]
        if self.side == "free":
            return worse + (args["cond_scale"] + self.scale) * (cond - worse)
        return args["denoised"] + self.scale * (args[side + "_denoised"] - worse)

    def _attention(self, query, key, value, heads=None, mask=None, **kwargs):
        if not kwargs.get("skip_reshape"):
            query, key, value = (
                t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (query, key, value)
            )
        key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
        shift = query.shape[2] - self.length if self.kind in FROM_END else 0
        rows = torch.tensor(self.rows) + shift
        logits = torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(query.shape[-1])
        chosen = range(heads) if self.heads is None else self.heads
        if self.blur is not None:
            for head in chosen:
                own = logits[:, head, rows]
                logits[:, head, rows] = torch.einsum("pt,btk->bpk", self.blur.to(logits), own)
        if mask is not None:
            logits = logits + _additive(mask, logits)
        out = torch.einsum("bhqk,bhkd->bhqd", torch.softmax(logits, dim=-1), value)
        own_values = value[:, :, value.shape[2] - out.shape[2] :]  # text may have no queries
        if self.zero:
            out[:, :, rows] = 0.0
        elif self.blur is None:
            for head in chosen:
                mixed = torch.lerp(out[:, head, rows], own_values[:, head, rows], self.strength)
                out[:, head, rows] = mixed
        return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


def _additive(mask, logits):
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=logits.dtype).masked_fill(~mask, -math.inf)
    return mask.reshape(-1, *[1] * (4 - mask.ndim), *mask.shape[1:])
