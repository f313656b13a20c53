"""Tiny diffusion transformers of ComfyUI's true classes: one row for each network under test."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import comfy.supported_models as supported
import dit_networks as nets
import dit_variants as more
import torch
from comfy.ldm.lightricks.model import LTXVModel
from comfy.nested_tensor import NestedTensor
from host_models import CONFIGS, noise_like, patcher_of, randomise, sample

CELLS = (3, 4)
"""The tokens of a small image."""


@dataclass(frozen=True)
class Tiny:
    """How to build one tiny model, and what it is sampled with.

    Attributes:
        config: name of the host's model class.
        network: arguments of the network.
        channels: of the latent.
        video: the latent has frames.
        still: it has frames, and takes one alone.
        unit: latent cells along one side of a token.
        text: width of the prompt's embedding.
        pooled: width of the pooled prompt.
        cond: what else the conditioning holds; callables are given the latent's shape, and the
            prompt's seed if they take it.
        refs: the conditioning's reference images, as `cond`; empty if the family takes none.
        odd: it takes sizes that are not whole patches.
        sound: frames of sound that share the latent.
        options: of the host, which a node sets on the model.
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
    still: bool = False
    sound: int = 0
    options: dict = field(default_factory=dict)

    @property
    def frames(self):
        """Tell whether it takes more than one frame."""
        return self.video and not self.still


TINY = {
    "flux": Tiny("Flux", nets.FLUX, refs=more.REFS),
    "flux2": Tiny("Flux2", nets.FLUX2, channels=128, unit=1, refs=more.REFS),
    "longcat": Tiny("LongCatImage", nets.FLUX | more.LONGCAT, refs=more.REFS),
    "chroma": Tiny("Chroma", nets.CHROMA),
    "radiance": Tiny("ChromaRadiance", nets.RADIANCE, channels=3, unit=16),
    "sd3": Tiny("SD3", nets.SD3),
    "aura": Tiny("AuraFlow", nets.AURA, channels=4),
    "qwen": Tiny("QwenImage", nets.QWEN, video=True, refs=more.REFS),
    "qwen_no_noise": Tiny("QwenImage", nets.QWEN | more.NO_NOISE, video=True, refs=more.REFS),
    "qwen21": Tiny("QwenImage21", more.QWEN_21, channels=64, unit=1, refs=more.REFS_AND_ONE,
                   options={"qwen_image21_cache": {"device": "off"}}),
    "mage": Tiny("MageFlow", nets.MAGE, channels=128, unit=1, refs=more.REFS),
    "lumina2": Tiny("Lumina2", nets.LUMINA),
    "zimage": Tiny("ZImage", nets.Z_IMAGE),
    "zimage_omni": Tiny("ZImage", nets.Z_IMAGE | more.OMNI, odd=False, refs=more.OMNI_REFS),
    "hunyuan_video": Tiny("HunyuanVideo", nets.HUNYUAN, video=True, odd=False,
                          refs=more.HUNYUAN_REF),
    "hunyuan_image": Tiny("HunyuanImage21", nets.HUNYUAN_IMAGE, channels=64, unit=1),
    "wan": Tiny("WAN21_T2V", nets.WAN, video=True),
    "wan_ref": Tiny("WAN21_FunControl2V", nets.WAN | {"in_dim_ref_conv": 16}, video=True,
                    refs=more.FRAME),
    "wan_vace": Tiny("WAN21_Vace", nets.WAN | {"model_type": "vace", "vace_layers": 2,
                                          "vace_in_dim": 96}, video=True, odd=False),
    "wan_camera": Tiny("WAN21_Camera", nets.WAN | {"model_type": "camera"}, video=True),
    "wan_scail": Tiny("WAN21_SCAIL", nets.WAN | {"in_dim": 20}, video=True, refs=more.FRAME),
    "wan_scail2": Tiny("WAN21_SCAIL2", nets.WAN | {"in_dim": 20}, video=True, odd=False,
                       cond=more.SCAIL_2, refs=more.SCAIL_2_REFS),
    "wan_humo": Tiny("WAN21_HuMo", nets.WAN | more.WAN_HUMO, video=True, refs=more.FRAME,
                     cond=more.HUMO),
    "wan_s2v": Tiny("WAN22_S2V", nets.WAN | more.WAN_S2V, video=True,
                    cond=more.S2V, refs=more.S2V_REFS),
    "wan_animate": Tiny("WAN22_Animate", nets.WAN | more.WAN_ANIMATE, video=True,
                        cond=more.ANIMATE),
    "wan_dancer": Tiny("WAN22_WanDancer", nets.WAN | more.WAN_DANCER, video=True),
    "wan_bernini": Tiny("WAN21_T2V", nets.WAN, video=True, refs=more.STREAMS),
    "ltx2": Tiny("LTXAV", more.LTX_2, channels=128, video=True, unit=1, text=48, sound=5),
    "ltx2_silent": Tiny("LTXAV", more.LTX_2_3, channels=128, video=True, unit=1, text=48),
    "ltxv": Tiny("LTXV", nets.LTXV, channels=128, video=True, unit=1, cond=more.ALL_TOKENS),
    "cosmos2": Tiny("CosmosT2IPredict2", nets.COSMOS, video=True),
    "anima": Tiny("Anima", nets.COSMOS, video=True),
    "cosmos1": Tiny("CosmosT2V", nets.COSMOS_1, video=True, odd=False),
    "kandinsky5": Tiny("Kandinsky5", nets.KANDINSKY, video=True, odd=False),
    "kandinsky6": Tiny("Kandinsky6", nets.KANDINSKY | more.KANDINSKY_6, video=True, sound=5,
                       refs=more.KANDINSKY_REF),
    "krea2": Tiny("Krea2", nets.KREA, video=True, still=True, refs=more.REFS),
    "krea2_no_noise": Tiny("Krea2", nets.KREA | more.NO_NOISE, video=True, still=True,
                           refs=more.REFS),
    "lens": Tiny("Lens", nets.LENS, channels=128, unit=1),
    "joyimage": Tiny("JoyImage", nets.JOY, video=True, refs=more.REFS),
    "hidream": Tiny("HiDream", nets.HIDREAM, cond=more.LLAMA, refs=more.BESIDE),
    "hidream_o1": Tiny("HiDreamO1", more.HIDREAM_O1, channels=3, unit=32, odd=False,
                       cond={"text_input_ids": more.text_ids}, refs=more.PIXELS_REF),
    "omnigen2": Tiny("Omnigen2", nets.OMNIGEN, cond=more.ALL_TOKENS, refs=more.REFS),
    "boogu": Tiny("Boogu", nets.BOOGU, cond=more.ALL_TOKENS, refs=more.REFS),
    "cogvideox": Tiny("CogVideoX_T2V", nets.COG, video=True),
    "ideogram4": Tiny("Ideogram4", nets.IDEOGRAM, channels=128, unit=1),
    "pixeldit": Tiny("PixelDiTT2I", nets.PIXELDIT, channels=3, unit=16),
    "pid": Tiny("PiD", nets.PIXELDIT | more.PID, channels=3, unit=16, cond=more.LOW_QUALITY),
    "mochi": Tiny("GenmoMochi", nets.MOCHI, channels=12, video=True, odd=False,
                  cond=more.ALL_TOKENS),
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
    patcher = patcher_of(model)
    patcher.model_options["transformer_options"].update(tiny.options)
    return patcher


def shape_of(kind, size=CELLS, *, frames=2, batch=1):
    """Return the latent's shape for a grid of tokens; sizes may be halves of a token.

    It has so many frames where the family takes more than one.
    """
    tiny = TINY[kind]
    cells = [int(n * tiny.unit) for n in size]
    if tiny.video:
        cells = [frames if tiny.frames else 1, *cells]
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


def sampled(model, kind, shape=None, *, batch=1, steps=2, cfg=4.0, cond=None, **options):
    """Sample from a tiny UNet or transformer with two prompts and return the latents.

    Args:
        model: the model.
        kind: of the model.
        shape: of a transformer's latent; a small one if None.
        batch: how many images, if no shape is given.
        steps: how many.
        cfg: guidance scale.
        cond: what else a transformer's prompts hold.
        options: of `sample`.
    """
    if kind in CONFIGS:
        settings = {"size": (6, 8), "batch": batch, "steps": steps, "cfg": cfg}
        return sample(model, **settings | options)
    shape, cond = shape or shape_of(kind, batch=batch), cond or {}
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
    frames = TINY[kind].sound
    sound = noise_like((1, frames, 40) if kind == "kandinsky6" else (1, 8, frames, 16), 67)
    return NestedTensor([video, sound.expand(len(video), *sound.shape[1:])])


def packed(value):
    """Return a copy of a latent or a network's output; several media as one tensor."""
    if torch.is_tensor(value):
        return value.clone()
    parts = value.unbind() if isinstance(value, NestedTensor) else value
    return torch.cat([part.flatten(1) for part in parts], dim=1)
