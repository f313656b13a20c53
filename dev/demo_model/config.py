"""The demo model's configuration: network, noise schedule, training. It travels in the weights."""

from __future__ import annotations

from typing import Any

from dev.demo_model import butterflies

NULL_CLASS = 0
CLASS_NAMES = ["nothing", *butterflies.HUES]

CONFIG: dict[str, Any] = {
    "format": 2,
    "data": "butterflies drawn by dev/demo_model/butterflies.py",
    "image_size": butterflies.SIZE,
    "channels": butterflies.CHANNELS,
    "class_names": CLASS_NAMES,
    "context_tokens": 4,
    "prediction": "v_prediction",
    "sampling_settings": {
        "beta_schedule": "linear",
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "timesteps": 1000,
    },
    "unet_config": {
        "image_size": butterflies.SIZE,
        "in_channels": butterflies.CHANNELS,
        "out_channels": butterflies.CHANNELS,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": [0, 1],
        "num_heads": -1,
        "num_head_channels": 32,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "transformer_depth": [0],
        "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 0],
        "context_dim": 64,
        "legacy": False,
    },
    "training": {
        "seed": 20240908,
        "steps": 9000,
        "keep": [1000, 1600, 2400, 3200, 4500, 6000, 7500],
        "batch_size": 24,
        "learning_rate": 1.5e-3,
        "warmup_steps": 100,
        "weight_decay": 0.01,
        "ema_decay": 0.997,
        "class_dropout": 0.2,
        "attention_gain": 2.5,
        "log_every": 100,
        "threads": 1,
    },
}
