"""The figure of a metric against the level of each noise."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.plots.style import (
    CARD,
    COLORS,
    GRAY,
    MARKERS,
    WIDEST,
    arrange,
    finite,
    label_of,
    label_sides,
    legend_of,
    panels,
    set_ticks,
    styled,
)
from lightning_noise.report.files import read
from lightning_noise.report.markdown import column_of
from lightning_noise.report.model import Report

__all__ = ["AnyReport", "robustness_curve"]

AnyReport = Report | str | os.PathLike[str]

_LOWEST_R2 = -1.0


class _Curve(NamedTuple):
    level: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@styled
def robustness_curve(
    *reports: AnyReport, names: Sequence[str] = (), metric: str | None = None, baseline: AnyReport | None = None
) -> Figure:
    r"""Draws a metric against the level of each noise, a panel for each noise and a line for each report.

    Each panel has the unit of its noise; all share the y axis. The band is the 95 % interval, level 0 is clean, and a dotted
    line is chance, the metric of the best constant guess. A curve of :math:`R^2` is cut at -1.

    Args:
        reports: Reports, or their ``report.json`` files or folders.
        names: The names of the reports in the legend. Default: the parts of the paths that differ.
        metric: The metric. Default: the accuracy, the :math:`R^2` of a regression, or the first metric.
        baseline: A report that is drawn as a dashed line.

    Raises:
        ValueError: If there is no report, no report has the metric, or the names are not as many as the reports.

    Example:
        >>> from lightning_noise.evaluation.results import Estimate
        >>> points = {CLEAN: 0.95, Condition("gaussian", 0.1): 0.9, Condition("gaussian", 0.2): 0.8}
        >>> estimates = tuple(Estimate(condition, "accuracy", value) for condition, value in points.items())
        >>> about = {"noises": {"gaussian": "Gaussian()"}, "levels": {"gaussian": (0.1, 0.2)}, "shared": (), "sizes": ()}
        >>> figure = robustness_curve(Report("multiclass", 400, 1, 0, estimates=estimates, **about))
        >>> figure.axes[0].lines[0].get_xydata().tolist()
        [[0.0, 95.0], [0.1, 90.0], [0.2, 80.0]]
    """
    runs = _by_name(reports, names)
    before = None if baseline is None else _load(baseline)
    metric = _metric(list(runs.values()), metric)
    places = {(noise, run.units.get(noise, "level")): None for run in runs.values() for noise in run.noises}
    figure, grid = panels(len(places))
    drawn = [_draw_panel(axes, noise, unit, runs, before, metric) for axes, (noise, unit) in zip(grid, places, strict=True)]
    _limit(grid[0], metric, np.concatenate(drawn) if drawn else np.empty(0))
    column = column_of(metric)
    label_lines = max(axes.get_xlabel().count("\n") + 1 for axes in grid)
    arrange(figure, width=CARD if len(grid) <= 9 else WIDEST, label_lines=label_lines, legend=legend_of(grid))
    label_sides(figure, "", label_of(column.name, column.unit))
    return figure


def _draw_panel(
    axes: Axes, noise: str, unit: str, runs: Mapping[str, Report], baseline: Report | None, metric: str
) -> np.ndarray:
    """Draws the lines of a noise, and returns their values."""
    column = column_of(metric)
    values = [np.empty(0)]
    for i, (name, run) in enumerate(runs.items()):
        curve = _curve(run, noise, unit, metric)
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        axes.plot(curve.level, curve.value, color=color, marker=marker, label=name, zorder=3)
        if np.isfinite(curve.low).any():
            band = "_" if i else "95 % interval"
            axes.fill_between(curve.level, curve.low, curve.high, color=color, alpha=0.2, linewidth=0, label=band)
        values += [curve.value, curve.low, curve.high]
    if baseline is not None:
        curve = _curve(baseline, noise, unit, metric)
        axes.plot(curve.level, curve.value, color=GRAY, linestyle="--", label="baseline", zorder=2)
        values.append(curve.value)
    chances = {run.chance for run in runs.values() if run.chance is not None and metric in ("accuracy", "r2")}
    for i, chance in enumerate(chances):  # reports of other data have another
        axes.axhline(column.factor * chance, color=GRAY, linestyle=":", linewidth=1, label="_" if i else "chance", zorder=1)
    if not np.isfinite(np.concatenate(values)).any():
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center", color=GRAY)
    axes.set_title(noise, fontsize=min(8, 150 / len(noise)))  # a long name must not reach the next panel
    largest = max(level for run in runs.values() for level in run.levels.get(noise, (0.0,)))
    axes.set(xlabel=label_of(unit, width=20), xlim=(-0.03 * largest, 1.03 * largest))
    set_ticks(axes.xaxis, 5)
    return np.concatenate(values)


def _curve(report: Report, noise: str, unit: str, metric: str) -> _Curve:
    """Returns the points of a report under a noise; none if the report has no such noise."""
    levels = sorted(report.levels.get(noise, ())) if report.units.get(noise, "level") == unit else []
    places = {0.0: CLEAN} | {level: Condition(noise, level) for level in levels} if levels else {}
    rows = [report.rows.get((place, metric)) for place in places.values()]
    factor = column_of(metric).factor
    numbers = [[factor * getattr(row, name, np.nan) for row in rows] for name in ("value", "low", "high")]
    return _Curve(np.array(list(places)), *map(finite, numbers))


def _limit(axes: Axes, metric: str, values: np.ndarray) -> None:
    """Sets the limits of the shared y axis."""
    values = values[np.isfinite(values)]
    if metric == "accuracy":
        axes.set_ylim(0, 103)
    elif metric == "r2":
        lowest = min(values, default=0.0)
        axes.set_ylim(max(min(lowest, 0.0) - 0.05, _LOWEST_R2), 1.03)
    elif not len(values) or values.min() >= 0:
        axes.set_ylim(0, None if len(values) else 1)


def _metric(runs: Sequence[Report], metric: str | None) -> str:
    known = list(dict.fromkeys(name for run in runs for place, name in run.rows if place.level is not None))
    if metric is None:
        return next((name for name in ("accuracy", "r2") if name in known), known[0] if known else "accuracy")
    if metric not in known:
        raise ValueError(f"no report has the metric {metric!r} at a level; the metrics are {known}")
    return metric


def _load(report: AnyReport) -> Report:
    return report if isinstance(report, Report) else read(os.fspath(report))


def _by_name(reports: Sequence[AnyReport], names: Sequence[str]) -> dict[str, Report]:
    if not reports:
        raise ValueError("expected at least one report; type plots.robustness_curve('lightning_logs/version_0/robustness')")
    if names and len(set(names)) != len(reports):
        raise ValueError(f"names must be a different name for each of {len(reports)} reports, got {list(names)}")
    names = list(names) or (["_"] if len(reports) == 1 else _short_names(reports))
    return dict(zip(names, map(_load, reports), strict=True))


def _short_names(reports: Sequence[AnyReport]) -> list[str]:
    """Returns the parts of the paths that differ, or the number of each report."""
    paths = [() if isinstance(report, Report) else os.path.normpath(report).split(os.sep) for report in reports]
    same = {part for part in paths[0] if all(part in path for path in paths)}
    names = ["/".join(part for part in path if part not in same) for path in paths]
    return (
        [name or f"report {i}" for i, name in enumerate(names, 1)]
        if len(set(names)) == len(names)
        else [f"report {i}" for i in range(1, len(names) + 1)]
    )
