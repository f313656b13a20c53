"""One evaluation of a guided model, by ComfyUI's own guider: what an Euler step computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import comfy_extras.nodes_sag
import torch

Wrappers = comfy.patcher_extension.WrappersMP


class GuidedStep:
    """A guider at work on one latent, as it is in the middle of a sampling run.

    Args:
        patcher: the model, guided or not.
        positive: a CONDITIONING.
        negative: likewise.
        cfg: the guider's scale.
        latent: shape of the latent.
        control: the ControlNet of both conds, if there is one.
    """

    def __init__(
        self,
        patcher: Any,
        positive: list[Any],
        negative: list[Any],
        cfg: float,
        latent: tuple[int, ...],
        control: Any = None,
    ) -> None:
        device = patcher.load_device
        self.guider = guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        guider.inner_model = patcher.model
        guider.model_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        place = torch.device("cpu") if device.type == "meta" else device
        noise = torch.zeros(latent, device=place)
        guider.conds = comfy.samplers.process_conds(
            patcher.model, noise, dict(guider.original_conds), place, noise, None, 0, [noise.shape]
        )
        comfy.sampler_helpers.prepare_model_patcher(patcher, guider.conds, guider.model_options)
        self.x = torch.randn(latent, device=device)
        self.sigma = torch.full((latent[0],), 5.0, device=device)
        self.patcher = patcher
        self.control = control
        if control is not None:
            hint = (1, 3, latent[2] * 8, latent[3] * 8)
            control.cond_hint = torch.full(
                hint, 0.5, device=device, dtype=control.control_model.dtype
            )
            control.model_sampling_current = patcher.model.model_sampling
            control.timestep_range = None  # always on

    @property
    def networks(self) -> list[torch.nn.Module]:
        """Return everything with weights that a step may run."""
        controls = [] if self.control is None else [self.control.control_model]
        return [self.patcher.model, *controls]

    def run(self, body: Callable[[], Any]) -> Any:
        """Run something inside one sampling run of this model."""
        wrappers = comfy.patcher_extension.get_all_wrappers(
            Wrappers.OUTER_SAMPLE, self.guider.model_options, is_model_options=True
        )
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(
            lambda _noise: body(), self.guider, wrappers
        )
        return executor.execute(self.x)

    def evaluate(self, number: int = 0) -> torch.Tensor:
        """Evaluate the guided model once, at the noise level of a step; only inside `run`."""
        self.patcher.model.current_patcher = self.patcher
        if self.control is not None:
            self.control.model_sampling_current = self.patcher.model.model_sampling
        return self.guider(self.x, self.sigma * 0.9**number, self.guider.model_options, 0)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    *_: Any,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **__: Any,
) -> torch.Tensor:
    """Stand in for ComfyUI's attention on the meta device: torch's fused kernel, which counts."""
    if not skip_reshape:
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Let ComfyUI run on the meta device: shapes and operations without numbers."""

    def plenty(_device: Any = None, torch_free_too: bool = False) -> Any:
        return (1e15, 1e15) if torch_free_too else 1e15

    def known(read: Callable[[torch.Tensor], Any], value: Any) -> Callable[[torch.Tensor], Any]:
        return lambda tensor: value if tensor.is_meta else read(tensor)

    numbers = {
        "__float__": known(torch.Tensor.__float__, 1.0),
        "__bool__": known(torch.Tensor.__bool__, True),
    }
    with (
        mock.patch.object(comfy.model_management, "get_free_memory", plenty),
        mock.patch.multiple(torch.Tensor, **numbers),
        mock.patch.object(attention, "optimized_attention", flash_attention),
        mock.patch.object(attention, "optimized_attention_masked", flash_attention),
        mock.patch.object(comfy_extras.nodes_sag, "optimized_attention", flash_attention),
        torch.inference_mode(),
    ):
        yield
