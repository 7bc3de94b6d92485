"""What several reports have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from lightning_noise.evaluation.conditions import CLEAN, NOISY, WORST, Condition
from lightning_noise.evaluation.results import Values, estimate, jackknife, shares_draws
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
    extremes = {
        metric: min if higher_is_better(report, metric) else max for metric in metrics if (WORST, metric) in report.rows
    }

    def summarize(values: Values) -> Values:
        means = {
            (place, metric): fmean(values[each, metric] for each in over)
            for place, over in places.items()
            for metric in metrics
        }
        return means | {
            (WORST, metric): extreme(values[each, metric] for each in every) for metric, extreme in extremes.items()
        }

    kept = [row for row in report.estimates if row.condition in (CLEAN, *every)]
    without = [summarize(report.without(group)) for group in range(len(report.sizes))]
    for (place, metric), value in summarize(report.values).items():
        parts = tuple(part[place, metric] for part in without)
        spread = fmean(report.rows[each, metric].spread for each in places.get(place, every))
        errors = [jackknife(value, parts, report.sizes)]
        if shares_draws(place, report.shared):
            errors.append((spread, report.n_draws - 1))
        kept.append(estimate(place, metric, value, errors, spread=spread, without=parts))
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
