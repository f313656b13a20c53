"""How families of diffusion transformers lay an image out as tokens, and what they put beside."""

from __future__ import annotations

from typing import Any

from .....seg_core import TokenGrid
from ...batch.call import Call

Patch = tuple[int, int, int]


def patch_size(network: Any) -> Patch:
    """Return frames, rows and columns of latent cells in one token."""
    size = network.patch_size
    *frames, rows, columns = (size, size) if isinstance(size, int) else size
    return (frames[0] if frames else 1), rows, columns


def one_cell(_network: Any) -> Patch:
    """Return the patch of networks whose tokens are the latent's cells."""
    return 1, 1, 1


def cells_grid(call: Call, patch: Patch) -> TokenGrid:
    """Return the grid of an image or a video; the host pads to whole patches."""
    return grid_of(call.x.shape, patch)


def grid_of(shape: Any, patch: Patch) -> TokenGrid:
    """Return the token grid of a latent's shape."""
    frames = shape[2] if len(shape) == 5 else 1
    return TokenGrid(-(-frames // patch[0]), -(-shape[-2] // patch[1]), -(-shape[-1] // patch[2]))


def references(call: Call, patch: Patch, name: str = "ref_latents") -> int:
    """Return the number of tokens of a call's reference images."""
    images = call.extra.get(name) or ()
    return sum(grid_of(image.shape, patch).tokens for image in images)


def each_frame_alone(call: Call, patch: Patch) -> TokenGrid:
    """Return the grid of one frame: the others are images of their own."""
    return grid_of((*call.x.shape[:2], *call.x.shape[-2:]), patch)


def _video(call: Call, patch: Patch) -> TokenGrid:
    """Return the grid of a video, also of one that shares the latent with its sound."""
    shapes = call.extra.get("latent_shapes")
    return grid_of(call.x.shape if shapes is None else shapes[0], patch)


def without_guides(call: Call, patch: Patch) -> TokenGrid:
    """Return the grid of a video without the guide frames at its end: they are given, not made."""
    video = _video(call, patch)
    guides = call.extra.get("keyframe_idxs")
    frames = 0 if guides is None else -(-guides.shape[2] // video.cells)
    return TokenGrid(max(video.frames - frames, 1), video.height, video.width)


def without_tail(call: Call, patch: Patch) -> TokenGrid:
    """Return the grid of a video whose latent may end with a reference frame."""
    video = _video(call, patch)
    tail = bool(call.extra.get("k6_reference_tail"))
    return TokenGrid(video.frames - tail, video.height, video.width)


def reference_tail(network: Any, call: Call) -> int:
    """Return the number of tokens of a reference frame behind the video, of the latent or not."""
    reference = call.extra.get("k6_reference")
    video = _video(call, patch_size(network))
    if reference is not None:
        return grid_of(reference.shape, patch_size(network)).tokens
    return video.cells if call.extra.get("k6_reference_tail") else 0


def reference_patches(_network: Any, call: Call, _grid: TokenGrid) -> int:
    """Return the number of tokens of reference pictures, which the host cuts into patches."""
    patches = call.extra.get("ref_patches")
    return 0 if patches is None else patches.shape[1]


def _to_fill(network: Any, tokens: int) -> int:
    """Return the number of tokens that fill a part of the sequence up."""
    return -tokens % (getattr(network, "pad_tokens_multiple", None) or 1)


def frames_and_padding(network: Any, call: Call, grid: TokenGrid) -> int:
    """Return the number of tokens of reference frames, and of those that fill the sequence up."""
    frames = references(call, patch_size(network), "ref_frames")
    return frames + _to_fill(network, grid.tokens + frames)


def padded_prompt(network: Any, call: Call) -> int | None:
    """Return the number of tokens of the prompt; None with reference images, which bring more."""
    if call.c_crossattn is None or call.extra.get("ref_latents"):
        return None
    tokens = call.c_crossattn.shape[1]
    extra = call.extra.get("direct_context")
    tokens += 0 if extra is None else extra.shape[1]
    return tokens + _to_fill(network, tokens)


def prompt_and_references(network: Any, call: Call) -> int:
    """Return the number of tokens of the prompt and of reference images."""
    prompt = 0 if call.c_crossattn is None else call.c_crossattn.shape[1]
    return prompt + references(call, one_cell(network))


def none(*_: Any) -> int:
    """Return the number of tokens beside the image where it alone attends to itself."""
    return 0


def reference_image(network: Any, call: Call, _grid: TokenGrid) -> int:
    """Return the number of tokens of a reference image."""
    reference = call.extra.get("reference_latent")
    if reference is None or network.ref_conv is None:
        return 0
    _, rows, columns = patch_size(network)
    return (reference.shape[-2] // rows) * (reference.shape[-1] // columns)


def reference_frames(network: Any, call: Call, grid: TokenGrid) -> int:
    """Return the number of tokens of reference frames."""
    reference = call.extra.get("reference_latent")
    if reference is None:
        return 0
    return -(-reference.shape[2] // patch_size(network)[0]) * grid.cells


def image_beside(network: Any, call: Call, grid: TokenGrid) -> int:
    """Return the tokens of a row, of the image and of the one beside it."""
    beside = call.extra.get("image_cond")
    if beside is None:
        return grid.width
    return -(-(call.x.shape[-1] + beside.shape[-1]) // patch_size(network)[2])
