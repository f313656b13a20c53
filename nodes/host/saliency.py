"""Self-Attention Guidance in a sampling step: the mask from the main pass, the blurred latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.samplers
import torch

from ...seg_core import Target, TokenGrid, column_mass, degrade, spread_mass
from .call import Call
from .perturbation import Perturbation, Start

if TYPE_CHECKING:
    from .sampling import Step


@dataclass(frozen=True)
class Mass:
    """How much attention each token of one cond drew in a block."""

    mass: torch.Tensor
    grid: TokenGrid


@dataclass(frozen=True, eq=False)
class Watched:
    """Self-attention blocks of a network whose maps say where to blur."""

    network: Any
    targets: tuple[Target, ...]


@dataclass(frozen=True, eq=False)
class InputBlur(Perturbation):
    """Starts the perturbed pass from a latent whose predicted image is blurred in places.

    Source: SAG, arXiv:2210.00939. The attention of each cond is measured in the main pass, over
    chunks of queries, and weighed over the latent as the host weighs the cond's prediction.
    """

    label: str
    watched: Watched | None
    sigma: float
    kernel: str
    threshold: float

    network = None
    targets: tuple[Target, ...] = ()

    @property
    def watches_main_pass(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True if the mask comes from attention."""
        return self.watched is not None

    @property
    def where(self) -> str:
        """Return what it acts on, for the log."""
        if self.watched is None:
            return "everywhere"
        return f"where {self.watched.network.describe(self.watched.targets)} looks"

    def watch(self, call: Call, step: Step) -> None:
        """Measure the attention of the conds of one call of the main pass."""
        if self.watched is None:
            return
        wanted = step.watched(self)
        chunks = [i for i, uuid in enumerate(call.uuids) if wanted is None or uuid in wanted]
        if not chunks:
            return
        if call.place is not None or (step.x is not None and call.rows(0).stop != len(step.x)):
            raise ValueError(
                f"{self.label}: the mask from attention does not work with context windows. "
                "Set mask to 'everywhere'."
            )

        def keep(target: Target, q: torch.Tensor, k: torch.Tensor, heads: int, grid: Any) -> None:
            frames = q.shape[0] // call.x.shape[0]
            for chunk in chunks:
                rows = slice(call.rows(chunk).start * frames, call.rows(chunk).stop * frames)
                masses = step.run.masses.setdefault((self, call.uuids[chunk]), {})
                masses[target] = Mass(column_mass(q[rows], k[rows], heads), grid)

        self.watched.network.watch(call, self.watched.targets, keep)

    def start(self, step: Step, args: dict[str, Any], conds: Any, prediction: Any) -> Start | None:
        """Return the latent with the blurred image in it, under the same noise."""
        mask: torch.Tensor | float = 1.0
        if self.watched is not None:
            mass = self._mass(step, args["input"], args["sigma"], conds)
            if mass is None:
                return None
            mask = (mass > self.threshold).to(mass.dtype)
        blurred = degrade(prediction, mask, self.sigma, kernel=self.kernel)
        return Start(args["input"] + (blurred - prediction), blurred)

    def _mass(
        self, step: Step, x: torch.Tensor, sigma: torch.Tensor, conds: list[dict[str, Any]]
    ) -> torch.Tensor | None:
        """Return the attention over the latent, each cond weighed as in the prediction."""
        total = x.new_zeros(x.shape[0], 1, *x.shape[2:])
        weights = torch.full_like(total, 1e-37)
        for cond in conds:
            placed = comfy.samplers.get_area_and_mult(cond, x, sigma)
            if placed is None:  # outside the cond's own range of steps
                continue
            masses = step.run.masses.get((self, cond["uuid"]))
            if not masses:
                step.run.report.warn_once(
                    f"{self.label}: no attention was seen for a prompt, because another node "
                    "answered for the model. It pauses until there is some."
                )
                return None
            maps = [spread_mass(m.mass, m.grid, placed.mult.shape[2:]) for m in masses.values()]
            weight = placed.mult[:, :1]
            seen = torch.stack(maps).mean(dim=0).to(weight.dtype) * weight
            for whole, part in ((total, seen), (weights, weight)):
                _narrowed(whole, placed.area).add_(part)
        return total / weights


def _narrowed(whole: torch.Tensor, area: list[int] | None) -> torch.Tensor:
    """Return the part of a latent that a cond's area covers, as the host lays it out."""
    if area is None:
        return whole
    dims = len(area) // 2
    for dim in range(dims):
        whole = whole.narrow(dim + 2, area[dim + dims], area[dim])
    return whole
