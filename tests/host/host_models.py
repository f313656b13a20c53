"""Tiny models of ComfyUI's true classes with seeded random weights, and how to sample from them."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import math

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.supported_models as supported
import torch

PACK = "seg_pack_under_test"

COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_head_channels": 16,
    "num_heads": -1,
    "context_dim": 64,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "dtype": torch.float32,
}
SDXL = COMMON | {
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 2,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
SSD1B = SDXL | {"transformer_depth_middle": -1}
SVD = SDXL | {
    "in_channels": 8,
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "adm_in_channels": 768,
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
    "disable_temporal_crossattention": False,
    "max_ddpm_temb_period": 10000,
}
CONFIGS = {
    "sd15": (supported.SD15, COMMON),
    "sdxl": (supported.SDXL, SDXL),
    "ssd1b": (supported.SSD1B, SSD1B),
    "svd": (supported.SVD_img2vid, SVD),
}


@functools.cache
def settle():
    """Spare what is imported from the collections that ComfyUI makes for each unused model."""
    gc.collect()
    gc.freeze()


def bare_model(kind, *, model_type=None, seed=0, dtype=torch.float32, **changes):
    """Return a `ModelPatcher` around a tiny model whose weights are not yet sensible."""
    settle()
    config_class, unet = CONFIGS[kind]
    config = config_class(unet | changes)
    config.unet_config = dict(unet | changes | {"dtype": dtype})
    config.manual_cast_dtype = None
    torch.manual_seed(seed)
    model = config.get_model({})
    if model_type is not None:
        model.model_type = model_type
        model.model_sampling = comfy.model_base.model_sampling(config, model_type)
    return patcher_of(model.to(dtype))


def patcher_of(model):
    """Return a `ModelPatcher` around a model, as loaders make one."""
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=torch.device("cpu"),
    )


@torch.no_grad()
def randomise(module, seed=0):
    """Draw weights that keep activations near unit size, so that every block matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(module.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            noise = noise / math.sqrt(weight[0].numel())
        else:
            noise = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        weight.copy_(noise)


def tiny_model(kind="sdxl", *, seed=0, **options):
    """Return a ready tiny model."""
    patcher = bare_model(kind, seed=seed, **options)
    randomise(patcher.model.diffusion_model, seed)
    return patcher


def conditioning(seed=0, tokens=7, dim=64, **extra):
    """Return a CONDITIONING of one random prompt."""
    generator = torch.Generator().manual_seed(1000 + seed)
    embedding = torch.randn(1, tokens, dim, generator=generator)
    pooled = torch.randn(1, 1280, generator=generator)
    return [[embedding, {"pooled_output": pooled, **extra}]]


def noise_like(shape, seed=0):
    """Return seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def part(name):
    """Return a module of the pack's nodes."""
    return importlib.import_module(f"{PACK}.nodes.{name}")


def seg(model, scale=3.0, sigma=math.inf, start=0.0, end=1.0, **advanced):
    """Return a model with the SEGuidance node applied, called as ComfyUI calls it."""
    node = part("seg").SEGuidance
    infinite = math.isinf(sigma)
    width = 10.0 if infinite else sigma
    return node.execute(model, scale, infinite, width, start, end, **advanced)[0]


def sample(
    model,
    *,
    cfg=7.0,
    steps=2,
    size=(8, 8),
    batch=1,
    channels=4,
    sampler="euler",
    scheduler="normal",
    positive=None,
    negative=None,
    latent=None,
    noise=None,
    seed=0,
    **options,
):
    """Sample as the KSampler node does and return the latents."""
    positive = conditioning(1) if positive is None else positive
    negative = conditioning(2) if negative is None else negative
    latent = torch.zeros(batch, channels, *size) if latent is None else latent
    noise = noise_like(latent.shape, seed) if noise is None else noise
    # As ComfyUI runs its nodes.
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, negative, latent,
            disable_pbar=True, seed=seed, **options,
        )  # fmt: skip


@contextlib.contextmanager
def counted_calls(model):
    """Count calls of the network's forward, with the batch size of each."""
    network = model.model.diffusion_model
    batches = []
    with network.register_forward_pre_hook(lambda _module, args: batches.append(len(args[0]))):
        yield batches


@functools.cache
def shared_model(kind="sdxl", dtype=torch.float64, **options):
    """Return a tiny model that tests share; clone it, never change it."""
    return tiny_model(kind, dtype=dtype, **options)


def core_node(module, name, *args, **kwargs):
    """Run a node of ComfyUI, of either of its two schemas, and return its first output."""
    node = getattr(importlib.import_module(module), name)
    if hasattr(node, "execute"):
        return node.execute(*args, **kwargs)[0]
    return getattr(node(), node.FUNCTION)(*args, **kwargs)[0]


def tiny_controlnet(kind="sdxl", *, seed=50, dtype=torch.float64):
    """Return a ControlNet with random weights that fits the tiny model of a kind."""
    names = ("image_size", "in_channels", "model_channels", "num_res_blocks", "channel_mult",
             "transformer_depth", "transformer_depth_middle", "num_head_channels", "context_dim",
             "use_spatial_transformer", "legacy", "use_linear_in_transformer", "num_classes",
             "adm_in_channels")  # fmt: skip
    unet = CONFIGS[kind][1]
    config = {name: copy.copy(unet[name]) for name in names if name in unet}
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, dtype=dtype)
    randomise(network, seed)
    network.requires_grad_(False).eval()
    return comfy.controlnet.ControlNet(
        network, load_device=comfy.model_management.get_torch_device(), compression_ratio=8
    )


def with_controlnet(positive, negative, control, *, strength=1.0, start=0.0, end=1.0, size=(8, 8)):
    """Return both conditionings with a ControlNet and a random hint, by the core node."""
    image = torch.rand(1, size[0] * 8, size[1] * 8, 3, generator=torch.Generator().manual_seed(7))
    node = importlib.import_module("nodes").ControlNetApplyAdvanced()
    return node.apply_controlnet(positive, negative, control, image, strength, start, end)


def tiny_lora(model, part="middle_block", *, seed=70, strength=0.3):
    """Return a LoRA file's content that changes every attention projection of one part."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, weight in model.model.diffusion_model.named_parameters():
        if name.startswith(part) and ".attn" in name and name.endswith(".weight"):
            key = "lora_unet_" + name[: -len(".weight")].replace(".", "_")
            up = torch.randn(len(weight), 2, generator=generator)
            down = torch.randn(2, weight.shape[1], generator=generator)
            lora[key + ".lora_up.weight"] = up * strength
            lora[key + ".lora_down.weight"] = down / weight.shape[1] ** 0.5
            lora[key + ".alpha"] = torch.tensor(2.0)
    return lora
