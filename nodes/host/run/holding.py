"""Differences that are held: `every` n-th evaluation alone computes a branch's prediction anew."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from ....seg_core import held_difference

Place = Hashable


@dataclass(eq=False)
class Held:
    """The difference of the ordinary and the perturbed prediction, as it was last computed.

    Attributes:
        difference: of the denoised predictions.
        sigma: the noise level then.
        conds: the prompts that were active then.
        uses: evaluations that it has stood in for since.
    """

    difference: torch.Tensor
    sigma: torch.Tensor
    conds: frozenset[Hashable]
    uses: int = 0


class Holding:
    """What one branch holds in one run, for each place of the latent.

    Attributes:
        every: one in so many evaluations of a place is computed.
        checks: relative distance and cosine of what was computed and what would have been held,
            each time that a difference was computed again.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.checks: list[torch.Tensor] = []
        self._held: dict[Place, Held] = {}

    def stands_in(self, place: Place) -> bool:
        """Tell whether a held difference stands in for the next evaluation of a place."""
        held = self._held.get(place)
        return held is not None and held.uses + 1 < self.every

    def take(
        self, place: Place, sigma: torch.Tensor, conds: frozenset[Hashable]
    ) -> torch.Tensor | None:
        """Return what is held, at another noise level; None if it has to be computed."""
        held = self._held.get(place)
        if held is None or held.conds != conds or not self.stands_in(place):
            return None
        held.uses += 1
        return held_difference(held.difference, held.sigma, sigma)

    def keep(
        self,
        place: Place,
        difference: torch.Tensor,
        sigma: torch.Tensor,
        conds: frozenset[Hashable],
    ) -> None:
        """Hold a difference that was computed, and compare it with what was held until now."""
        if self.every == 1:
            return
        before = self._held.get(place)
        if before is not None and before.conds == conds:
            self.checks.append(_agreement(difference, before, sigma))
        self._held[place] = Held(difference, sigma.clone(), conds)

    def agreement(self) -> tuple[float, float] | None:
        """Return the mean distance and cosine of the checks; None if there was none."""
        if not self.checks:
            return None
        distance, cosine = torch.stack(self.checks).nanmean(dim=0).tolist()
        return distance, cosine

    def clear(self) -> None:
        """Let go of every difference."""
        self._held.clear()


class Places:
    """Which part of the latent each evaluation of a run is of.

    The latent as a whole is one place, however often it is evaluated at a noise level. Tiles and
    parts of a batch have another shape: they are told apart by their order at each noise level.

    Args:
        whole: shape of the run's latent; None if it is not known.
    """

    def __init__(self, whole: torch.Size | None) -> None:
        self._whole = whole
        self._sigma = torch.inf
        self._seen = 0

    def of(self, latent: torch.Tensor, noise_level: Callable[[], float]) -> Place:
        """Return the place of the next evaluation; the noise level is asked for if it matters."""
        if latent.shape == self._whole:
            return ()
        noise_sigma = noise_level()
        self._seen = self._seen + 1 if noise_sigma == self._sigma else 0
        self._sigma = noise_sigma
        return latent.shape, self._seen


def _agreement(difference: torch.Tensor, held: Held, sigma: torch.Tensor) -> torch.Tensor:
    """Return how far a difference is from what was held, as a share of it, and their cosine."""
    own = difference.float().flatten()
    expected = held_difference(held.difference, held.sigma, sigma).float().flatten()
    size = own.dot(own).sqrt()
    off = own - expected
    cosine = own.dot(expected) / (size * expected.dot(expected).sqrt())
    return torch.stack([off.dot(off).sqrt() / size, cosine])
