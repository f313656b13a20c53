"""Looking at a run: a probe on the model, and a report of what it saw."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from .host import watch
from .host.probe.probe import Probe
from .host.show.progress import tell_node

log = logging.getLogger(__name__)

ProbeType = io.Custom("SEG_PROBE")


class SEGuidanceProbe(io.ComfyNode):
    """Records what guidance does while a model samples."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the inputs; workflows store widgets by position, so new ones go last."""
        return io.Schema(
            node_id="SEGuidanceProbe",
            display_name="SEG Probe",
            category="model/patch/guidance",
            description=(
                "Records while sampling what guidance does in each step: its size, its direction, "
                "its passes, and what the blur does to attention. Read it with SEG Report."
            ),
            search_aliases=["SEG debug", "guidance probe", "attention energy", "record sampling"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to watch: put the probe anywhere between the guidance "
                    "nodes and the sampler.",
                )
            ],
            outputs=[
                io.Model.Output(
                    "watched",
                    display_name="model",
                    tooltip="The same model, watched. Connect it to the sampler.",
                ),
                ProbeType.Output(
                    "probe",
                    display_name="probe",
                    tooltip="What is recorded. Connect it to SEG Report.",
                ),
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
        """Declare the inputs; workflows store widgets by position, so new ones go last."""
        return io.Schema(
            node_id="SEGuidanceReport",
            display_name="SEG Report",
            category="model/patch/guidance",
            description=(
                "Answers whether guidance does anything, what and when: plots over the steps, heat "
                "maps of where it acted, and five lines in words."
            ),
            search_aliases=["SEG plot", "guidance heat map", "attention energy", "guidance report"],
            is_output_node=True,
            inputs=[
                ProbeType.Input("probe", tooltip="From SEG Probe."),
                io.Latent.Input(
                    "latent",
                    tooltip="From the sampler that used the watched model: the report waits for it "
                    "and picks the run that made it.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The decoded image, to lay the heat maps over. Without it they stand "
                    "alone.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "plots",
                    display_name="plots",
                    tooltip="Guidance, variance and "
                    "log-sum-exp of the attention logits, and time, over the steps.",
                ),
                io.Image.Output(
                    "heat_maps",
                    display_name="heat maps",
                    tooltip="Where guidance "
                    "acted: for each image over all guided steps, then over each third of them.",
                ),
                io.String.Output(
                    "summary",
                    display_name="summary",
                    tooltip="Five lines: what "
                    "ran, how hard it pushed, what the blur did, passes, time and warnings.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, probe: Probe, latent: dict[str, Any], image: Any = None) -> io.NodeOutput:
        """Return plots, heat maps and words on the run that made a latent."""
        from .report_plots import heat_maps, plots, require_matplotlib
        from .report_text import summary

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
        shown = {
            **ui.PreviewImage(drawn, cls=cls).as_dict(),
            **ui.PreviewText(words).as_dict(),
        }
        return io.NodeOutput(drawn, heat_maps(record, image), words, ui=shown)
