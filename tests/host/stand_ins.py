"""What makes a stand-in of a function: it takes a model, and returns a clone with the function."""

from __future__ import annotations

import functools
import inspect
from unittest import mock

import comfy.patcher_extension
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from host_models import core_node

WRAPPERS = comfy.patcher_extension.WrappersMP


def patched(kind, *place):
    """Put the function on a clone by the host's `set_model_<kind>`, at a place."""

    def stand_in(function):
        @functools.wraps(function)
        def around(model):
            model = model.clone()
            getattr(model, f"set_model_{kind}")(function, *place)
            return model

        return around

    return stand_in


def noted(model, seen):
    """Return a clone that notes what the post-CFG functions of each step are shown there."""

    @patched("sampler_post_cfg_function")
    def look(args):
        seen.append(args)
        return args["denoised"]

    return look(model)


def wrapped(kind, *, outside=False):
    """Put the function on a clone as a wrapper of the host, inside or outside of those it has."""

    def stand_in(wrapper):
        @functools.wraps(wrapper)
        def around(model):
            model = model.clone()
            if outside:
                model.wrappers[kind] = {"test": [wrapper], **model.wrappers.get(kind, {})}
            else:
                model.add_wrapper_with_key(kind, "test", wrapper)
            return model

        return around

    return stand_in


def attention_override(override):
    """Put the function on a clone as the override of the host's attention."""

    @functools.wraps(override)
    def around(model):
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model

    return around


def exchanged(name):
    """Exchange an attribute of the network, for the length of each call.

    The function is given the network and what it has under this name, and returns what takes its
    place.
    """

    def stand_in(make):
        @functools.wraps(make)
        def around(model):
            def run(apply_model, args):
                network = model.model.diffusion_model
                with mock.patch.object(network, name, make(network, getattr(network, name))):
                    return apply_model(args["input"], args["timestep"], **args["c"])

            return patched("unet_function_wrapper")(run)(model)

        return around

    return stand_in


def shipped(module, name, *widgets, **named):
    """Return what applies a node that ComfyUI ships."""
    return lambda model: core_node(f"comfy_extras.nodes_{module}", name, model, *widgets, **named)


def context_windows(
    model, fuse="pyramid", *, length=4, overlap=2, schedule="standard_static", axis=0
):
    """Return a model under the host's node that cuts a clip in windows of frames."""
    # Newer versions add a frame to each window, which SVD's frame count does not know of.
    known = inspect.signature(ContextWindowsManualNode.execute).parameters
    extra = {"causal_window_fix": False} if "causal_window_fix" in known else {}
    settings = (length, overlap, schedule, 1, False, fuse, axis, False)
    return ContextWindowsManualNode.execute(model, *settings, **extra)[0]
