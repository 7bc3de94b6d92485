"""The report of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from lightning_noise._version import __version__
from lightning_noise.evaluation.results import Cell, Estimate, Values, shares_draws

__all__ = ["FILE", "NUMBERS", "Report", "by_cell"]

FILE = "report.json"
NUMBERS = ("value", "standard_error", "low", "high", "spread")  # of an estimate


@dataclass(frozen=True)
class Report:
    r"""The estimates of an evaluation, and how they were made.

    The 95 % interval of an estimate is :math:`\theta \pm t_{0.975} \, \text{SE}`, with the error of
    :func:`~lightning_noise.metrics.statistics.jackknife_error` over groups of samples. Noise in weights has draws that all
    samples share, so the square of the error over the draws is added. Proportions, such as an accuracy, have Wilson's interval.
    It holds the expected value over data sets of this size in 95 of 100 cases; in fewer if few samples make the value (86 for a
    drop from 2 of 100 samples, 92 for 8 of 400) and in more for an ECE near its floor.

    Attributes:
        task: The name of the task.
        n: The number of samples of which a target counts.
        n_targets: The number of targets that count, of which a sample may have several.
        n_draws: The number of draws of each noise, over which values are averaged.
        seed: The seed of the draws.
        noises: The description of the noise of each name. Equal noises have equal descriptions.
        levels: The levels of each name.
        shared: The names of noises of which all samples share a draw.
        sizes: The number of samples in each group; empty if the metrics know no groups, and then no intervals are known.
        estimates: The estimates.
        units: What the levels of each name are, such as ``"standard deviation"``.
        n_trainings: The number of trainings that the values are the mean of; see :func:`~lightning_noise.report.pool`.
        chance: The accuracy, or the :math:`R^2`, of the best constant guess. ``None`` if the task does not know it.
        version: The version of the package that made the report.

    ``print`` shows a sentence, and a notebook the whole report.

    Example:
        >>> from lightning_noise.evaluation.conditions import CLEAN
        >>> accuracy = Estimate(CLEAN, "accuracy", 0.75)
        >>> report = Report("multiclass", 4, 1, 0, noises={}, levels={}, shared=(), sizes=(), estimates=(accuracy,))
        >>> report.rows[CLEAN, "accuracy"].value
        0.75
    """

    task: str
    n: int
    n_draws: int
    seed: int
    noises: dict[str, str]
    levels: dict[str, tuple[float, ...]]
    shared: tuple[str, ...]
    sizes: tuple[int, ...]
    estimates: tuple[Estimate, ...]
    n_targets: int = 0
    units: dict[str, str] = field(default_factory=dict)
    chance: float | None = None
    n_trainings: int = 1
    version: str = __version__

    @cached_property
    def rows(self) -> dict[Cell, Estimate]:
        """The estimates by condition and metric."""
        return by_cell(self.estimates)

    @property
    def values(self) -> Values:
        """The values by condition and metric."""
        return {cell: estimate.value for cell, estimate in self.rows.items()}

    @cached_property
    def parts(self) -> Values:
        """Each value and then the value without each group of samples, as an array, by condition and metric."""
        return {cell: np.array([estimate.value, *estimate.without]) for cell, estimate in self.rows.items()}

    def draw_error(self, cell: Cell) -> float:
        """Returns the error of draws that all samples share."""
        return self.rows[cell].spread if cell in self.rows and shares_draws(cell[0], self.shared) else 0.0

    def to_pandas(self) -> Any:
        """Returns the estimates as a ``pandas.DataFrame`` with a row for each condition and metric."""
        import pandas as pd

        return pd.DataFrame(
            {"noise": each.condition.noise, "level": each.condition.level, "metric": each.metric}
            | {name: getattr(each, name) for name in NUMBERS}
            for each in self.estimates
        )


def by_cell(estimates: Iterable[Estimate]) -> dict[Cell, Estimate]:
    """Returns the estimates by condition and metric."""
    return {(estimate.condition, estimate.metric): estimate for estimate in estimates}
