"""Stand-ins of code in transformers: each function says which real thing it stands for."""

from __future__ import annotations

import importlib

import comfy.model_patcher
import torch
from host_models import noise_like, randomise
from surroundings import WRAPPERS


def override_over_rows(model):
    """As attention shared across images on a transformer: an override that draws rows together."""

    def override(function, q, k, v, *args, **kwargs):
        k, v = (0.5 * (t + t.mean(0, keepdim=True)) for t in (k, v))
        return function(q, k, v, *args, **kwargs)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def block_over_rows(model):
    """As consistent subjects on a transformer: a block's patch that mixes the rows of the image."""

    def mixed(args, extra):
        out = extra["original_block"](args)
        return {**out, "img": 0.7 * out["img"] + 0.3 * out["img"].mean(0, keepdim=True)}

    model = model.clone()
    model.set_model_patch_replace(mixed, "dit", "double_block", 1)
    return model


def block_of_one_row(model):
    """As identity adapters for Flux: what is added to a block's image has one row, and says so."""

    def added(args, extra):
        out = extra["original_block"](args)
        assert len(out["img"]) == 1, "made for one image"
        return {**out, "img": out["img"] + 0.2 * noise_like(out["img"].shape, 8).to(out["img"])}

    model = model.clone()
    model.set_model_patch_replace(added, "dit", "double_block", 1)
    return model


def small_patcher(module, seed=5):
    """Return a patcher of the host around a module with seeded weights."""
    randomise(module, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(
        module.to(torch.float64), load_device=cpu, offload_device=cpu
    )


def uso_style_reference(model):
    """ComfyUI's USO style reference: one image's tokens before the text of a Flux, as one row."""
    patches = importlib.import_module("comfy_extras.nodes_model_patch")

    class Projector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out = torch.nn.Linear(8, 32)

        def forward(self, layers):
            return self.out(layers).mean(0)

    patch = patches.UsoStyleProjectorPatch(small_patcher(Projector()), noise_like((3, 1, 4, 8), 6))
    model = model.clone()
    model.set_model_post_input_patch(patch)
    return model


def infinite_talk(frames):
    """ComfyUI's InfiniteTalk: a sound's tokens, attended to in each block of a Wan, as one row."""
    talk = importlib.import_module("comfy.ldm.wan.model_multitalk")

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_x = torch.nn.LayerNorm(32)
            self.audio_cross_attn = talk.SingleStreamMultiAttention(
                32, 8, num_heads=2, qkv_bias=True, operations=torch.nn
            )

    class Sound(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(4))

    def around(model):
        patcher = small_patcher(Sound())
        model = model.clone()
        options = model.model_options["transformer_options"]
        options["audio_embeds"] = noise_like((1, frames, 3, 8), 7).double()
        model.set_model_patch(talk.MultiTalkCrossAttnPatch(patcher), "attn2_patch")
        motion = noise_like((1, 16, 1, 6, 8), 9)
        wrapper = talk.InfiniteTalkOuterSampleWrapper(motion, patcher)
        model.add_wrapper_with_key(WRAPPERS.OUTER_SAMPLE, "infinite_talk_outer_sample", wrapper)
        return model

    return around
