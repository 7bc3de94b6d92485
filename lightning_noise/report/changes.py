"""Means over trainings, and differences and corruption errors between two reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_noise import tasks
from lightning_noise.evaluation.conditions import CLEAN, OVERALL, Condition
from lightning_noise.evaluation.results import Estimate, Values, estimate, jackknife
from lightning_noise.metrics.robustness import corruption_error
from lightning_noise.metrics.statistics import average, training_error
from lightning_noise.report.model import Report

__all__ = ["corruption", "corruption_errors", "differences", "pool", "shared_levels"]

Runs = Report | Sequence[Report]
"""A report, or the reports of several trainings that differ in their seeds alone."""


def pool(reports: Sequence[Report]) -> Report:
    """Returns the mean over several trainings that differ in their seeds alone, with intervals that cover another training.

    The intervals have two sources of error: the test samples, which all trainings share, and the training, whose error is
    :func:`~lightning_noise.metrics.statistics.training_error`.

    Example:
        >>> about = {"noises": {}, "levels": {}, "shared": (), "sizes": (1, 1)}
        >>> losses = [Estimate(CLEAN, "loss", value, without=(value, value)) for value in (0.5, 0.75)]
        >>> runs = [Report("multiclass", 2, 1, 0, estimates=(loss,), **about) for loss in losses]
        >>> pool(runs).rows[CLEAN, "loss"].value, pool(runs).n_trainings
        (0.625, 2)
    """
    first = reports[0]
    if len(reports) == 1:
        return first
    proportions = getattr(getattr(tasks, first.task.capitalize(), None), "proportions", ())
    cells = [cell for cell in first.rows if all(cell in report.rows for report in reports)]
    estimates = _estimate(lambda values: {cell: values[cell] for cell in cells}, [reports], proportions)
    return replace(first, sizes=(), estimates=tuple(estimates), n_trainings=len(reports))


def differences(report: Runs, baseline: Runs) -> list[Estimate]:
    """Returns the values of a report minus those of a baseline, with their errors and intervals.

    Values are compared if both reports have them for the same noises and levels. If the groups of both have equal sizes, the
    differences are paired: a sample is in the same group of both reports, so its difficulty for both models cancels. The paired
    error is right even if the samples differ. If the sizes differ, the errors are independent, and their squares are added. The
    spread over draws always counts as independent.

    Several reports of a side are averaged as by :func:`pool`, and the intervals then cover another training of that side.

    Example:
        >>> about = {"noises": {}, "levels": {}, "shared": (), "sizes": (1, 1)}
        >>> losses = [Estimate(CLEAN, "loss", value, without=(value, value)) for value in (0.5, 0.75)]
        >>> new, old = (Report("multiclass", 2, 1, 0, estimates=(loss,), **about) for loss in losses)
        >>> differences(new, old)[0].value
        -0.25
    """
    new, old = _as_runs(report), _as_runs(baseline)
    both = [cell for cell in new[0].rows if all(cell in run.rows for run in (*new, *old))]
    # without the share of the most frequent class, chance was another, and so was the retention
    kinds = {(CLEAN, "chance") in run.rows for run in (*new, *old)}
    cells = [
        cell
        for cell in both
        if _noise_of(new[0], cell[0]) == _noise_of(old[0], cell[0]) and not (len(kinds) > 1 and "retention" in cell[1])
    ]
    return _estimate(lambda new, old: {cell: new[cell] - old[cell] for cell in cells}, [new, old])


def corruption(report: Runs, baseline: Runs) -> list[Estimate]:
    """Returns the corruption errors for the noises that are in both reports, with their errors and intervals.

    The errors are those of :func:`differences`, without the spread over draws.
    """
    new, old = _as_runs(report), _as_runs(baseline)
    levels = shared_levels(new[0].noises, new[0].levels, old[0])
    return _estimate(lambda new, old: corruption_errors(new, old, levels), [new, old])


def corruption_errors(values: Values, baseline: Values, levels: Mapping[str, Sequence[float]]) -> Values:
    """Returns how many errors a model makes under noise for each error of a baseline.

    Returns:
        ``corruption_error`` under each noise for which both have accuracies at all levels: the errors summed over the levels,
        divided by those of the baseline. ``mce`` under ``OVERALL`` is their mean.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261, where the
        baseline is AlexNet.

    Example:
        >>> place = Condition("gaussian", 0.1), "accuracy"
        >>> corruption_errors({place: 0.75}, {place: 0.5}, {"gaussian": [0.1]})[OVERALL, "mce"]
        0.5
    """
    ratios = {}
    for name, of_noise in levels.items():
        cells = [(Condition(name, level), "accuracy") for level in of_noise]
        if values.keys() & baseline.keys() >= set(cells):
            new, old = (np.stack([1 - found[cell] for cell in cells], -1) for found in (values, baseline))
            ratios[Condition(name), "corruption_error"] = _corruption_errors(new, old)
    return ratios | {(OVERALL, "mce"): average(list(ratios.values()))} if ratios else {}


def shared_levels(
    noises: Mapping[str, str], levels: Mapping[str, Sequence[float]], baseline: Report
) -> dict[str, tuple[float, ...]]:
    """Returns the levels of the noises that a baseline has with the same description and levels."""
    return {
        name: tuple(levels[name])
        for name, noise in noises.items()
        if (noise, tuple(levels[name])) == (baseline.noises.get(name), baseline.levels.get(name))
    }


# each array has the levels on its last axis
_corruption_errors = np.vectorize(corruption_error, otypes=[float], signature="(n),(n)->()")


def _as_runs(report: Runs) -> Sequence[Report]:
    return [report] if isinstance(report, Report) else report


@np.errstate(invalid="ignore")  # infinity minus infinity
def _estimate(
    function: Callable[..., Values], sides: Sequence[Sequence[Report]], proportions: Sequence[str] = ()
) -> list[Estimate]:
    """Returns a function of the mean values of each side, with the error of each source that the reports know."""
    means = [_mean([run.parts for run in runs]) for runs in sides]
    totals = [{cell: value[:1] for cell, value in mean.items()} for mean in means]

    def of_side(i: int, values: Values) -> Values:
        return function(*totals[:i], values, *totals[i + 1 :])

    values = function(*totals)
    if not values:  # nothing is in all reports
        return []
    if all(runs[0].sizes == sides[0][0].sizes for runs in sides):
        sampling = [(function(*means), sides[0][0].sizes)]
    else:
        sampling = [(of_side(i, mean), runs[0].sizes) for i, (mean, runs) in enumerate(zip(means, sides, strict=True))]
    is_single = [len(runs) == 1 for runs in sides]
    errors = [jackknife(values, sizes) for values, sizes in sampling if sizes or any(is_single)]
    for i, runs in enumerate(sides):
        if is_single[i]:
            errors.append((np.array([runs[0].draw_error(cell) for cell in values]), runs[0].n_draws - 1))
        else:
            found = np.array([list(of_side(i, run.parts).values()) for run in runs])
            errors.append((training_error(found[..., 0], found[..., 1:], runs[0].sizes), len(runs) - 1))
    return estimate(values, errors, sides[0][0].n, proportions)


def _mean(values: Sequence[Values]) -> Values:
    if len(values) == 1:
        return values[0]
    return {cell: average([each[cell] for each in values]) for cell in values[0] if all(cell in each for each in values)}


def _noise_of(report: Report, condition: Condition) -> Any:
    """Returns what two values under a condition must have in common to be compared."""
    if condition == CLEAN:
        return None
    if condition.noise not in report.noises:
        return report.noises, report.levels
    return report.noises[condition.noise], None if condition.level is not None else report.levels[condition.noise]
