"""The families of diffusion transformers: one row for each, and nothing that is done to them.

Networks are known by the name of their class, so a ComfyUI without a family still imports this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from .....seg_core import TokenGrid
from ...batch.call import Call
from ...batch.network_call import Axes
from ...batch.widening import OUTPUT
from ..blocks import Carried
from .grids import (
    Patch,
    cells_grid,
    each_frame_alone,
    frames_and_padding,
    image_beside,
    none,
    one_cell,
    padded_prompt,
    patch_size,
    prompt_and_references,
    reference_frames,
    reference_image,
    reference_patches,
    reference_tail,
    without_guides,
    without_tail,
)


def _one_reference(call: Call) -> str:
    if call.extra.get("ref_latent") is None:
        return ""
    return "ComfyUI takes this reference image for one picture at a time"


def _kept_prompt(call: Call) -> str:
    setting = call.options.get("qwen_image21_cache", {})
    if not call.model.diffusion_model.prefix_cache_enabled or setting.get("device") == "off":
        return ""
    return "ComfyUI keeps the keys of the prompt for all rows of a call"


@dataclass(frozen=True, eq=False)
class Family:
    """How one family of networks lays out its tokens and names its blocks.

    Attributes:
        name: the models that users know.
        network: module below ``comfy.ldm`` and name of the class.
        variants: subclasses with methods of their own for which the row is right, likewise.
        parts: name of each list of blocks -> attribute of the network, in forward order.
        carried: name of the list -> which arguments of a block become its result, where known.
        video: it makes videos, whose frames attend to each other.
        skip: blocks of a network that are usually skipped, all parts as one list; empty for `auto`.
        anchor: the end of the queries' sequence that the image's tokens are counted from.
        patch: the network's patch.
        grid: token grid of a call; the image is always frame by frame in row-major order.
        beside: tokens between the anchor and the image. Reference images that the host counts in
            ``reference_image_num_tokens`` stand at the end and are added.
        references: older hosts put them there too, uncounted.
        others: how many tokens are not the image's, nor counted by ``beside``, where it is known.
        row: tokens from one row of the image to the next.
        first_only: only a block's first attention call is self-attention of the image.
        prefix: tokens before the image where a block attends to each part of the sequence in a call
            of its own, which sees all before it; None where it attends to all in one call.
        cached_keys: keys of tokens without queries come before the queries' own.
        axes: where rows are not the first axis of what goes into a block or comes out of it.
        shared: attributes of the network that no perturbation reaches, and take rows alone.
        obstacle: why a call cannot take more rows; empty if it can.
        unsupported: why nothing can be perturbed; empty if something can.
    """

    name: str
    network: str
    parts: dict[str, str] = field(default_factory=dict)
    carried: dict[str, Carried] = field(default_factory=dict)
    variants: tuple[str, ...] = ()
    video: bool = False
    skip: Callable[[Any], tuple[int, ...]] = lambda _network: ()
    anchor: Literal["start", "end"] = "end"
    patch: Callable[[Any], Patch] = patch_size
    grid: Callable[[Call, Patch], TokenGrid] = cells_grid
    beside: Callable[[Any, Call, TokenGrid], int] = lambda *_: 0
    references: bool = False
    others: Callable[[Any, Call], int | None] = lambda *_: None
    row: Callable[[Any, Call, TokenGrid], int] = lambda _network, _call, grid: grid.width
    first_only: bool = False
    prefix: Callable[[Any, Call], int | None] = lambda *_: None
    cached_keys: bool = False
    axes: Axes = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    obstacle: Callable[[Call], str] = lambda _call: ""
    unsupported: str = ""


def auto_range(depth: int) -> range:
    """Return the blocks that `auto` means in a network of this depth, counted over all parts."""
    return range(3 * depth // 10, 4 * depth // 10 + 1)


_TWO = {"double": "double_blocks", "single": "single_blocks"}
_X = Carried(("x",), "x")
_HIDDEN = "hidden_states"
_IMG_TXT = {"double": Carried(("img", "txt"), "img"), "single": _X}
_TXT_HIDDEN = {"double": Carried(("encoder_hidden_states", _HIDDEN), _HIDDEN)}
_HIDDEN_TXT = Carried((_HIDDEN, "encoder_hidden_states"), _HIDDEN)
_ONE = Carried((_HIDDEN,), _HIDDEN)
_WAN = {
    "parts": {"double": "blocks"},
    "carried": {"double": _X},
    "video": True,
    "skip": lambda _network: (10,),
    "anchor": "start",
    "first_only": True,
    "shared": ("patch_embedding", "vace_patch_embedding", "vace_blocks"),
}
_WANS = (
    "wan.model.VaceWanModel",
    "wan.model.CameraWanModel",
    "wan.model.HumoWanModel",
    "wan.model.WanModel_S2V",
    "wan.model_animate.AnimateWanModel",
    "wan.model_wandancer.WanDancerModel",
)
_LTX = {
    "parts": {"double": "transformer_blocks"},
    "carried": {"double": _X},
    "video": True,
    "anchor": "start",
    "grid": without_guides,
    "first_only": True,
}
_COSMOS_1 = {"x": 3, "crossattn_emb": 1, OUTPUT: 3, "rope_emb_L_1_1_D": None}
_NO_OPTIONS = "its attention is out of reach: it does not pass on the host's options"
_NOT_CALLED = "ComfyUI runs its blocks without calling them, so they cannot be changed"

FAMILIES = (
    Family("Flux, Flux.2, LongCat-Image", "flux.model.Flux", _TWO, _IMG_TXT, references=True),
    Family("Chroma, Chroma Radiance", "chroma.model.Chroma", _TWO, _IMG_TXT,
           variants=("chroma_radiance.model.ChromaRadiance",)),
    Family("SD3, SD3.5", "modules.diffusionmodules.mmdit.MMDiT", {"double": "joint_blocks"},
           {"double": Carried(("argument 0", "argument 1"), "argument 1")},
           variants=("modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",),
           skip=lambda _network: (7, 8, 9)),
    Family("AuraFlow", "aura.mmdit.MMDiT",
           {"double": "double_layers", "single": "single_layers"},
           {"double": Carried(("c", "x"), "x"), "single": Carried(("cx",), "cx")}),
    Family("Qwen-Image, Qwen-Image-Edit", "qwen_image.model.QwenImageTransformer2DModel",
           {"double": "transformer_blocks"}, _TXT_HIDDEN, references=True),
    Family("Qwen-Image 2.1", "qwen_image21.model.QwenImage21Transformer2DModel",
           {"single": "transformer_blocks"}, {"single": _X}, patch=one_cell,
           prefix=prompt_and_references, cached_keys=True, obstacle=_kept_prompt),
    Family("Lumina 2, Z-Image, NewBie", "lumina.model.NextDiT", {"double": "layers"},
           {"double": _X}, variants=("lumina.model.NextDiTPixelSpace",), beside=frames_and_padding,
           others=padded_prompt, shared=("context_refiner", "noise_refiner")),
    Family("HunyuanVideo, HunyuanImage", "hunyuan_video.model.HunyuanVideo", _TWO, _IMG_TXT,
           video=True, obstacle=_one_reference),
    Family("Wan", "wan.model.WanModel", beside=reference_image, variants=_WANS, **_WAN),
    Family("Wan SCAIL", "wan.model.SCAILWanModel", beside=reference_frames, **_WAN),
    Family("LTX-Video", "lightricks.model.LTXVModel", patch=one_cell,
           skip=lambda _network: (14, 19), **_LTX),
    Family("LTX-2", "lightricks.av_model.LTXAVModel", patch=one_cell,
           skip=lambda network: (28,) if network.caption_proj_before_connector else (29,), **_LTX),
    Family("Cosmos-Predict2, Anima", "cosmos.predict2.MiniTrainDIT", {"double": "blocks"},
           {"double": Carried(("x_B_T_H_W_D",), "x_B_T_H_W_D")},
           variants=("anima.model.Anima",), video=True, anchor="start", others=none,
           patch=lambda n: (n.patch_temporal, n.patch_spatial, n.patch_spatial), first_only=True),
    Family("Cosmos 1", "cosmos.model.GeneralDIT", {"block": "blocks"}, {"block": _X}, video=True,
           anchor="start", others=none, first_only=True, axes=_COSMOS_1,
           patch=lambda n: (n.patch_temporal, n.patch_spatial, n.patch_spatial)),
    Family("Kandinsky 5", "kandinsky5.model.Kandinsky5", {"double": "visual_transformer_blocks"},
           {"double": Carried(("visual_embed",), "visual_embed")}, video=True, anchor="start",
           others=none, first_only=True),
    Family("Kandinsky 6", "kandinsky6.model.Kandinsky6NativeAVDiT", {"double": "visual_blocks"},
           {"double": Carried(("visual_embed", "audio_embed"), "visual_embed")}, video=True,
           anchor="start", grid=without_tail, others=reference_tail, first_only=True),
    Family("Krea 2", "krea2.model.SingleStreamDiT", {"single": "blocks"}, {"single": _X},
           patch=lambda n: (1, n.patch, n.patch), grid=each_frame_alone),
    Family("Lens", "lens.model.LensTransformer2DModel", {"double": "transformer_blocks"},
           _TXT_HIDDEN, anchor="start", patch=one_cell),
    Family("JoyImage", "joyimage.model.JoyImageTransformer3DModel", {"double": "double_blocks"},
           {"double": _HIDDEN_TXT}, anchor="start"),
    Family("Mage-Flow", "mage_flow.model.MageFlowTransformer2DModel",
           {"double": "transformer_blocks"}, _TXT_HIDDEN, patch=one_cell),
    Family("HiDream-I1, HiDream-E1", "hidream.model.HiDreamImageTransformer2DModel",
           {"double": "double_stream_blocks", "single": "single_stream_blocks"},
           {"double": Carried(("image_tokens", "text_tokens"), "image_tokens"),
            "single": Carried(("image_tokens",), "image_tokens")}, anchor="start",
           row=image_beside),
    Family("HiDream-O1", "hidream_o1.model.HiDreamO1Transformer",
           {"double": "language_model.layers"}, beside=reference_patches, cached_keys=True),
    Family("OmniGen2", "omnigen.omnigen2.OmniGen2Transformer2DModel", {"block": "layers"},
           {"block": _ONE}),
    Family("Boogu", "boogu.model.BooguTransformer2DModel",
           {"double": "double_stream_layers", "single": "single_stream_layers"},
           {"double": Carried(("img_hidden_states", "instruct_hidden_states"),
                              "img_hidden_states"), "single": _ONE}),
    Family("CogVideoX", "cogvideo.model.CogVideoXTransformer3DModel", {"block": "blocks"},
           {"block": _HIDDEN_TXT}, video=True, axes={"image_rotary_emb": None},
           patch=lambda n: (n.patch_size_t or 1, n.patch_size, n.patch_size)),
    Family("Ideogram 4", "ideogram4.model.Ideogram4Transformer2DModel", {"block": "layers"},
           {"block": _X}, patch=one_cell),
    Family("PixelDiT, PiD", "pixeldit.model.PixDiT_T2I",
           {"patch": "patch_blocks", "pixel": "pixel_blocks"},
           {"patch": Carried(("x", "y"), "x"), "pixel": Carried(("x",), None)},
           variants=("pixeldit.pid.PidNet",), axes={"pos_img": None, "pos_txt": None}),
    Family("Mochi", "genmo.joint_model.asymm_models_joint.AsymmDiTJoint", {"double": "blocks"},
           {"double": Carried(("x", "y"), "x")}, video=True, anchor="start",
           axes={"rope_cos": None, "rope_sin": None}),
    Family("PixArt", "pixart.pixartms.PixArtMS", unsupported=_NO_OPTIONS),
    Family("HunyuanDiT", "hydit.models.HunYuanDiT", unsupported=_NO_OPTIONS),
    Family("ERNIE-Image", "ernie.model.ErnieImageModel", unsupported=_NO_OPTIONS),
    Family("SeedVR2", "seedvr.model.NaDiT", unsupported=_NO_OPTIONS),
    Family("MiniMax H3", "minimax.model.MiniMaxH3Model",
           unsupported="it packs several media into one sequence, which is not implemented"),
    Family("Wan Animate 2", "wan.model_animate2.WanAnimate2Model",
           unsupported=_NOT_CALLED),
    Family("SenseNova U1.5", "sensenova.model.SenseNovaU15", unsupported=_NOT_CALLED),
    Family("Prism", "prism.model.Prism",
           unsupported="its sparse attention is its own, which ComfyUI cannot override"),
    Family("Wan autoregressive", "wan.ar_model.CausalWanModel",
           unsupported="each evaluation moves its cache of past frames on, so there can be no "
           "second one"),
)  # fmt: skip
