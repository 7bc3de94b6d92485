"""Differences and corruption errors between two reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_noise.evaluation.conditions import CLEAN, OVERALL, Condition
from lightning_noise.evaluation.results import Estimate, Values, estimate, jackknife
from lightning_noise.metrics.robustness import corruption_error, mean_corruption_error
from lightning_noise.report.model import Report

__all__ = ["corruption", "corruption_errors", "differences", "shared_levels"]


def differences(report: Report, baseline: Report) -> list[Estimate]:
    """Returns the values of a report minus those of a baseline, with their errors and intervals.

    Values are compared if both reports have them for the same noises and levels. If the groups of both have equal sizes, the
    differences are paired: a sample is in the same group of both reports, so its difficulty for both models cancels. The paired
    error is right even if the samples differ. If the sizes differ, the errors are independent, and their squares are added. The
    spread over draws always counts as independent.

    Example:
        >>> about = {"noises": {}, "levels": {}, "shared": (), "sizes": (1, 1)}
        >>> losses = [Estimate(CLEAN, "loss", value, without=(value, value)) for value in (0.5, 0.75)]
        >>> new, old = (Report("multiclass", 2, 1, 0, estimates=(loss,), **about) for loss in losses)
        >>> differences(new, old)[0].value
        -0.25
    """
    both = [cell for cell in report.rows if cell in baseline.rows]
    cells = [cell for cell in both if _noise_of(report, cell[0]) == _noise_of(baseline, cell[0])]
    return _compare(lambda new, old: {cell: new[cell] - old[cell] for cell in cells}, report, baseline)


def corruption(report: Report, baseline: Report) -> list[Estimate]:
    """Returns the corruption errors for the noises that are in both reports, with their errors and intervals.

    The errors are those of :func:`differences`, without the spread over draws.
    """
    levels = shared_levels(report.noises, report.levels, baseline)
    return _compare(lambda new, old: corruption_errors(new, old, levels), report, baseline)


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
    new, old = {}, {}
    for name, of_noise in levels.items():
        cells = [(Condition(name, level), "accuracy") for level in of_noise]
        if values.keys() & baseline.keys() >= set(cells):
            new[name], old[name] = ([1 - found[cell] for cell in cells] for found in (values, baseline))
    ratios = {(Condition(name), "corruption_error"): corruption_error(new[name], old[name]) for name in new}
    return ratios | {(OVERALL, "mce"): mean_corruption_error(new, old)} if new else {}


def shared_levels(
    noises: Mapping[str, str], levels: Mapping[str, Sequence[float]], baseline: Report
) -> dict[str, tuple[float, ...]]:
    """Returns the levels of the noises that a baseline has with the same description and levels."""
    return {
        name: tuple(levels[name])
        for name, noise in noises.items()
        if (noise, tuple(levels[name])) == (baseline.noises.get(name), baseline.levels.get(name))
    }


def _compare(function: Callable[[Values, Values], Values], report: Report, baseline: Report) -> list[Estimate]:
    new, old = report.values, baseline.values
    without_new, without_old = ([each.without(group) for group in range(len(each.sizes))] for each in (report, baseline))
    if report.sizes == baseline.sizes:
        parts = [(list(map(function, without_new, without_old)), report.sizes)]
    else:
        parts = [
            ([function(part, old) for part in without_new], report.sizes),
            ([function(new, part) for part in without_old], baseline.sizes),
        ]
    compared = []
    for cell, value in function(new, old).items():
        errors = [jackknife(value, [part[cell] for part in without], sizes) for without, sizes in parts]
        errors += [each.draw_error(cell) for each in (report, baseline)]
        compared.append(estimate(*cell, value, errors))
    return compared


def _noise_of(report: Report, condition: Condition) -> Any:
    """Returns what two values under a condition must have in common to be compared."""
    if condition == CLEAN:
        return None
    if condition.noise not in report.noises:
        return report.noises, report.levels
    return report.noises[condition.noise], None if condition.level is not None else report.levels[condition.noise]
