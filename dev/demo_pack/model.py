"""The demo model as ComfyUI sees it: a ``BaseModel`` in a model patcher."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils

SHIPPED = Path(__file__).resolve().parent / "weights.safetensors"
WEIGHTS = os.environ.get("SEG_DEMO_WEIGHTS") or str(SHIPPED)  # another state of training


def read_weights() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration in the header of the weights file, and its tensors."""
    tensors, header = comfy.utils.load_torch_file(WEIGHTS, return_metadata=True)
    return json.loads(header["config"]), tensors


class PixelColour(comfy.latent_formats.LatentFormat):
    """RGB pixels in [-1, 1]: the latent picture is the picture."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors: ClassVar = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class DemoModelConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks of a supported model's configuration."""

    unet_extra_config: ClassVar = {}
    latent_format = PixelColour
    memory_usage_factor = 1.0

    def __init__(self, config: dict[str, Any]) -> None:
        """Take over the network and the noise schedule of the weights file.

        Args:
            config: The configuration in the header of the weights file.
        """
        super().__init__(copy.deepcopy(config["unet_config"]))
        self.sampling_settings = dict(config["sampling_settings"])
        self.prediction = config["prediction"]

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:  # noqa: ARG002
        """Return the prediction type that the model was trained for."""
        if self.prediction == "v_prediction":
            return comfy.model_base.ModelType.V_PREDICTION
        return comfy.model_base.ModelType.EPS

    def inpaint_model(self) -> bool:
        """Say that the model takes no mask channels."""
        return False


def load_model() -> comfy.model_patcher.ModelPatcher:
    """Load the demo model.

    Returns:
        A model patcher around a ``comfy.model_base.BaseModel``, with devices and dtypes
        chosen by ComfyUI's model management as for any other diffusion model.
    """
    settings, tensors = read_weights()
    prefix = {"diffusion_model.": ""}
    state = comfy.utils.state_dict_prefix_replace(tensors, prefix, filter_keys=True)
    config = DemoModelConfig(settings)
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(state),
    )
    manual_cast = comfy.model_management.unet_manual_cast(
        dtype, load_device, config.supported_inference_dtypes
    )
    config.set_inference_dtype(dtype, manual_cast)
    model = config.get_model(state)
    patcher = comfy.model_patcher.CoreModelPatcher(
        model, load_device=load_device, offload_device=offload_device
    )
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    missing = set(model.diffusion_model.state_dict()) ^ set(state)
    if missing:
        raise RuntimeError(f"demo weights do not fit the model: {sorted(missing)}")
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    return patcher
