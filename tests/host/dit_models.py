"""Tiny diffusion transformers of ComfyUI's true classes: one row for each network under test."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as supported
import dit_networks as nets
import dit_variants as more
import torch
from comfy.ldm.lightricks.model import LTXVModel
from comfy.nested_tensor import NestedTensor
from host_models import noise_like, randomise, sample


@dataclass(frozen=True)
class Tiny:
    """How to build one tiny model, and what it is sampled with.

    Attributes:
        config: name of the host's model class.
        network: arguments of the network.
        channels: of the latent.
        video: the latent has frames.
        unit: latent cells along one side of a token.
        text: width of the prompt's embedding.
        pooled: width of the pooled prompt.
        cond: what else the conditioning holds; callables are given the latent's shape, and the
            prompt's seed if they take it.
        refs: the conditioning's reference images, as `cond`; empty if the family takes none.
        odd: it takes sizes that are not whole patches.
        frames: it takes more than one frame.
        sound: frames of sound that share the latent.
    """

    config: str
    network: dict
    channels: int = 16
    video: bool = False
    unit: int = 2
    text: int = 24
    pooled: int = 32
    cond: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)
    odd: bool = True
    frames: bool | None = None
    sound: int = 0

    def __post_init__(self):
        if self.frames is None:
            object.__setattr__(self, "frames", self.video)


def _references(shape):
    """Two reference images, neither of them of the image's size."""
    cells = [n * 2 for n in shape[-2:]]
    frame = (1,) * (len(shape) - 4)
    sizes = [(cells[0], shape[-1]), (shape[-2], cells[1])]
    return [noise_like((1, shape[1], *frame, *s), 50 + n) for n, s in enumerate(sizes)]


def _one_reference(shape):
    return [noise_like((1, *shape[1:]), 52)]


def _one_frame(shape):
    return [noise_like((1, shape[1], 1, *shape[-2:]), 53)]


def _beside(shape):
    return noise_like((1, *shape[1:]), 54)


REFS = {"reference_latents": _references}
FRAME = {"reference_latents": more.first_frame}


def _llama(shape):
    del shape
    return noise_like((1, 3, 7, 24), 41)


TINY = {
    "flux": Tiny("Flux", nets.FLUX, refs=REFS),
    "flux2": Tiny("Flux2", nets.FLUX2, channels=128, unit=1, refs=REFS),
    "longcat": Tiny("LongCatImage", nets.FLUX | more.LONGCAT, refs=REFS),
    "chroma": Tiny("Chroma", nets.CHROMA),
    "radiance": Tiny("ChromaRadiance", nets.RADIANCE, channels=3, unit=16),
    "sd3": Tiny("SD3", nets.SD3),
    "aura": Tiny("AuraFlow", nets.AURA, channels=4),
    "qwen": Tiny("QwenImage", nets.QWEN, video=True, refs=REFS),
    "qwen_no_noise": Tiny("QwenImage", nets.QWEN | more.NO_NOISE, video=True, refs=REFS),
    "mage": Tiny("MageFlow", nets.MAGE, channels=128, unit=1, refs=REFS),
    "lumina2": Tiny("Lumina2", nets.LUMINA),
    "zimage": Tiny("ZImage", nets.Z_IMAGE),
    "zimage_omni": Tiny("ZImage", nets.Z_IMAGE | more.OMNI, odd=False,
                        refs=REFS | {"reference_latents_text_embeds": more.captions,
                                     "clip_vision_outputs": more.seen}),
    "hunyuan_video": Tiny("HunyuanVideo", nets.HUNYUAN, video=True, odd=False,
                          refs={"ref_latent": lambda shape: _one_frame(shape)[0]}),
    "hunyuan_image": Tiny("HunyuanImage21", nets.HUNYUAN_IMAGE, channels=64, unit=1),
    "wan": Tiny("WAN21_T2V", nets.WAN, video=True),
    "wan_ref": Tiny("WAN21_FunControl2V", nets.WAN | {"in_dim_ref_conv": 16}, video=True,
                    refs={"reference_latents": _one_frame}),
    "wan_vace": Tiny("WAN21_Vace", nets.WAN | {"model_type": "vace", "vace_layers": 2,
                                          "vace_in_dim": 96}, video=True, odd=False),
    "wan_camera": Tiny("WAN21_Camera", nets.WAN | {"model_type": "camera"}, video=True),
    "wan_scail": Tiny("WAN21_SCAIL", nets.WAN | {"in_dim": 20}, video=True,
                      refs={"reference_latents": _one_frame}),
    "wan_scail2": Tiny("WAN21_SCAIL2", nets.WAN | {"in_dim": 20}, video=True, odd=False,
                       cond={"pose_video_latent": more.pose_of_scail,
                             "driving_mask_28ch": more.identities},
                       refs={"reference_latents": _one_frame,
                             "ref_mask_28ch": lambda shape: more.identities(shape, 1)}),
    "wan_humo": Tiny("WAN21_HuMo", nets.WAN | more.WAN_HUMO, video=True, refs=FRAME,
                     cond={"audio_embed": more.speech}),
    "wan_s2v": Tiny("WAN22_S2V", nets.WAN | more.WAN_S2V, video=True,
                    cond={"audio_embed": more.voice},
                    refs=FRAME | {"reference_motion": more.motion}),
    "wan_animate": Tiny("WAN22_Animate", nets.WAN | more.WAN_ANIMATE, video=True,
                        cond={"pose_video_latent": more.pose, "face_video_pixels": more.face}),
    "wan_dancer": Tiny("WAN22_WanDancer", nets.WAN | more.WAN_DANCER, video=True),
    "wan_bernini": Tiny("WAN21_T2V", nets.WAN, video=True, refs={"context_latents": more.streams}),
    "ltx2": Tiny("LTXAV", more.LTX_2, channels=128, video=True, unit=1, text=48, sound=5),
    "ltx2_silent": Tiny("LTXAV", more.LTX_2_3, channels=128, video=True, unit=1, text=48),
    "ltxv": Tiny("LTXV", nets.LTXV, channels=128, video=True, unit=1,
                 cond={"attention_mask": more.all_tokens}),
    "cosmos2": Tiny("CosmosT2IPredict2", nets.COSMOS, video=True),
    "anima": Tiny("Anima", nets.COSMOS, video=True),
    "cosmos1": Tiny("CosmosT2V", nets.COSMOS_1, video=True, odd=False),
    "kandinsky5": Tiny("Kandinsky5", nets.KANDINSKY, video=True, odd=False),
    "krea2": Tiny("Krea2", nets.KREA, video=True, frames=False, refs=REFS),
    "krea2_no_noise": Tiny("Krea2", nets.KREA | more.NO_NOISE, video=True, frames=False, refs=REFS),
    "lens": Tiny("Lens", nets.LENS, channels=128, unit=1),
    "joyimage": Tiny("JoyImage", nets.JOY, video=True, refs=REFS),
    "hidream": Tiny("HiDream", nets.HIDREAM, cond={"conditioning_llama3": _llama},
                    refs={"concat_latent_image": _beside}),
    "hidream_o1": Tiny("HiDreamO1", more.HIDREAM_O1, channels=3, unit=32, odd=False,
                       cond={"text_input_ids": more.text_ids},
                       refs={"reference_latents": more.picture}),
    "omnigen2": Tiny("Omnigen2", nets.OMNIGEN, cond={"attention_mask": more.all_tokens}, refs=REFS),
    "boogu": Tiny("Boogu", nets.BOOGU, cond={"attention_mask": more.all_tokens}, refs=REFS),
    "cogvideox": Tiny("CogVideoX_T2V", nets.COG, video=True),
    "ideogram4": Tiny("Ideogram4", nets.IDEOGRAM, channels=128, unit=1),
    "pixeldit": Tiny("PixelDiTT2I", nets.PIXELDIT, channels=3, unit=16),
    "pid": Tiny("PiD", nets.PIXELDIT | more.PID, channels=3, unit=16,
                cond={"lq_latent": more.low_quality, "degrade_sigma": torch.tensor([0.3])}),
    "mochi": Tiny("GenmoMochi", nets.MOCHI, channels=12, video=True, odd=False,
                  cond={"attention_mask": more.all_tokens}),
}  # fmt: skip
if hasattr(LTXVModel, "keyframes_abs_pos_mask"):  # newer than the pinned versions
    TINY["ltx2_keyframes"] = replace(TINY["ltx2_silent"], network=more.LTX_2_4)

# They share a network's class with another kind: a few tests of each are enough.
VARIANTS = {
    "anima", "longcat", "qwen_no_noise", "krea2_no_noise", "zimage_omni", "pid", "ltx2_silent",
    "ltx2_keyframes",
    "wan_scail2", "wan_humo", "wan_s2v", "wan_animate", "wan_dancer", "wan_bernini",
}  # fmt: skip


def available(kind):
    """Tell whether this ComfyUI has a family."""
    return hasattr(supported, TINY[kind].config)


ALL = [kind for kind in TINY if available(kind) and kind != "anima"]  # slow; as cosmos2
KINDS = [kind for kind in ALL if kind not in VARIANTS]


def tiny_dit(kind, *, seed=0, dtype=torch.float32, **changes):
    """Return a `ModelPatcher` around a tiny network with seeded weights."""
    tiny = TINY[kind]
    network = tiny.network | changes
    config_class = getattr(supported, tiny.config)
    config = config_class({"image_model": None, **network})
    config.unet_config = {**network, "dtype": dtype}
    config.manual_cast_dtype = None
    torch.manual_seed(seed)
    model = config.get_model({})
    model.to(dtype)
    for name, module in model.diffusion_model.named_modules():
        if name.startswith(("patch_embedding", "vace_patch_embedding")):
            module.float()  # as the host calls it
    more.shrink(model.diffusion_model)
    randomise(model.diffusion_model, seed)
    more.sharpen(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=torch.device("cpu"),
    )


def latent_shape(kind, size=(4, 6), *, frames=1, batch=1):
    """Return the latent's shape for a grid of tokens; sizes may be halves of a token."""
    tiny = TINY[kind]
    rows, columns = (int(n * tiny.unit) for n in size)
    cells = (frames, rows, columns) if tiny.video else (rows, columns)
    return (batch, tiny.channels, *cells)


def prompt(kind, shape, seed=1, *, tokens=7, **extra):
    """Return a CONDITIONING for one tiny model."""
    tiny = TINY[kind]
    takes_seed = {more.text_ids}
    values = {
        name: value(shape, *([seed] if value in takes_seed else [])) if callable(value) else value
        for name, value in (tiny.cond | extra).items()
    }
    pooled = noise_like((1, tiny.pooled), 2000 + seed)
    embedding = noise_like((1, tokens, tiny.text), 1000 + seed)
    return [[embedding, {"pooled_output": pooled, **values}]]


def sample_dit(model, kind, shape, *, steps=2, cfg=4.0, cond=None, **options):
    """Sample from a tiny model with two prompts and return the latents."""
    cond = cond or {}
    settings = {
        "positive": prompt(kind, shape, 1, **cond),
        "negative": prompt(kind, shape, 2, **cond),
        "latent": torch.zeros(shape),
        "scheduler": "simple",
    } | options
    if TINY[kind].sound:
        noise = settings.pop("noise", None)
        noise = noise_like(shape, settings.get("seed", 0)) if noise is None else noise
        settings["noise"] = with_sound(kind, noise)
        settings["latent"] = with_sound(kind, settings["latent"])
    return packed(sample(model, steps=steps, cfg=cfg, **settings))


def with_sound(kind, video):
    """Return a video's latent with the same sound for all of a batch."""
    sound = noise_like((1, 8, TINY[kind].sound, 16), 67)
    return NestedTensor([video, sound.repeat(len(video), 1, 1, 1)])


def packed(value):
    """Return a copy of a latent or a network's output; several media as one tensor."""
    if torch.is_tensor(value):
        return value.clone()
    parts = value.unbind() if isinstance(value, NestedTensor) else value
    return torch.cat([part.flatten(1) for part in parts], dim=1)
