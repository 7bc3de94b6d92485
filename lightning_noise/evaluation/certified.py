"""How much of held-out data a smoothed model certifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_noise.evaluation.positions import check_ranks, sum_over_ranks
from lightning_noise.evaluation.smoothing import Norm
from lightning_noise.metrics.statistics import Interval, wilson_interval

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Certified", "Tally"]


@dataclass(frozen=True)
class Certified:
    """How much of held-out data a smoothed model certifies.

    Attributes:
        sigma: The level of the noise.
        norm: The norm of the radii.
        n: The number of targets that count.
        radii: Radii from 0 to the largest that can be certified.
        accuracies: The certified accuracy at each radius: the share whose class is right and certified at least so far.
        radius: The average certified radius, with 0 for a wrong class or an abstention.
        abstentions: The share of abstentions.
        clean: The accuracy of the model itself, without noise.
    """

    sigma: float
    norm: Norm
    n: int
    radii: tuple[float, ...]
    accuracies: tuple[float, ...]
    radius: float
    abstentions: float
    clean: float

    def accuracy(self, radius: float = 0.0) -> float:
        """Returns the certified accuracy at a radius, or at the next larger one that is known."""
        place = int(np.searchsorted(self.radii, radius))
        return self.accuracies[place] if place < len(self.radii) else 0.0

    def interval(self, radius: float = 0.0) -> Interval:
        """Returns the 95 % interval of the certified accuracy over samples of the same kind."""
        value = self.accuracy(radius)
        return wilson_interval(value, [((value * (1 - value) / max(1, self.n)) ** 0.5, max(1, self.n - 1))], max(1, self.n))


class Tally:
    """Counts what is certified.

    Args:
        radii: Radii from 0 on at which the certified accuracy is known.
    """

    def __init__(self, radii: Sequence[float]):
        self.radii = np.unique([0.0, *radii])
        self.reset()

    def reset(self) -> None:
        """Forgets all samples."""
        self.saw_batch = False
        self._counts = np.zeros(3 + len(self.radii), int)  # all, abstentions, right without noise, right at each radius
        self._total = 0.0

    def add(self, classes: np.ndarray, radii: np.ndarray, clean: np.ndarray, target: np.ndarray) -> None:
        """Adds certified classes and radii, the classes without noise, and the target, each of shape (N,)."""
        reached = radii[classes == target]
        n_right = len(reached) - np.searchsorted(np.sort(reached), self.radii)
        self._counts += [len(target), (classes < 0).sum(), (clean == target).sum(), *n_right]
        self._total += reached.sum()
        self.saw_batch = True

    def gather(self, trainer: Trainer, name: str) -> None:
        """Sums the counts over all ranks. Raises a ValueError on all ranks if a rank saw no batch."""
        check_ranks(trainer, name, self.saw_batch)
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            own = [torch.tensor(self._counts, device=device), torch.tensor([self._total], device=device)]
            counts, total = sum_over_ranks(trainer, own)
            self._counts, self._total = counts.cpu().numpy(), total.item()
        if not self._counts[0]:
            rank_zero_warn(f"{name} saw no target that counts: all are NaN or the ignore_index, so all its values are NaN")

    def result(self, sigma: float, norm: Norm) -> Certified:
        """Returns the shares of what was counted."""
        with np.errstate(invalid="ignore"):
            n = int(self._counts[0])
            abstentions, clean, *right = (self._counts[1:] / np.float64(n)).tolist()
            radius = float(np.float64(self._total) / n)
        return Certified(sigma, norm, n, tuple(self.radii.tolist()), tuple(right), radius, abstentions, clean)
