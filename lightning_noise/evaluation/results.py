"""What a pass over held-out data measures: metrics without noise and under each noise, level and draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_noise.evaluation.old_tasks import MonitorMetrics
from lightning_noise.metrics.calibration import CalibrationBins
from lightning_noise.metrics.confidence import PredictiveEntropy
from lightning_noise.metrics.functional import robustness_summary

__all__ = ["CLEAN", "Condition", "Estimates", "Measurement"]

CLEAN = "clean"  # the tag of what is measured without noise
_COMPARED = ("accuracy", "loss")  # of which drops are told: the others say more by themselves


class Condition(NamedTuple):
    """The noise that the data were seen through, its level, and which of its draws."""

    noise: str
    level: float = 0.0
    draw: int = 0

    @property
    def place(self) -> str:
        """The part of a key that says so, of which the draw is none."""
        return self.noise if self.noise == CLEAN else f"{self.noise}/{self.level:g}"


Values = Mapping[Condition, Mapping[str, float]]


class Estimates(NamedTuple):
    """Figures, and what tells how sure they are.

    Attributes:
        values: The figures.
        spread: The standard error of each over the draws, where there are several.
        without: The figures without each group of samples in turn, where the metrics keep groups apart.
    """

    values: dict[str, float]
    spread: dict[str, float]
    without: list[dict[str, float]]


class Measurement:
    """Metrics without noise and under each noise, level and draw, of groups of samples.

    Args:
        metrics: Makes the metrics, which are updated with ``preds``, ``target`` and ``clean_preds``, and ``MonitorMetrics``
            with ``groups`` too.
        n_groups: The number of groups.
        logged: The names of the metrics that are logged and summarized; left out, all.
        chance: The accuracy of a guess, where there is one.
        weights: The tags of noises in weights.
    """

    def __init__(
        self,
        metrics: Callable[[], MetricCollection],
        n_groups: int,
        *,
        logged: Collection[str] | None = None,
        chance: float | None = None,
        weights: Collection[str] = (),
    ):
        self.metrics: dict[Condition, MetricCollection] = {}
        self.sizes = torch.zeros(n_groups, dtype=torch.long)
        self.weights = weights
        self._make = metrics
        self._logged = logged
        self._chance = chance

    def read(self, preds: Tensor) -> Any:
        """Returns predictions without noise as the metrics of all noises and levels can be given them, to read them once."""
        metrics = self._of(Condition(CLEAN), preds)
        return metrics.read(preds) if isinstance(metrics, MonitorMetrics) else preds

    def update(self, condition: Condition, preds: Tensor, target: Tensor, clean_preds: Any, groups: Tensor) -> None:
        """Adds predictions of samples of these groups."""
        metrics = self._of(condition, preds)
        if condition.noise == CLEAN:
            self.sizes = self.sizes.to(groups.device).index_add_(0, groups, torch.ones_like(groups))
        if len(target):
            more = {"groups": groups} if isinstance(metrics, MonitorMetrics) else {}
            metrics.update(preds=preds, target=target, clean_preds=clean_preds, **more)

    def _of(self, condition: Condition, preds: Tensor) -> MetricCollection:
        if condition not in self.metrics:
            self.metrics[condition] = self._make().to(preds.device)
        return self.metrics[condition]

    def figures(self) -> dict[str, float]:
        """Returns what is logged: the metrics, averaged over the draws, with the errors of these means, and their summary."""
        values = {condition: self._brief(_values_of(metrics)) for condition, metrics in self.metrics.items()}
        return self._summarized(values) | _errors_of_means(values)

    def estimates(self) -> Estimates:
        """Returns all that was measured and its summary, and what tells how sure it is."""
        found = {condition: _estimates_of(metrics) for condition, metrics in self.metrics.items()}
        values = {condition: total for condition, (total, _) in found.items()}
        n_parts = min(len(without) for _, without in found.values())
        parts = [{condition: without[group] for condition, (_, without) in found.items()} for group in range(n_parts)]
        return Estimates(self._summarized(values), self._spread(values), [self._summarized(part) for part in parts])

    def calibration(self) -> dict[Condition, list[Tensor]]:
        """Returns the sums in bins of the confidence, for reliability diagrams, of the first draw of each level."""
        return {condition: bins.bins() for condition, bins in self._first("calibration") if isinstance(bins, CalibrationBins)}

    def entropies(self) -> dict[Condition, tuple[list[float], list[int]]]:
        """Returns the edges and the counts of a histogram of the entropy, of the first draw of each level."""
        return {
            condition: entropy.histogram()
            for condition, entropy in self._first("entropy")
            if isinstance(entropy, PredictiveEntropy)
        }

    def _first(self, name: str) -> Iterator[tuple[Condition, Metric]]:
        """The metric of that name, where there is one, of the first draw of each level."""
        for condition, metrics in self.metrics.items():
            if condition.draw == 0 and name in metrics:
                yield condition, metrics[name]

    def _summarized(self, values: Values) -> dict[str, float]:
        averaged = {
            condition: {key: fmean(found[key] for found in draws) for key in draws[0]} for condition, draws in _drawn(values)
        }
        flat = {f"{condition.place}/{key}": value for condition, found in averaged.items() for key, value in found.items()}
        clean = averaged.pop(Condition(CLEAN))
        noisy = {(condition.noise, condition.level): self._brief(found) for condition, found in averaged.items()}
        compared = {key: value for key, value in clean.items() if self._logged is None or key in _COMPARED}
        return flat | robustness_summary(compared, noisy, self._chance, weights=self.weights)

    def _brief(self, found: Mapping[str, float]) -> dict[str, float]:
        """What is logged and summarized."""
        return {key: value for key, value in found.items() if self._logged is None or key in self._logged}

    def _spread(self, values: Values) -> dict[str, float]:
        """The standard error of each figure over the draws."""
        n_draws = 1 + max(condition.draw for condition in values)
        if n_draws == 1:
            return {}
        of_draws = [
            # each as if it were the only one
            self._summarized(
                {place._replace(draw=0): x for place, x in values.items() if place.noise == CLEAN or place.draw == draw}
            )
            for draw in range(n_draws)
        ]
        return {key: _error_of_mean([figures[key] for figures in of_draws]) for key in of_draws[0]}


def _values_of(metrics: MetricCollection) -> dict[str, float]:
    return metrics.totals() if isinstance(metrics, MonitorMetrics) else _floats(metrics.compute())


def _estimates_of(metrics: MetricCollection) -> tuple[dict[str, float], list[dict[str, float]]]:
    return metrics.estimates() if isinstance(metrics, MonitorMetrics) else (_floats(metrics.compute()), [])


def _floats(computed: Mapping[str, Any]) -> dict[str, float]:
    for key, value in computed.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"a metric must be one number to be logged, but {key!r} is {value!r}; choose an average for it")
    return {key: value.item() for key, value in computed.items()}


def _drawn(values: Values) -> Iterator[tuple[Condition, list[Mapping[str, float]]]]:
    """The first draw of each noise and level, with the values of all its draws."""
    for first in (condition for condition in values if condition.draw == 0):
        yield first, [found for condition, found in values.items() if condition.place == first.place]


def _errors_of_means(values: Values) -> dict[str, float]:
    """The standard error over the draws of each mean, where there are several draws."""
    return {
        f"{condition.place}/{key}_se": _error_of_mean([found[key] for found in draws])
        for condition, draws in _drawn(values)
        if len(draws) > 1
        for key in draws[0]
    }


def _error_of_mean(values: Sequence[float]) -> float:
    """The standard error of the mean of several values; NaN where one is not finite, of which `stdev` makes an error."""
    return stdev(values) / len(values) ** 0.5 if all(map(math.isfinite, values)) else math.nan
