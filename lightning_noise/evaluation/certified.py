"""How much of held-out data a smoothed model certifies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_noise.evaluation.engine import Pass
from lightning_noise.evaluation.positions import N_GROUPS, are_copies, check_parts, check_ranks, sum_over_ranks
from lightning_noise.evaluation.smoothing import Norm
from lightning_noise.metrics.statistics import jackknife_error, wilson_interval

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
        low: The lower limit of the 95 % interval of each accuracy over samples of the same kind; NaN if it is not known.
        high: The upper limit.
        radius: The average certified radius, with 0 for a wrong class or an abstention.
        abstentions: The share of abstentions.
        clean: The accuracy of the model itself, without noise.
    """

    sigma: float
    norm: Norm
    n: int
    radii: tuple[float, ...]
    accuracies: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    radius: float
    abstentions: float
    clean: float

    def __str__(self) -> str:
        return (
            f"{100 * self.accuracy():.3g} % of {self.n:,} targets are right and certified, with a radius of {self.radius:.3g} "
            "on average"
        )

    def accuracy(self, radius: float = 0.0) -> float:
        """Returns the certified accuracy at a radius, or at the next larger one that is known."""
        return self._at(radius, self.accuracies)

    def interval(self, radius: float = 0.0) -> tuple[float, float]:
        """Returns the 95 % interval of the certified accuracy over samples of the same kind."""
        return self._at(radius, self.low), self._at(radius, self.high)

    @classmethod
    def read(cls, path: str | Path) -> Certified:
        """Reads a result from a ``certified.json``. Null becomes NaN. A file that holds no result is a ValueError."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            found = json.loads(text.replace("null", "NaN"))
            curve = {name: tuple(found.pop(name)) for name in ("radii", "accuracies", "low", "high")}
            return cls(**curve, **found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # no JSON, or other fields
            raise ValueError(
                f"{path} is not a result that can be read ({type(error).__name__}: {error}); give a certified.json that a "
                "RandomizedSmoothing has written"
            ) from error

    def write(self, path: Path) -> None:
        """Writes the attributes as JSON. NaN becomes null."""
        path.write_text(json.dumps(asdict(self)).replace("NaN", "null"), encoding="utf-8")

    def _at(self, radius: float, values: tuple[float, ...]) -> float:
        place = int(np.searchsorted(self.radii, radius))
        return values[place] if place < len(values) else 0.0  # more than n draws can certify


class Tally:
    """Counts what is certified, for each group of samples.

    Args:
        radii: Radii from 0 on at which the certified accuracy is known.
    """

    def __init__(self, radii: Sequence[float]):
        self.radii = np.unique([0.0, *radii])
        self.reset()

    def reset(self) -> None:
        """Forgets all samples."""
        self.saw_batch = False
        self._sizes = np.zeros(N_GROUPS, int)  # the number of samples
        self._reached = np.zeros((N_GROUPS, 1 + len(self.radii)), int)  # of targets, by how many radii are certified
        self._others = np.zeros(2, int)  # abstentions, and targets that are right without noise
        self._total = np.zeros(1)  # of the radii

    def add(
        self,
        classes: np.ndarray,
        radii: np.ndarray,
        clean: np.ndarray,
        target: np.ndarray,
        groups: np.ndarray,
        samples: np.ndarray,
    ) -> None:
        """Adds targets.

        Args:
            classes: The certified class of each target, of shape (N,).
            radii: The certified radii.
            clean: The classes without noise.
            target: The targets.
            groups: The group of the sample of each target.
            samples: The group of each sample.
        """
        radii, right = np.where(classes == target, radii, 0.0), classes == target
        n_reached = np.where(right, np.searchsorted(self.radii, radii, side="right"), 0)
        np.add.at(self._reached, (groups, n_reached), 1)
        self._sizes += np.bincount(samples, minlength=N_GROUPS)
        self._others += [(classes < 0).sum(), (clean == target).sum()]
        self._total += radii.sum()
        self.saw_batch = True

    def gather(self, trainer: Trainer, name: str, read: Pass) -> None:
        """Sums the counts of a pass over all ranks. Raises a ValueError on all ranks if a rank saw no batch."""
        check_ranks(trainer, name, self.saw_batch)
        if trainer.world_size > 1:
            parts = (self._sizes, self._reached, self._others, self._total)
            own = [torch.from_numpy(part).to(trainer.strategy.root_device) for part in parts]
            if not are_copies(trainer, own, read.dataloader_idx):
                check_parts(trainer, name, read.samples, read.dataloader_idx)
                own = sum_over_ranks(trainer, own)
            self._sizes, self._reached, self._others, self._total = (part.cpu().numpy() for part in own)
        if not self._reached.any():
            rank_zero_warn(f"{name} saw no target that counts: all are NaN or the ignore_index, so all its values are NaN")

    @np.errstate(invalid="ignore", divide="ignore")
    def result(self, sigma: float, norm: Norm) -> Certified:
        """Returns the shares of what was counted."""
        right = self._reached[:, :0:-1].cumsum(1)[:, ::-1].T  # at least so many radii
        of_group, n = self._reached.sum(1), self._reached.sum()
        accuracies, without = right.sum(1) / n, (right.sum(1)[:, None] - right) / (n - of_group)
        error = jackknife_error(accuracies, without, self._sizes.tolist())
        _, low, high = wilson_interval(accuracies, [(error, (self._sizes > 0).sum() - 1)], self._sizes.sum())
        curve = {"radii": self.radii, "accuracies": accuracies, "low": low, "high": high}
        radius, abstentions, clean = (np.append(self._total, self._others) / n).tolist()
        return Certified(
            sigma=sigma,
            norm=norm,
            n=int(n),
            **{name: tuple(values.tolist()) for name, values in curve.items()},
            radius=radius,
            abstentions=abstentions,
            clean=clean,
        )
