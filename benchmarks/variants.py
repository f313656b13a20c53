"""What is compared: every kind of guidance, at every setting that changes its cost."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks import models
from benchmarks.step import GuidedStep

CFG = "CFG only"
PAG = "core PAG"
SEG_OFF = "SEG, reuse off"
SEG_ON = "SEG, reuse on"
OUR_PAG = "PAG, reuse on"
OUR_SAG = "SAG"
CORE_SAG = "core SAG"
OUR_TPG = "TPG"
OUR_SSG = "SSG"
OUR_SLG = "SLG"
SEG_AND_SLG = "SEG + SLG"
SEG_AND_PAG = "SEG + PAG, reuse on"
SEG_AND_SAG = "SEG + SAG"
PAG_AND_SAG = "PAG + SAG"
RELATIVES = (
    OUR_PAG,
    OUR_SLG,
    OUR_TPG,
    OUR_SSG,
    CORE_SAG,
    OUR_SAG,
    SEG_AND_PAG,
    SEG_AND_SLG,
    SEG_AND_SAG,
    PAG_AND_SAG,
)
FINITE = 10.0
HELD = (2, 3, 4)


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    method: str
    cfg: float
    control: bool = False
    sigma: float = math.inf
    blocks: str = "middle"
    window: tuple[float, float] = (0.0, 1.0)
    every: int = 1

    @property
    def baseline(self) -> Variant:
        """The same step without guidance."""
        return Variant(CFG, self.cfg, self.control)

    @property
    def is_seg(self) -> bool:
        """Tell whether blur and blocks mean something."""
        return self.method in (SEG_OFF, SEG_ON)

    @property
    def title(self) -> str:
        """What tells it apart within a group of equal cfg and control."""
        if not self.is_seg:
            return self.method
        width = "inf" if math.isinf(self.sigma) else f"{self.sigma:g}"
        held = f", every {self.every}" if self.every > 1 else ""
        return f"{self.method}, {self.blocks}, sigma {width}{held}"


def every(*, thin: bool = False) -> list[Variant]:
    """Return all variants; thin leaves out what differs from another one in two ways."""
    rows = []
    for control, cfg in product((False, True), (7.0, 1.0)):
        rows += [Variant(CFG, cfg, control), Variant(PAG, cfg, control)]
        for sigma, blocks, method in product(
            (math.inf, FINITE), ("early", "middle", "late"), (SEG_OFF, SEG_ON)
        ):
            changes = control + (cfg == 1.0) + (sigma == FINITE) + (blocks != "middle")
            if not thin or changes < 2 or (control and blocks == "middle" and sigma == math.inf):
                rows.append(Variant(method, cfg, control, sigma, blocks))
        if not control:
            rows += [Variant(method, cfg) for method in RELATIVES]
            rows += [Variant(SEG_ON, cfg, every=n) for n in HELD]
    return rows


def few() -> list[Variant]:
    """Return the variants that differ in how often they read the weights."""
    methods = (CFG, PAG, SEG_OFF, SEG_ON, SEG_AND_PAG)
    return [Variant(method, cfg) for cfg in (7.0, 1.0) for method in methods]


class Bench:
    """One network, and the guided steps that share its weights."""

    def __init__(
        self,
        kind: models.Kind,
        device: Any,
        dtype: Any,
        seg_node: Any,
        *,
        control: bool = True,
        offloaded: bool = False,
    ) -> None:
        self.kind = kind
        self.device = device
        self.seg_node = seg_node
        self.unet = models.unet(kind, device, dtype, offloaded=offloaded)
        self.control = models.control_net(kind, device, dtype) if control else None

    def step(self, variant: Variant, size: tuple[int, int], batch: int = 1) -> GuidedStep:
        """Return the step of a variant at an image size of width and height."""
        control = None
        if variant.control:
            control = self.control.copy()
            control.set_cond_hint(None)
        positive, negative = (models.prompt(self.kind, seed, control) for seed in (1, 2))
        latent = (batch, 4, size[1] // 8, size[0] // 8)
        patcher = self._guided(variant)
        return GuidedStep(patcher, positive, negative, variant.cfg, latent, control)

    def _guided(self, variant: Variant) -> Any:
        if variant.method == CFG:
            return self.unet
        if variant.method == PAG:
            node = importlib.import_module("comfy_extras.nodes_pag").PerturbedAttentionGuidance
            return node.execute(self.unet, 3.0)[0]
        if variant.method in RELATIVES:
            return self._relatives(variant.method)
        infinite = math.isinf(variant.sigma)
        width = FINITE if infinite else variant.sigma
        blocks = getattr(self.kind, variant.blocks, variant.blocks)
        reuse = variant.method == SEG_ON
        node = self.seg_node
        return node.execute(
            self.unet,
            3.0,
            infinite,
            width,
            *variant.window,
            blocks=blocks,
            reuse=reuse,
            every=variant.every,
        )[0]

    def _relatives(self, method: str) -> Any:
        if method == CORE_SAG:
            node = importlib.import_module("comfy_extras.nodes_sag").SelfAttentionGuidance
            return node.execute(self.unet, 0.5, 2.0)[0]
        ours = self.seg_node.__module__.rpartition(".")[0]
        model = self.unet
        if "SEG" in method:
            model = self.seg_node.execute(model, 3.0, True, FINITE, 0.0, 1.0)[0]
        for name in ("PAG", "TPG", "SSG", "SLG"):
            if name in method:
                module = importlib.import_module(f"{ours}.{name.lower()}")
                node = getattr(module, f"SEGuidance{name}")
                model = node.execute(model, 3.0, 0.0, 1.0)[0]
        if "SAG" in method:
            node = importlib.import_module(ours + ".sag").SEGuidanceSAG
            model = node.execute(model, 0.5, 2.0, 0.0, 1.0)[0]
        return model
