"""The range test of noise levels, from counts of wrong predictions at several levels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from matplotlib.figure import Figure

from lightning_noise import plots
from lightning_noise.metrics.robustness import retention as retention_of
from lightning_noise.report.markdown import capitalize, column_of, grid

__all__ = ["Criterion", "RangeTest", "default_levels", "find_crossing"]

_LOWEST, _HIGHEST, _PER_DECADE = 0.01, 10.0, 4


@dataclass(frozen=True)
class RangeTest:
    """The result of :func:`~lightning_noise.suggest_level`.

    Attributes:
        level: The suggested level. NaN if the curve does not reach the wanted value.
        curve: The retention or the flip rate at each level.
        wanted: The retention or the flip rate at the suggested level.
        measured: ``"retention"`` or ``"flip_rate"``.
        accuracies: The accuracy at each level, where level 0 is without noise. Empty without labels.
        n: The number of predictions that were compared at each level.
        unit: What the level is, such as ``"standard deviation"``.

    ``print`` and a notebook show the result as a table.

    Example:
        >>> result = RangeTest(0.1, {0.01: 1.0, 0.1: 0.9, 1.0: 0.2}, 0.9, "retention", {}, 1000, "standard deviation")
        >>> print(result)
        Level 0.1 (standard deviation): skill retained 90 %. 1,000 predictions at each level.
        <BLANKLINE>
        | standard deviation | skill retained, % |
        | ------------------ | ----------------- |
        | 0.01               | 100.0             |
        | 0.1                | 90.0              |
        | 1                  | 20.0              |
        >>> result.figure().axes[0].get_xlabel()
        'standard deviation'
    """

    level: float
    curve: dict[float, float]
    wanted: float
    measured: Literal["retention", "flip_rate"]
    accuracies: dict[float, float]
    n: int
    unit: str = "level"

    def figure(self) -> Figure:
        """Returns a plot of the curve that marks the suggested level; see :func:`~lightning_noise.plots.range_test`."""
        return plots.range_test(self.curve, self.level, self.wanted, metric=self.measured, unit=self.unit)

    def explain(self) -> str:
        """Returns why no level is suggested, and which levels to try."""
        (lowest, first), *_, (highest, last) = self.curve.items()
        too_low = first > self.wanted if self.measured == "retention" else first < self.wanted
        levels = f"above {highest:g}, if they have a meaning" if too_low else f"below {lowest:g}"
        return (
            f"no level is suggested: the {self.measured.replace('_', ' ')} goes from {first:.3g} at {lowest:g} to {last:.3g} "
            f"at {highest:g} and does not reach {self.wanted:g}; give levels {levels}"
        )

    def __str__(self) -> str:
        return self._repr_markdown_().replace("*", "").rstrip()

    def _repr_markdown_(self) -> str:
        columns = [column_of(self.measured), *([column_of("accuracy")] if self.accuracies else [])]
        found = f"**Level {self.level:.2g}** ({self.unit}): {columns[0].name} {columns[0].factor * self.wanted:g} %"
        rows = []
        for level, value in sorted(self.curve.items()):
            values = [value, *([self.accuracies[level]] if self.accuracies else [])]
            rows.append([f"{level:g}", *(f"{column.factor * x:.1f}" for column, x in zip(columns, values, strict=True))])
        table = grid([self.unit, *(column.heading for column in columns)], rows)
        outcome = f"{found}." if math.isfinite(self.level) else f"{capitalize(self.explain())}."
        return f"{outcome} {self.n:,} predictions at each level.\n\n{table}\n"


@dataclass(frozen=True)
class Criterion:
    """The value that a model reaches at the suggested level.

    Args:
        measured: ``"retention"``, the share of the skill above chance that the model retains, or ``"flip_rate"``, the share of
            the predictions that the noise changes.
        wanted: The value, in (0, 1).
    """

    measured: Literal["retention", "flip_rate"]
    wanted: float

    def __post_init__(self):
        if not 0 < self.wanted < 1:
            raise ValueError(f"{self.measured} must be in (0, 1), got {self.wanted}")

    def evaluate(self, levels: Sequence[float], wrong: Sequence[int], n: int, chance: float) -> RangeTest:
        """Returns the range test of counts.

        Args:
            levels: The levels.
            wrong: The number of wrong predictions, without noise and at each level. Without labels, a prediction is wrong if
                it differs from the prediction without noise.
            n: The number of predictions at each level.
            chance: The accuracy of the best constant guess.

        Raises:
            ValueError: If the model has no skill to retain.
        """
        if self.measured == "flip_rate":
            curve = {level: count / n for level, count in sorted(zip(levels, wrong[1:], strict=True))}
            level = find_crossing({level: -value for level, value in curve.items()}, -self.wanted)
            return RangeTest(level, curve, self.wanted, self.measured, {}, n)
        accuracies = {level: (n - count) / n for level, count in zip((0.0, *levels), wrong, strict=True)}
        clean = accuracies[0.0]
        if clean <= chance:
            raise ValueError(
                f"the accuracy without noise, {clean:.3g}, is not above that of a constant guess, {chance:.3g}, so there is no "
                "skill to retain: train the module first, or give flip_rate=0.1, which compares with the predictions without "
                "noise"
            )
        curve = {level: retention_of(accuracies[level], clean, chance) for level in sorted(levels)}
        return RangeTest(find_crossing(curve, self.wanted), curve, self.wanted, self.measured, accuracies, n)


def find_crossing(curve: Mapping[float, float], wanted: float) -> float:
    """Returns the lowest level at which a falling curve reaches a value, or NaN if it does not.

    Between two levels, the curve is a straight line over the logarithm of the level.

    Args:
        curve: The value at each level, from the lowest level to the highest.
        wanted: The value.

    Example:
        >>> find_crossing({0.01: 1.0, 1.0: 0.0}, 0.5)
        0.1
    """
    if next(iter(curve.values())) < wanted:  # the curve reaches the value below the lowest level
        return math.nan
    for (low, above), (high, below) in pairwise(curve.items()):
        if above >= wanted >= below and above > below:
            return low * (high / low) ** ((above - wanted) / (above - below))
    return math.nan


def default_levels(max_level: float) -> list[float]:
    """Returns levels in equal ratios, four per factor of ten, from 0.01 to 10 or the largest level that has a meaning.

    Example:
        >>> default_levels(0.1)
        [0.01, 0.0178, 0.0316, 0.0562, 0.1]
    """
    highest = _HIGHEST if max_level == math.inf else max_level
    n = round(_PER_DECADE * math.log10(highest / _LOWEST))
    return [float(f"{_LOWEST * (highest / _LOWEST) ** (i / n):.3g}") for i in range(n + 1)]
