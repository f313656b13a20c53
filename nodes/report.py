"""Observing a run: a probe on the model, and a report of what it recorded."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from . import inputs
from .host import watch
from .host.probe.probe import Probe
from .host.show import tell_node
from .report_maps import heat_maps
from .report_plots import plots, require_matplotlib
from .report_text import summary

log = logging.getLogger(__name__)

ProbeType = io.Custom("SEG_PROBE")
SHOWN = [
    io.Image.Output(
        "plots",
        tooltip="Over the steps: size of the guidance, effective cfg (above cfg 1), variance and "
        "log-sum-exp of the attention logits, and time.",
    ),
    io.Image.Output(
        "heat_maps",
        display_name="heat maps",
        tooltip="Where guidance acted: for each image, over all guided steps and over "
        "each third of them.",
    ),
    io.String.Output(
        "summary",
        tooltip="Five lines: what ran, how strong it was, what the blur did, model "
        "passes, and time with warnings.",
    ),
]


class SEGuidanceProbe(io.ComfyNode):
    """Records what guidance does while a model samples."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="SEGuidanceProbe",
            display_name="SEG Probe",
            category=inputs.CATEGORY,
            description="Records at each sampling step what guidance does: its size, direction and "
            "model passes, and what the blur does to attention. Read it with SEG Report.",
            search_aliases=["SEG debug", "guidance probe", "attention energy", "record sampling"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to watch: put the probe anywhere between the guidance nodes "
                    "and the sampler.",
                )
            ],
            outputs=[
                io.Model.Output(
                    "watched",
                    display_name="model",
                    tooltip="The same model, watched. Connect it to the sampler.",
                ),
                ProbeType.Output("probe", tooltip="The recording. Connect it to SEG Report."),
            ],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        """Return a watched clone of the model, and the probe that sampling fills."""
        probe = Probe()
        return io.NodeOutput(watch(model, probe), probe)


class SEGuidanceReport(io.ComfyNode):
    """Shows what a probe recorded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="SEGuidanceReport",
            display_name="SEG Report",
            category=inputs.CATEGORY,
            description="Answers whether guidance does anything, what and when: plots over the "
            "steps, heat maps of where it acted, and a summary in five lines.",
            search_aliases=["SEG plot", "guidance heat map", "attention energy", "guidance report"],
            is_output_node=True,
            inputs=[
                ProbeType.Input("probe", tooltip="From SEG Probe."),
                io.Latent.Input(
                    "latent",
                    tooltip="From the sampler that used the watched model. The report waits for it "
                    "and picks the run that produced it.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The decoded image, to lay the heat maps over. Without it they are "
                    "shown alone.",
                ),
            ],
            outputs=SHOWN,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, probe: Probe, latent: dict[str, Any], image: Any = None) -> io.NodeOutput:
        """Return plots, heat maps and a summary of the run that produced a latent."""
        require_matplotlib()
        record, made_it = probe.record(latent["samples"])
        if record is None:
            raise ValueError(
                "SEG Report: the probe has recorded nothing. Connect the model output of SEG Probe "
                "to the sampler, and that sampler's LATENT to this node."
            )
        words = summary(record, probe.runs, made_it)
        log.info("SEG Report\n%s", words)
        tell_node(words, getattr(cls.hidden, "unique_id", None))
        drawn = plots(record)
        shown = {**ui.PreviewImage(drawn, cls=cls).as_dict(), **ui.PreviewText(words).as_dict()}
        return io.NodeOutput(drawn, heat_maps(record, image), words, ui=shown)
