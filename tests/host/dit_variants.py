"""Tiny networks and conditionings of models that share a family's row, or pack several media."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.conds
import comfy.ops
import torch
from comfy.ldm.lumina import model as lumina
from host_models import noise_like

IMAGE_COMES = 151673
"""The last text token of HiDream-O1, in whose place the timestep stands."""

LTX_2 = {
    "in_channels": 128, "cross_attention_dim": 32, "attention_head_dim": 16,
    "num_attention_heads": 2, "caption_channels": 24, "num_layers": 4,
    "audio_cross_attention_dim": 16, "audio_attention_head_dim": 8, "audio_num_attention_heads": 2,
    "connector_attention_head_dim": 8, "connector_num_attention_heads": 3,
    "connector_num_layers": 1,
}  # fmt: skip
LTX_2_3 = LTX_2 | {
    "cross_attention_adaln": True, "apply_gated_attention": True,
    "caption_proj_before_connector": True,
}  # fmt: skip
LTX_2_4 = LTX_2_3 | {
    "ff_bias": False, "audio_ff_bias": False, "use_keyframes_abs_pos_embedding": True,
}  # fmt: skip
HIDREAM_O1 = {
    "text_config_overrides": {
        "vocab_size": IMAGE_COMES + 1, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "rope_dims": [4, 2, 2],
    },
    "vision_config_overrides": {
        "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "depth": 1,
        "num_position_embeddings": 16, "deepstack_visual_indexes": (),
    },
}  # fmt: skip
KANDINSKY_6 = {"time_dim_a": 32, "model_dim_a": 48, "ff_dim_a": 64, "head_dim_a": 16}
QWEN_21 = {
    "in_channels": 64, "out_channels": 64, "num_layers": 4, "attention_head_dim": 16,
    "num_attention_heads": 2, "context_in_dim": 24, "mlp_ratio": 2, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
LONGCAT = {"guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]}
PID = {
    "lq_latent_channels": 4, "lq_hidden_dim": 8, "lq_num_res_blocks": 1, "pit_lq_inject": True,
    "rope_ref_h": 64, "rope_ref_w": 64,
}  # fmt: skip
WAN_HUMO = {"model_type": "humo", "in_dim": 36}
WAN_S2V = {"model_type": "s2v", "audio_dim": 16, "audio_inject_layers": [0, 2]}
WAN_ANIMATE = {"model_type": "animate", "in_dim": 36, "num_layers": 5, "motion_encoder_dim": 16}
WAN_DANCER = {
    "model_type": "wandancer", "in_dim": 36, "audio_inject_layers": [0, 2], "music_dim": 32,
    "music_heads": 2, "music_latent_dim": 32,
}  # fmt: skip
OMNI = {"siglip_feat_dim": 12}
NO_NOISE = {"default_ref_method": "index_timestep_zero"}


def text_ids(shape, seed):
    """Return a prompt of HiDream-O1, whose first three tokens stand before reference images."""
    words = [100 * seed + n for n in range(6)]
    return torch.tensor([[*words, IMAGE_COMES]])


def references(shape):
    """Return two reference images, neither of them of the image's size."""
    cells = [n * 2 for n in shape[-2:]]
    frame = (1,) * (len(shape) - 4)
    sizes = [(cells[0], shape[-1]), (shape[-2], cells[1])]
    return [noise_like((1, shape[1], *frame, *s), 50 + n) for n, s in enumerate(sizes)]


def identities(shape, references=0):
    """Return masks of who is who for SCAIL-2, of reference frames first."""
    return noise_like((1, references + shape[2], 28, *shape[-2:]), 70).sigmoid()


def seen(shape):
    """Return what a vision model sees of each reference image of Z-Image Omni: 2x3 patches."""
    states = [noise_like((1, 6, 12), seed) for seed in (68, 69)]
    return [SimpleNamespace(image_sizes=[(3, 32, 48)], last_hidden_state=one) for one in states]


# What else conditionings hold: functions of the latent's shape.

REFS = {"reference_latents": references}
REFS_AND_ONE = {  # of the image's own size
    "reference_latents": lambda shape: [*references(shape), noise_like((1, *shape[1:]), 54)]
}
FRAME = {"reference_latents": lambda shape: [noise_like((1, shape[1], 1, *shape[-2:]), 53)]}
OMNI_REFS = REFS | {
    "reference_latents_text_embeds": lambda _: [noise_like((1, n, 24), 60 + n) for n in (5, 6)],
    "clip_vision_outputs": seen,
}
HUNYUAN_REF = {"ref_latent": lambda shape: noise_like((1, shape[1], 1, *shape[-2:]), 53)}
KANDINSKY_REF = {"k6_reference": lambda shape: noise_like((1, shape[1], 1, *shape[-2:]), 53)}
ALL_TOKENS = {"attention_mask": lambda _: torch.ones(1, 7, dtype=torch.long)}
LLAMA = {"conditioning_llama3": lambda _: noise_like((1, 3, 7, 24), 41)}
BESIDE = {"concat_latent_image": lambda shape: noise_like((1, *shape[1:]), 54)}
PIXELS_REF = {"reference_latents": lambda _: [noise_like((1, 64, 96, 3), 55).sigmoid()]}
LOW_QUALITY = {  # half the cells of its tokens
    "lq_latent": lambda shape: noise_like((1, 4, *(-(-n // 32) for n in shape[-2:])), 56),
    "degrade_sigma": torch.tensor([0.3]),
}
SCAIL_2 = {  # poses stand behind the video
    "pose_video_latent": lambda shape: noise_like((1, *shape[1:]), 71),
    "driving_mask_28ch": identities,
}
SCAIL_2_REFS = FRAME | {"ref_mask_28ch": lambda shape: identities(shape, 1)}
# Windows of features for each frame.
HUMO = {"audio_embed": lambda shape: noise_like((1, shape[2], 8, 5, 16), 57)}
# Features of several layers, four times for each frame; past frames are packed into fewer tokens.
S2V = {"audio_embed": lambda shape: noise_like((1, 25, 16, 4 * shape[2]), 58)}
S2V_REFS = FRAME | {"reference_motion": lambda shape: noise_like((1, shape[1], 3, 8, 8), 59)}
MUSIC = {"audio_embed": lambda _: noise_like((1, 40, 35), 60)}
ANIMATE = {  # from the second frame on; four pictures of the face for each
    "pose_video_latent": lambda shape: noise_like(
        (1, shape[1], max(shape[2] - 1, 1), *shape[-2:]), 61
    ),
    "face_video_pixels": lambda shape: noise_like((1, 3, 4 * max(shape[2] - 1, 1), 8, 8), 62),
}
STREAMS = {  # a picture and a clip
    "context_latents": lambda shape: [
        noise_like((1, shape[1], 1, 8, 4), 63), noise_like((1, *shape[1:]), 64),
    ],
}  # fmt: skip

BEHIND = 12
"""Tokens of the two reference frames that stand behind the image of Ming-Image."""


def frames_behind(model, shape, monkeypatch):
    """Return reference frames, and let a `NextDiT` that cannot take any put tokens in their place.

    They follow the image, before both are filled up to a multiple, as in newer versions.
    """
    network, place = model.model.diffusion_model, lumina.pos_ids_x

    def positions(start, *args, **kwargs):
        own = place(start, *args, **kwargs)
        return torch.cat([own, own[:, :1].expand(-1, BEHIND, -1) + 1.0], dim=1)

    def tokens(_module, _args, out):
        return torch.cat(
            [out, noise_like((1, BEHIND, out.shape[-1]), 72).expand(len(out), -1, -1)], 1
        )

    monkeypatch.setattr(lumina, "pos_ids_x", positions)
    network.x_embedder.register_forward_hook(tokens)
    return comfy.conds.CONDList(
        [noise_like((1, shape[1], 4, 6), 73), noise_like((1, shape[1], 6, 4), 74)]
    )


class Motion(torch.nn.Module):
    """Stands for Animate's motion encoder, whose size is fixed."""

    def get_motion(self, pictures):
        """Return `(pictures, 16)`."""
        return pictures.mean(dim=1).flatten(1)[:, :16]


class Faces(torch.nn.Module):
    """Stands for Animate's face encoder: `(batch, pictures, 16)` -> `(batch, frames, 5, dim)`."""

    def __init__(self, dim, dtype):
        super().__init__()
        self.out = torch.nn.Linear(16, dim, dtype=dtype)

    def forward(self, motion):
        """Return tokens of every fourth picture."""
        return self.out(motion[:, ::4])[:, :, None].repeat(1, 1, 5, 1)


def shrink(network):
    """Exchange the parts of a network that cannot be had small."""
    if hasattr(network, "face_encoder"):
        network.motion_encoder, network.face_encoder = Motion(), Faces(network.dim, network.dtype)
    if hasattr(network, "audio_proj"):
        network.audio_proj = type(network.audio_proj)(
            seq_len=8, blocks=5, channels=16, intermediate_dim=32, output_dim=1536,
            context_tokens=16, dtype=network.dtype, operations=comfy.ops.disable_weight_init,
        )  # fmt: skip


@torch.no_grad()
def sharpen(network):
    """Let queries and keys be of unit size, so that attention maps are far from flat."""
    for name, weight in network.named_parameters():
        if weight.ndim == 1 and name.endswith((".weight", ".scale")):
            weight.add_(1.0 - weight.mean().round())
    for name, table in network.named_buffers():
        if name == "pos_embed":  # not initialised by the host
            table.copy_(noise_like(table.shape, 3))
