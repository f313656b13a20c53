"""The families of diffusion transformers: one row for each, and nothing that is done to them.

Networks are known by the name of their class, so a ComfyUI without a family still imports this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from .....seg_core import TokenGrid
from ...calls.blocks import OUTPUT, Axes
from ...calls.call import Call

Patch = tuple[int, int, int]


def patch_size(network: Any) -> Patch:
    """Return frames, rows and columns of latent cells in one token."""
    size = network.patch_size
    *frames, rows, columns = (size, size) if isinstance(size, int) else size
    return (frames[0] if frames else 1), rows, columns


def one_cell(_network: Any) -> Patch:
    """Return the patch of networks whose tokens are the latent's cells."""
    return 1, 1, 1


def cells_grid(network: Any, call: Call, patch: Patch) -> TokenGrid:
    """Return the grid of an image or a video; the host pads to whole patches."""
    del network
    return grid_of(call.x.shape, patch)


def grid_of(shape: Any, patch: Patch) -> TokenGrid:
    """Return the token grid of a latent's shape."""
    frames = shape[2] if len(shape) == 5 else 1
    return TokenGrid(-(-frames // patch[0]), -(-shape[-2] // patch[1]), -(-shape[-1] // patch[2]))


def references(call: Call, patch: Patch) -> int:
    """Return the number of tokens of a call's reference images."""
    images = call.extra.get("ref_latents") or ()
    return sum(grid_of(image.shape, patch).tokens for image in images)


def _each_frame_alone(network: Any, call: Call, patch: Patch) -> TokenGrid:
    del network
    return grid_of((*call.x.shape[:2], *call.x.shape[-2:]), patch)


def _without_guides(network: Any, call: Call, patch: Patch) -> TokenGrid:
    # Guide frames are appended to the video; they are given, not generated.
    del network
    shapes = call.extra.get("latent_shapes")  # of audio-video models, whose x is packed
    video = grid_of(call.x.shape if shapes is None else shapes[0], patch)
    guides = call.extra.get("keyframe_idxs")
    frames = 0 if guides is None else -(-guides.shape[2] // video.cells)
    return TokenGrid(max(video.frames - frames, 1), video.height, video.width)


def _no_tokens(network: Any, call: Call, grid: TokenGrid) -> int:
    del network, call, grid
    return 0


def _one_token(network: Any, call: Call, grid: TokenGrid) -> int:
    del network, call, grid
    return 1


def _padding(network: Any, call: Call, grid: TokenGrid) -> int:
    del call
    return -grid.tokens % (getattr(network, "pad_tokens_multiple", None) or 1)


def _reference_image(network: Any, call: Call, grid: TokenGrid) -> int:
    del grid
    reference = call.extra.get("reference_latent")
    if reference is None or network.ref_conv is None:
        return 0
    _, rows, columns = patch_size(network)
    return (reference.shape[-2] // rows) * (reference.shape[-1] // columns)


def _reference_frames(network: Any, call: Call, grid: TokenGrid) -> int:
    reference = call.extra.get("reference_latent")
    if reference is None:
        return 0
    return -(-reference.shape[2] // patch_size(network)[0]) * grid.cells


def _image_beside(network: Any, call: Call, grid: TokenGrid) -> int:
    beside = call.extra.get("image_cond")
    if beside is None:
        return grid.width
    return -(-(call.x.shape[-1] + beside.shape[-1]) // patch_size(network)[2])


def _only_image(network: Any, call: Call, grid: TokenGrid) -> int:
    del network, call
    return grid.width


def _none(_call: Call) -> str:
    return ""


def _one_reference(call: Call) -> str:
    if call.extra.get("ref_latent") is None:
        return ""
    return "ComfyUI takes this reference image for one picture at a time"


@dataclass(frozen=True, eq=False)
class Family:
    """How one family of networks lays out its tokens and names its blocks.

    Attributes:
        name: the models that users know.
        network: module below ``comfy.ldm`` and name of the class; subclasses belong to it.
        parts: name of each list of blocks -> attribute of the network, in forward order.
        anchor: the end of the queries' sequence that the image's tokens are counted from.
        patch: the network's patch.
        grid: token grid of a call; the image is always frame by frame in row-major order.
        beside: tokens between the anchor and the image. Reference images that the host counts in
            ``reference_image_num_tokens`` stand at the end and are added.
        references: older hosts put them there too, uncounted.
        row: tokens from one row of the image to the next.
        first_only: only a block's first attention call is self-attention of the image.
        cached_keys: keys of tokens without queries come before the queries' own.
        axes: where rows are not the first axis of what goes into a block or comes out of it.
        shared: attributes of the network that no perturbation reaches, and take rows alone.
        obstacle: why a call cannot take more rows; empty if it can.
        auto: tenths of the depth between which `auto` chooses, all parts as one list.
        unsupported: why nothing can be perturbed; empty if something can.
    """

    name: str
    network: str
    parts: dict[str, str] = field(default_factory=dict)
    anchor: Literal["start", "end"] = "end"
    patch: Callable[[Any], Patch] = patch_size
    grid: Callable[[Any, Call, Patch], TokenGrid] = cells_grid
    beside: Callable[[Any, Call, TokenGrid], int] = _no_tokens
    references: bool = False
    row: Callable[[Any, Call, TokenGrid], int] = _only_image
    first_only: bool = False
    cached_keys: bool = False
    axes: Axes = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    obstacle: Callable[[Call], str] = _none
    auto: tuple[int, int] = (3, 4)
    unsupported: str = ""


def auto_range(family: Family, depth: int) -> range:
    """Return the blocks that `auto` means, counted over all parts of a network of this depth."""
    first, last = (tenths * depth // 10 for tenths in family.auto)
    return range(first, min(last, depth - 1) + 1)


_TWO = {"double": "double_blocks", "single": "single_blocks"}
_WAN = {
    "parts": {"double": "blocks"},
    "anchor": "start",
    "first_only": True,
    "shared": ("patch_embedding", "vace_patch_embedding", "vace_blocks"),
}
_LTX = {
    "parts": {"double": "transformer_blocks"},
    "anchor": "start",
    "grid": _without_guides,
    "first_only": True,
}
_COSMOS_1 = {"x": 3, "crossattn_emb": 1, OUTPUT: 3}
_NO_OPTIONS = "its attention is out of reach: it does not pass on the host's options"

FAMILIES = (
    Family("Flux, Flux.2, LongCat-Image", "flux.model.Flux", _TWO, references=True),
    Family("Chroma, Chroma Radiance", "chroma.model.Chroma", _TWO),
    Family("SD3, SD3.5", "modules.diffusionmodules.mmdit.MMDiT", {"double": "joint_blocks"}),
    Family("AuraFlow", "aura.mmdit.MMDiT",
           {"double": "double_layers", "single": "single_layers"}),
    Family("Qwen-Image, Qwen-Image-Edit", "qwen_image.model.QwenImageTransformer2DModel",
           {"double": "transformer_blocks"}, references=True),
    Family("Lumina 2, Z-Image, NewBie", "lumina.model.NextDiT", {"double": "layers"},
           beside=_padding, shared=("context_refiner", "noise_refiner")),
    Family("HunyuanVideo, HunyuanImage", "hunyuan_video.model.HunyuanVideo", _TWO,
           obstacle=_one_reference),
    Family("Wan", "wan.model.WanModel", beside=_reference_image, **_WAN),
    Family("Wan SCAIL", "wan.model.SCAILWanModel", beside=_reference_frames, **_WAN),
    Family("LTX-Video", "lightricks.model.LTXVModel", patch=one_cell, **_LTX),
    Family("LTX-2", "lightricks.av_model.LTXAVModel", patch=one_cell, **_LTX),
    Family("Cosmos-Predict2, Anima", "cosmos.predict2.MiniTrainDIT", {"double": "blocks"},
           anchor="start", patch=lambda n: (n.patch_temporal, n.patch_spatial, n.patch_spatial),
           first_only=True),
    Family("Cosmos 1", "cosmos.model.GeneralDIT", {"block": "blocks"}, anchor="start",
           patch=lambda n: (n.patch_temporal, n.patch_spatial, n.patch_spatial), first_only=True,
           axes=_COSMOS_1),
    Family("Kandinsky 5", "kandinsky5.model.Kandinsky5", {"double": "visual_transformer_blocks"},
           anchor="start", first_only=True),
    Family("Krea 2", "krea2.model.SingleStreamDiT", {"single": "blocks"},
           patch=lambda n: (1, n.patch, n.patch), grid=_each_frame_alone),
    Family("Lens", "lens.model.LensTransformer2DModel", {"double": "transformer_blocks"},
           anchor="start", patch=one_cell),
    Family("JoyImage", "joyimage.model.JoyImageTransformer3DModel", {"double": "double_blocks"},
           anchor="start"),
    Family("Mage-Flow", "mage_flow.model.MageFlowTransformer2DModel",
           {"double": "transformer_blocks"}, patch=one_cell),
    Family("HiDream-I1, HiDream-E1", "hidream.model.HiDreamImageTransformer2DModel",
           {"double": "double_stream_blocks", "single": "single_stream_blocks"}, anchor="start",
           row=_image_beside),
    Family("HiDream-O1", "hidream_o1.model.HiDreamO1Transformer",
           {"double": "language_model.layers"}, anchor="start", beside=_one_token,
           cached_keys=True),
    Family("OmniGen2", "omnigen.omnigen2.OmniGen2Transformer2DModel", {"block": "layers"}),
    Family("Boogu", "boogu.model.BooguTransformer2DModel",
           {"double": "double_stream_layers", "single": "single_stream_layers"}),
    Family("CogVideoX", "cogvideo.model.CogVideoXTransformer3DModel", {"block": "blocks"},
           patch=lambda n: (n.patch_size_t or 1, n.patch_size, n.patch_size)),
    Family("Ideogram 4", "ideogram4.model.Ideogram4Transformer2DModel", {"block": "layers"},
           patch=one_cell),
    Family("PixelDiT, PiD", "pixeldit.model.PixDiT_T2I",
           {"patch": "patch_blocks", "pixel": "pixel_blocks"}),
    Family("Mochi", "genmo.joint_model.asymm_models_joint.AsymmDiTJoint", {"double": "blocks"},
           anchor="start"),
    Family("PixArt", "pixart.pixartms.PixArtMS", unsupported=_NO_OPTIONS),
    Family("HunyuanDiT", "hydit.models.HunYuanDiT", unsupported=_NO_OPTIONS),
    Family("ERNIE-Image", "ernie.model.ErnieImageModel", unsupported=_NO_OPTIONS),
    Family("SeedVR2", "seedvr.model.NaDiT", unsupported=_NO_OPTIONS),
    Family("MiniMax H3", "minimax.model.MiniMaxH3Model",
           unsupported="it packs several media into one sequence, which is not implemented"),
    Family("Wan autoregressive", "wan.ar_model.CausalWanModel",
           unsupported="each evaluation moves its cache of past frames on, so there can be no "
           "second one"),
)  # fmt: skip
