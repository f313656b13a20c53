"""Differences that are held: only every n-th evaluation computes a branch's prediction anew."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from ....seg_core import held_difference

Conds = frozenset[Hashable]
_ROUNDING = 1e-3
"""By what share a noise level may rise in a sampler's arithmetic alone."""


@dataclass(eq=False)
class Held:
    """The difference of the ordinary and the perturbed prediction, as it was last computed.

    Attributes:
        difference: of the denoised predictions.
        noise_sigma: the noise level then.
        conds: the prompts that were active then.
        uses: evaluations that it has stood in for since.
    """

    difference: torch.Tensor
    noise_sigma: float
    conds: Conds
    uses: int = 0

    def lasts_to(self, noise_sigma: float) -> bool:
        """Tell whether it may stand in at a noise level: at its own, or a lower one.

        Held in noise, it grows with the noise level. Where that rises again, as in schedules that
        restart, its error would grow without bound: what the last details depend on says nothing of
        the composition.
        """
        return noise_sigma <= (1 + _ROUNDING) * self.noise_sigma

    def at(self, noise_sigma: float) -> torch.Tensor:
        """Return the difference to expect at another noise level."""
        # Filled in on the device: a copy from the CPU would wait for it.
        levels = (self.noise_sigma, noise_sigma)
        then, now = (torch.full((1,), one, device=self.difference.device) for one in levels)
        return held_difference(self.difference, then, now)


class Holding:
    """What one branch holds in one run, for each place of the latent.

    The latent as a whole is one place, however often it is evaluated at a noise level. Tiles and
    parts of a batch have another shape: they are told apart by their order at each noise level.

    Attributes:
        every: one in so many evaluations of a place is computed.
        whole: shape of the run's latent; None if it is not known.
        checks: relative distance and cosine of what was computed and what would have been held,
            each time that a difference was computed again.
    """

    def __init__(self, every: int, whole: torch.Size | None) -> None:
        self.every = every
        self.whole = whole
        self.checks: list[torch.Tensor] = []
        self._held: dict[Hashable, Held] = {}
        self._place: Hashable = None
        self._noise_sigma = torch.inf
        self._turn = 0

    def begin(self, latent: torch.Tensor, noise_sigma: float) -> None:
        """Note what the next evaluation is of: a part of the latent, and its noise level."""
        self._turn = self._turn + 1 if noise_sigma == self._noise_sigma else 0
        self._noise_sigma = noise_sigma
        self._place = "whole" if latent.shape == self.whole else (latent.shape, self._turn)

    @property
    def stands_in(self) -> bool:
        """Tell whether a held difference stands in for this evaluation's."""
        held = self._held.get(self._place)
        if held is None or held.uses + 1 >= self.every:
            return False
        return held.lasts_to(self._noise_sigma)

    def take(self, conds: Conds) -> torch.Tensor | None:
        """Return what is held, at the present noise level; None if it has to be computed."""
        held = self._held.get(self._place)
        if held is None or held.conds != conds or not self.stands_in:
            return None
        held.uses += 1
        return held.at(self._noise_sigma)

    def keep(self, difference: torch.Tensor, conds: Conds) -> None:
        """Hold a difference that was computed, and compare it with what was held until now."""
        if self._place is None:
            return
        before, noise_sigma = self._held.get(self._place), self._noise_sigma
        if before is not None and before.conds == conds and before.lasts_to(noise_sigma):
            self.checks.append(_agreement(difference, before.at(noise_sigma)))
        self._held[self._place] = Held(difference, noise_sigma, conds)

    def clear(self) -> None:
        """Let go of every difference."""
        self._held.clear()


def _agreement(difference: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Return how far a difference is from what was held, as a share of it, and their cosine."""
    own, expected = difference.float().flatten(), held.float().flatten()
    size = own.dot(own).sqrt()
    off = own - expected
    cosine = own.dot(expected) / (size * expected.dot(expected).sqrt())
    return torch.stack([off.dot(off).sqrt() / size, cosine])
