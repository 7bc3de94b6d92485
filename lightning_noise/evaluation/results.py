"""Results of an evaluation: the metrics under each condition, with their errors, as rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_noise.evaluation.conditions import CLEAN, NOISY, OVERALL, WORST, Condition
from lightning_noise.evaluation.engine import Pass, Reading
from lightning_noise.evaluation.positions import N_GROUPS, are_copies, check_parts, check_ranks, sum_over_ranks
from lightning_noise.metrics.base import Sums
from lightning_noise.metrics.collections import CustomMetrics, GroupedMetrics, TaskMetrics
from lightning_noise.metrics.guess import ConstantGuess
from lightning_noise.metrics.robustness import area_under_curve, retention
from lightning_noise.metrics.statistics import average, jackknife_error, t_interval, wilson_interval
from lightning_noise.tasks import Task

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Cell", "Estimate", "Results", "Values", "estimate", "jackknife", "shares_draws", "summarize"]

Cell = tuple[Condition, str]
Values = Mapping[Cell, Any]
"""The value of each metric under each condition: a float, or an array of the value and the value without each group."""

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
    """

    def __init__(self, task: Task, shared: Collection[str] = (), *, only_governed: bool = False):
        self.task = task
        self.shared = shared
        self.only_governed = only_governed
        self._metrics: dict[Condition, TaskMetrics] = {}
        self._idle: dict[Condition, TaskMetrics] = {}  # of earlier readings
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
        self.n_targets = 0  # that count
        for metric in self._sums(self._idle):
            metric.sync_on_compute = True

    @property
    def metrics(self) -> dict[Condition, TaskMetrics]:
        """The metrics under each condition."""
        self._add_all()
        return self._metrics

    def update(self, readings: Iterable[Reading]) -> None:
        """Adds the readings of a batch. The reading without noise comes first."""
        is_small, kept = False, torch.empty(0)
        for condition, _, outputs, preds, target, groups, samples, classes in readings:
            metrics = self._metrics_of(condition, outputs, groups.device)
            if condition == CLEAN:
                self.is_empty = False
                self._sizes = self._sizes.to(groups.device).index_add_(0, samples, torch.ones_like(samples))
                self.n_targets += target.numel()
                is_small = isinstance(metrics, GroupedMetrics) and isinstance(preds, Tensor) and preds.numel() < _AT_ONCE // 4
                if not is_small or not self._can_wait(preds, target):
                    self._add_all()
                self._n_waiting += preds.numel() if is_small else 0
                # a copy, because the step may write to the target
                kept = target.clone() if is_small else target
            # predictions may be a view of a large tensor
            added = {"preds": preds.clone() if is_small else preds, "target": kept, "groups": groups}
            if classes is not None:
                added["classes"] = kept if classes is target else classes
            self._waiting.setdefault(condition, []).append(added)
            if not is_small:
                self._add(condition)
        if not is_small or self._n_waiting >= _AT_ONCE:
            self._add_all()

    def _can_wait(self, preds: Tensor, target: Tensor) -> bool:
        """Returns whether the predictions fit those of the batches before."""
        before = self._waiting[CLEAN][-1] if self._waiting else {"preds": preds, "target": target}
        pairs = (before["preds"], preds), (before["target"], target)
        return all((one.shape[1:], one.dtype) == (two.shape[1:], two.dtype) for one, two in pairs)

    def _add_all(self) -> None:
        """Adds the batches that wait to the metrics."""
        for condition in list(self._waiting):
            self._add(condition)
        self._n_waiting, self._clean_preds = 0, None

    def _add(self, condition: Condition) -> None:
        batches = self._waiting.pop(condition)
        added = batches[0] if len(batches) == 1 else {key: torch.cat([each[key] for each in batches]) for key in batches[0]}
        if not len(added["groups"]):  # a batch may be all padding
            return
        metrics = self._metrics[condition]
        if condition == CLEAN:
            self._clean_preds = added["preds"] = metrics.read(added["preds"])
        metrics.update(clean_preds=self._clean_preds, **added)

    def _metrics_of(self, condition: Condition, outputs: Any, device: torch.device) -> TaskMetrics:
        if condition not in self._metrics:
            metrics = self._idle.pop(condition, None) or self._create(condition, outputs)
            self._metrics[condition] = metrics.to(device)
        return self._metrics[condition]

    def _create(self, condition: Condition, outputs: Any) -> TaskMetrics:
        metrics = self.task.governed_metrics(N_GROUPS) if self.only_governed else self.task.metrics(outputs, N_GROUPS)
        guess = self.task.guess(outputs, N_GROUPS) if condition == CLEAN else None
        if guess is not None and isinstance(metrics, GroupedMetrics):
            metrics.add_metrics({"guess": guess})
        return metrics

    def gather(self, trainer: Trainer, name: str, read: Pass) -> None:
        """Sums the metrics of a pass over all ranks. Later readings need a reset.

        Raises a ValueError on all ranks if a rank saw no batch, and warns if no target counts.
        """
        check_ranks(trainer, name, saw_batch=not self.is_empty)
        sums = self._sums(self.metrics)
        places = [(metric, state) for metric in sums for state in metric.metric_state]
        own = [self._sizes, self._sizes.new_tensor(self.n_targets), *(getattr(*place) for place in places)]
        customs = [metrics for metrics in self.metrics.values() if isinstance(metrics, CustomMetrics)]
        if are_copies(trainer, [*own, *(metrics.seen for metrics in customs)], read.dataloader_idx):
            for metrics in customs:
                metrics.is_whole = True
        else:
            if not customs:  # which have no intervals
                check_parts(trainer, name, read.samples, read.dataloader_idx)
            own = sum_over_ranks(trainer, own)
        self._sizes, n_targets, *states = own
        self.n_targets = int(n_targets)
        for (metric, state), value in zip(places, states, strict=True):
            getattr(metric, state).copy_(value)
            metric.sync_on_compute = False
        if not self.n_targets:
            rank_zero_warn(f"{name} saw no target that counts: all are NaN or the ignore_index, so all its values are NaN")
        if any(isinstance(metric, ConstantGuess) and metric.undefined.any() for metric in sums):
            rank_zero_warn(f"{name} cannot tell chance: a batch has more classes than the first, so the retention is NaN")

    @property
    def sizes(self) -> list[int]:
        """The number of samples in each group."""
        return self._sizes.tolist()

    def values(self) -> Values:
        """Returns all values, without their errors."""
        values = self._summarize({condition: metrics.totals() for condition, metrics in self.metrics.items()})
        return {cell: float(value) for cell, value in values.items()}

    def estimates(self) -> list[Estimate]:
        """Returns all values, with their errors."""
        sizes = self.sizes
        found = {
            condition: {metric: values.numpy() for metric, values in metrics.estimates().items()}
            for condition, metrics in self.metrics.items()
        }
        values, n_draws = self._summarize(found), 1 + max(condition.draw or 0 for condition in found)
        spreads = self._spreads(found, n_draws) if n_draws > 1 else np.zeros(len(values))
        drawn = [shares_draws(condition, self.shared) for condition, _ in values]
        errors = [jackknife(values, sizes), (np.where(drawn, spreads, 0.0), n_draws - 1)]
        return estimate(values, errors, sum(sizes), self.task.proportions, spreads=spreads)

    def calibration(self) -> dict[Condition, list[Tensor]]:
        """Returns the sums in bins of the confidence for reliability diagrams, from the first draw."""
        found = {
            condition._replace(draw=None): metrics.calibration_bins()
            for condition, metrics in self.metrics.items()
            if not condition.draw
        }
        return {condition: bins for condition, bins in found.items() if bins is not None}

    @staticmethod
    def _sums(metrics: Mapping[Condition, TaskMetrics]) -> list[Sums]:
        grouped = [each for each in metrics.values() if isinstance(each, GroupedMetrics)]
        return [metric for each in grouped for metric in each.values(copy_state=False) if isinstance(metric, Sums)]

    def _summarize(self, values: Mapping[Condition, Mapping[str, Any]]) -> Values:
        return summarize(values, self.task, shared=self.shared)

    def _spreads(self, values: Mapping[Condition, Mapping[str, np.ndarray]], n_draws: int) -> np.ndarray:
        """Returns the standard error of each value over the draws."""
        of_draws = [
            self._summarize({condition: found for condition, found in values.items() if condition.draw in (None, draw)})
            for draw in range(n_draws)
        ]
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            return np.std([_table(found)[:, 0] for found in of_draws], 0, ddof=1) / n_draws**0.5


@np.errstate(invalid="ignore")  # infinity minus infinity
def summarize(
    values: Mapping[Condition, Mapping[str, Any]],
    task: Task,
    *,
    shared: Collection[str] = (),
) -> Values:
    """Returns the averages over draws, levels and noises, the worst, and how clean and noisy values differ.

    =====================  =============================================================================================
    condition              metrics
    =====================  =============================================================================================
    ``CLEAN``              all, and of a classifier ``chance``, the accuracy of the best constant guess
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
        shared: The names of noises in weights.
    """
    clean = values[CLEAN]
    draws: dict[Condition, list[Mapping[str, Any]]] = {}
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
            | _costs(clean, list(curve.values()), task)
            | {f"{task.main}_area": area_under_curve({0.0: clean[task.main]} | {x: m[task.main] for x, m in curve.items()})}
        )
        if noise in shared and "loss_drop" in rows[Condition(noise)]:
            rows[Condition(noise)]["sensitivity"] = -rows[Condition(noise)]["loss_drop"]
    rows[NOISY] = noisy
    rows[WORST] = {
        metric: (np.min if task.higher_is_better(metric) else np.max)([found[metric] for found in levels.values()], 0)
        for metric in compared
    }
    rows[OVERALL] = _costs(clean, list(levels.values()), task)
    rows[OVERALL]["score"] = (task.score(clean) + task.score(noisy)) / 2
    return {(condition, metric): value for condition, metrics in rows.items() for metric, value in metrics.items()}


def estimate(
    values: Values,
    errors: Sequence[tuple[np.ndarray, int]],
    n: int = 0,
    proportions: Collection[str] = (),
    spreads: np.ndarray | None = None,
) -> list[Estimate]:
    """Returns the estimates of all values with the intervals of independent errors.

    Args:
        values: The values, each an array that begins with the value of all samples.
        errors: The standard error of each value and the degrees of freedom, for each source.
        n: The number of samples.
        proportions: The metrics that are proportions of the samples.
        spreads: The standard error of each value over the draws.
    """
    table = _table(values)
    are_proportions = [metric in proportions for _, metric in values]
    intervals = np.where(are_proportions, wilson_interval(table[:, 0], errors, n), t_interval(table[:, 0], errors))
    spreads = np.zeros(len(table)) if spreads is None else spreads
    rows, parts = np.column_stack([table[:, 0], *intervals, spreads]).tolist(), table[:, 1:].tolist()
    return [Estimate(*cell, *row, without=tuple(rest)) for cell, row, rest in zip(values, rows, parts, strict=True)]


def jackknife(values: Values, sizes: Sequence[int]) -> tuple[np.ndarray, int]:
    """Returns the jackknife error of each value, and their degrees of freedom."""
    table = _table(values)
    sizes = sizes[: table.shape[1] - 1]  # none, if the metrics know no groups
    return jackknife_error(table[:, 0], table[:, 1:], sizes), sum(size > 0 for size in sizes) - 1


def shares_draws(condition: Condition, shared: Collection[str]) -> bool:
    """Returns whether all samples share a draw in the condition, so that their scatter does not show that of the draws."""
    return condition != CLEAN and bool(shared) and condition.noise in (*shared, *_OVER_NOISES)


_OVER_NOISES = [condition.noise for condition in (NOISY, WORST, OVERALL)]
_retentions = np.vectorize(retention, otypes=[float])


def _table(values: Values) -> np.ndarray:
    """Returns values of shape (1 + G,) as rows."""
    return np.array(list(values.values()), float).reshape(len(values), -1)


def _costs(clean: Mapping[str, Any], noisy: Sequence[Mapping[str, Any]], task: Task) -> dict[str, Any]:
    """Returns the drops and the retention, averaged over conditions."""
    compared = [metric for metric in task.compared if metric in clean]
    costs = {f"{metric}_drop": average([clean[metric] - metrics[metric] for metrics in noisy]) for metric in compared}
    chance = task.chance(clean)
    if chance is not None:
        kept = _retentions([metrics[task.governed] for metrics in noisy], clean[task.governed], chance)
        costs[f"{task.governed}_retention"] = average(kept)
    return costs


def _mean(metrics: Iterable[Mapping[str, Any]], without: Collection[str] = ()) -> dict[str, Any]:
    """Returns the average of each metric."""
    metrics = list(metrics)
    names = [name for name in metrics[0] if name not in without]
    return dict(zip(names, average([[found[name] for name in names] for found in metrics]), strict=True))
