"""Results of an evaluation: the metrics under each condition, with their errors, as rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_noise.evaluation.conditions import CLEAN, NOISY, OVERALL, WORST, Condition
from lightning_noise.evaluation.engine import Reading
from lightning_noise.evaluation.positions import N_GROUPS, check_ranks
from lightning_noise.metrics.robustness import area_under_curve, retention
from lightning_noise.metrics.statistics import jackknife_error, t_interval, wilson_interval
from lightning_noise.tasks import GroupedMetrics, Task, TaskMetrics

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Estimate", "Results", "Values", "estimate", "summarize"]

Values = Mapping[tuple[Condition, str], float]
"""The value of each metric under each condition."""

_AT_ONCE = 2**16  # numbers in the predictions of small batches, whose calls would take longer than their sums
_NOT_AVERAGED = ("ece_z", "ece_p")  # the mean of p-values is not a p-value


@dataclass(frozen=True)
class Estimate:
    """A metric under a condition, with its 95 % interval.

    Attributes:
        condition: The condition.
        metric: The name of the metric.
        value: The value.
        standard_error: The standard error.
        low: The lower limit of the interval.
        high: The upper limit of the interval.
        spread: The standard error over the draws, 0 with a single draw.
        without: The value without each group of samples, for errors of differences and ratios.
    """

    condition: Condition
    metric: str
    value: float
    standard_error: float = math.nan
    low: float = math.nan
    high: float = math.nan
    spread: float = field(default=0.0, repr=False)
    without: tuple[float, ...] = field(default=(), repr=False)


class Results:
    """Metrics of a task under each condition.

    Args:
        task: The task.
        shared: The names of noises of which all samples share a draw, as in weights.
        only_governed: Whether only the metric that adaptive levels follow is computed.

    Attributes:
        metrics: The metrics under each condition.
        chance: The governed metric of a guess, or ``None`` if the task does not know it.
    """

    def __init__(self, task: Task, shared: Collection[str] = (), *, only_governed: bool = False):
        self.task = task
        self.shared = shared
        self.only_governed = only_governed
        self._metrics: dict[Condition, TaskMetrics] = {}
        self._idle: dict[Condition, TaskMetrics] = {}  # of earlier readings
        self.chance: float | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets all readings. Metrics are used again, because a metric of torchmetrics refers to itself and is freed late."""
        for metrics in self._metrics.values():
            metrics.reset()
        self._idle, self._metrics = self._idle | self._metrics, {}
        self._waiting: dict[Condition, list[dict[str, Any]]] = {}  # what small batches will add to the metrics
        self._n_waiting = 0
        self.is_empty = True
        self._sizes = torch.zeros(N_GROUPS, dtype=torch.long)  # the number of samples in each group
        self._n_targets = 0

    @property
    def metrics(self) -> dict[Condition, TaskMetrics]:
        """The metrics under each condition."""
        self._add_all()
        return self._metrics

    def update(self, readings: Iterable[Reading]) -> None:
        """Adds the readings of a batch. The reading without noise comes first."""
        is_small = False
        for condition, _, _, preds, target, groups, samples in readings:
            metrics = self._metrics_of(condition, preds, groups.device)
            if condition == CLEAN:
                self.is_empty = False
                self.chance = self.task.chance(preds)
                self._sizes = self._sizes.to(groups.device).index_add_(0, samples, torch.ones_like(samples))
                self._n_targets += target.numel()
                is_small = isinstance(metrics, GroupedMetrics) and isinstance(preds, Tensor) and preds.numel() < _AT_ONCE // 4
                if not is_small or not self._can_wait(preds, target):
                    self._add_all()
                self._n_waiting += preds.numel() if is_small else 0
            # copies, because the step may write to the target, and predictions may be a view of a large tensor
            added = {"preds": preds.clone(), "target": target.clone()} if is_small else {"preds": preds, "target": target}
            self._waiting.setdefault(condition, []).append({**added, "groups": groups})
            if not is_small:
                self._add(condition)
        if self._n_waiting >= _AT_ONCE:
            self._add_all()

    def _can_wait(self, preds: Tensor, target: Tensor) -> bool:
        """Returns whether the predictions fit those of the batches before."""
        before = self._waiting[CLEAN][-1] if self._waiting else {"preds": preds, "target": target}
        return before["preds"].shape[1:] == preds.shape[1:] and before["target"].shape[1:] == target.shape[1:]

    def _add_all(self) -> None:
        """Adds the batches that wait to the metrics."""
        for condition in list(self._waiting):
            self._add(condition)
        self._n_waiting = 0

    def _add(self, condition: Condition) -> None:
        batches = self._waiting.pop(condition)
        added = batches[0] if len(batches) == 1 else {key: torch.cat([each[key] for each in batches]) for key in batches[0]}
        if not len(added["groups"]):  # a batch may be all padding
            return
        metrics = self._metrics[condition]
        if condition == CLEAN:
            self._clean_preds = added["preds"] = metrics.read(added["preds"])
        metrics.update(clean_preds=self._clean_preds, **added)

    def _metrics_of(self, condition: Condition, preds: Any, device: torch.device) -> TaskMetrics:
        if condition not in self._metrics:
            metrics = self._idle.pop(condition, None) or self._create(preds)
            self._metrics[condition] = metrics.to(device)
        return self._metrics[condition]

    def _create(self, preds: Any) -> TaskMetrics:
        return self.task.governed_metrics(N_GROUPS) if self.only_governed else self.task.metrics(preds, N_GROUPS)

    def check_ranks(self, trainer: Trainer, name: str) -> None:
        """Raises a ValueError on all ranks if a rank saw no batch, and warns if no target counts."""
        check_ranks(trainer, name, saw_batch=not self.is_empty)
        if not self.n_targets(trainer):
            rank_zero_warn(f"{name} saw no target that counts: all are NaN or the ignore_index, so all its values are NaN")

    def sizes(self, trainer: Trainer) -> list[int]:
        """Returns the number of samples of all ranks in each group."""
        return trainer.strategy.reduce(self._sizes.clone(), reduce_op="sum").tolist()  # it reduces in place

    def n_targets(self, trainer: Trainer) -> int:
        """Returns the number of targets of all ranks that count."""
        return int(trainer.strategy.reduce(torch.tensor(self._n_targets, device=self._sizes.device), reduce_op="sum"))

    def values(self) -> Values:
        """Returns all values of all ranks, without their errors."""
        return self._summarize({condition: metrics.totals() for condition, metrics in self.metrics.items()})

    def estimates(self, sizes: Sequence[int]) -> list[Estimate]:
        """Returns all values of all ranks, with their errors.

        Args:
            sizes: The number of samples of all ranks in each group.
        """
        found = {condition: metrics.estimates() for condition, metrics in self.metrics.items()}
        totals = {condition: total for condition, (total, _) in found.items()}
        n_groups = min(len(without) for _, without in found.values())
        parts = [
            self._summarize({condition: without[group] for condition, (_, without) in found.items()})
            for group in range(n_groups)
        ]
        spreads, n_draws = self._spreads(totals), _n_draws(totals)
        estimates = []
        for (condition, metric), value in self._summarize(totals).items():
            without = tuple(part[condition, metric] for part in parts)
            spread = spreads.get((condition, metric), 0.0)
            errors = [jackknife(value, without, sizes[:n_groups])]
            if shares_draws(condition, self.shared):
                errors.append((spread, n_draws - 1))
            n = sum(sizes) if metric in self.task.proportions else None
            estimates.append(estimate(condition, metric, value, errors, n, spread=spread, without=without))
        return estimates

    def calibration(self) -> dict[Condition, list[Tensor]]:
        """Returns the sums in bins of the confidence for reliability diagrams, from the first draw."""
        found = {
            condition._replace(draw=None): metrics.calibration_bins()
            for condition, metrics in self.metrics.items()
            if not condition.draw
        }
        return {condition: bins for condition, bins in found.items() if bins is not None}

    def _summarize(self, values: Mapping[Condition, Mapping[str, float]]) -> Values:
        return summarize(values, self.task, chance=self.chance, shared=self.shared)

    def _spreads(self, values: Mapping[Condition, Mapping[str, float]]) -> Values:
        """Returns the standard error over the draws."""
        n_draws = _n_draws(values)
        if n_draws == 1:
            return {}
        by_draw = [
            self._summarize({condition: found for condition, found in values.items() if condition.draw in (None, draw)})
            for draw in range(n_draws)
        ]
        return {cell: _standard_error([found[cell] for found in by_draw]) for cell in by_draw[0]}


def summarize(
    values: Mapping[Condition, Mapping[str, float]],
    task: Task,
    *,
    chance: float | None = None,
    shared: Collection[str] = (),
) -> Values:
    """Returns the averages over draws, levels and noises, the worst, and how clean and noisy values differ.

    =====================  =============================================================================================
    condition              metrics
    =====================  =============================================================================================
    ``CLEAN``              all
    a noise and level      all, averaged over the draws
    a noise                all, averaged over the levels, and what the noise costs: ``<metric>_drop``, the clean minus the
                           noisy value; of the main metric also ``<metric>_area``, the area under the curve over the
                           level; of the governed metric ``<metric>_retention``, the share of the skill above chance
                           that is left; of noise in weights ``sensitivity``, by how much the loss rises
    ``NOISY``              all, averaged over noises and levels
    ``WORST``              the compared metrics at their worst noise and level
    ``OVERALL``            the drops and the retention over all noises and levels, and ``score``, the mean of the scores
                           of clean and noisy data
    =====================  =============================================================================================

    Args:
        values: The metrics without noise and at each noise, level and draw.
        task: The task, which knows what is compared.
        chance: The governed metric of a guess, if it is known.
        shared: The names of noises in weights.
    """
    clean = values[CLEAN]
    draws: dict[Condition, list[Mapping[str, float]]] = {}
    for condition, metrics in values.items():
        if condition != CLEAN:
            draws.setdefault(condition._replace(draw=None), []).append(metrics)
    levels = {condition: _mean(metrics) for condition, metrics in draws.items()}
    noisy = _mean(levels.values(), without=_NOT_AVERAGED)
    compared = [metric for metric in task.compared if metric in clean]

    rows = {CLEAN: dict(clean), **levels}
    for noise in dict.fromkeys(condition.noise for condition in levels):
        curve = {condition.level or 0.0: metrics for condition, metrics in levels.items() if condition.noise == noise}
        rows[Condition(noise)] = (
            _mean(curve.values(), without=_NOT_AVERAGED)
            | _costs(clean, list(curve.values()), task, chance)
            | {f"{task.main}_area": area_under_curve({0.0: clean[task.main]} | {x: m[task.main] for x, m in curve.items()})}
        )
        if noise in shared and "loss_drop" in rows[Condition(noise)]:
            rows[Condition(noise)]["sensitivity"] = -rows[Condition(noise)]["loss_drop"]
    rows[NOISY] = noisy
    rows[WORST] = {
        metric: _worst([found[metric] for found in levels.values()], higher_is_better=task.higher_is_better(metric))
        for metric in compared
    }
    rows[OVERALL] = _costs(clean, list(levels.values()), task, chance)
    rows[OVERALL]["score"] = (task.score(clean) + task.score(noisy)) / 2
    return {(condition, metric): value for condition, metrics in rows.items() for metric, value in metrics.items()}


def estimate(
    condition: Condition,
    metric: str,
    value: float,
    errors: Iterable[tuple[float, int]],
    n: int | None = None,
    **kwargs: Any,
) -> Estimate:
    """Returns the estimate with the interval of independent errors.

    Args:
        condition: The condition.
        metric: The name of the metric.
        value: The value.
        errors: The standard error and the degrees of freedom of each source.
        n: The number of samples, if the value is a proportion of them.
        kwargs: Further fields of the estimate.
    """
    interval = t_interval(value, errors) if n is None else wilson_interval(value, errors, n)
    return Estimate(condition, metric, value, *interval, **kwargs)


def jackknife(value: float, without: Sequence[float], sizes: Sequence[int]) -> tuple[float, int]:
    """Returns the jackknife error of a value and its degrees of freedom."""
    return jackknife_error(value, without, sizes), sum(size > 0 for size in sizes) - 1


def shares_draws(condition: Condition, shared: Collection[str]) -> bool:
    """Returns whether all samples share a draw in the condition, so that their scatter does not show that of the draws."""
    return condition != CLEAN and bool(shared) and condition.noise in (*shared, *_OVER_NOISES)


_OVER_NOISES = [condition.noise for condition in (NOISY, WORST, OVERALL)]


def _costs(
    clean: Mapping[str, float], noisy: Sequence[Mapping[str, float]], task: Task, chance: float | None
) -> dict[str, float]:
    """Returns the drops and the retention, averaged over conditions."""
    compared = [metric for metric in task.compared if metric in clean]
    costs = {f"{metric}_drop": fmean(clean[metric] - metrics[metric] for metrics in noisy) for metric in compared}
    if chance is not None:
        kept = [retention(metrics[task.governed], clean[task.governed], chance) for metrics in noisy]
        costs[f"{task.governed}_retention"] = fmean(kept)
    return costs


def _worst(values: Sequence[float], *, higher_is_better: bool) -> float:
    if any(map(math.isnan, values)):
        return math.nan
    return min(values) if higher_is_better else max(values)


def _mean(metrics: Iterable[Mapping[str, float]], without: Collection[str] = ()) -> dict[str, float]:
    """Returns the average of each metric."""
    metrics = list(metrics)
    return {name: fmean(found[name] for found in metrics) for name in metrics[0] if name not in without}


def _n_draws(conditions: Iterable[Condition]) -> int:
    return 1 + max(condition.draw or 0 for condition in conditions)


def _standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean; `stdev` raises an error for NaN."""
    return stdev(values) / len(values) ** 0.5 if all(map(math.isfinite, values)) else math.nan
