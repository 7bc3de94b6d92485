"""What several reports have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lightning_noise.evaluation.conditions import CLEAN, NOISY, WORST, Condition
from lightning_noise.evaluation.results import estimate, jackknife, shares_draws
from lightning_noise.metrics.statistics import average
from lightning_noise.report.model import Report

__all__ = ["common_levels", "higher_is_better", "restrict"]

Levels = Mapping[str, tuple[float, ...]]


def common_levels(reports: Sequence[Report]) -> dict[str, tuple[float, ...]]:
    """Returns the levels that all reports have of noises with the same name and description."""
    first, *others = reports
    found = {
        name: tuple(level for level in levels if all(level in each.levels.get(name, ()) for each in others))
        for name, levels in first.levels.items()
        if all(each.noises.get(name) == first.noises[name] for each in others)
    }
    return {name: levels for name, levels in found.items() if levels}


def restrict(report: Report, levels: Levels) -> Report:
    """Returns the part of a report under some of its noises and levels, with the means and the worst over those alone.

    Errors over shared draws are assumed to be fully correlated between levels, so that the error of a mean is never too small.
    """
    if dict(levels) == report.levels:
        return report
    places = {Condition(noise): [Condition(noise, level) for level in of_noise] for noise, of_noise in levels.items()}
    every = [place for of_noise in places.values() for place in of_noise]
    places[NOISY] = every
    metrics = [metric for condition, metric in report.rows if condition == NOISY]
    values = {
        (place, metric): average([report.parts[each, metric] for each in over])
        for place, over in places.items()
        for metric in metrics
    }
    for metric in metrics:
        if (WORST, metric) in report.rows:
            worst = np.min if higher_is_better(report, metric) else np.max
            values[WORST, metric] = worst([report.parts[each, metric] for each in every], 0)
    spreads = np.array(
        [average([report.rows[each, metric].spread for each in places.get(place, every)]) for place, metric in values]
    )
    drawn = [shares_draws(place, report.shared) for place, _ in values]
    errors = [jackknife(values, report.sizes), (np.where(drawn, spreads, 0.0), report.n_draws - 1)]
    kept = [row for row in report.estimates if row.condition in (CLEAN, *every)]
    kept += estimate(values, errors, spreads=spreads)
    return replace(
        report,
        levels=dict(levels),
        noises={name: report.noises[name] for name in levels},
        shared=tuple(name for name in report.shared if name in levels),
        estimates=tuple(kept),
    )


def higher_is_better(report: Report, metric: str) -> bool:
    """Returns whether a larger value is better. The worst value of a report tells; metrics without it are errors."""
    worst = report.rows.get((WORST, metric))
    values = [row.value for row in report.estimates if row.metric == metric and row.condition.level is not None]
    return worst is not None and worst.value <= min(values, default=worst.value)
