"""Summaries of metrics under noise, on floats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

__all__ = ["area_under_curve", "corruption_error", "mean_corruption_error", "retention"]


def retention(noisy: float, clean: float, chance: float) -> float:
    r"""Returns the share of the skill above chance that is retained under noise.

    .. math:: \frac{A_\text{noisy} - A_\text{chance}}{A_\text{clean} - A_\text{chance}}

    The share is comparable between tasks with different numbers of classes. If the clean model has no skill, it is NaN.

    Example:
        >>> retention(noisy=0.5, clean=0.75, chance=0.25)
        0.5
    """
    return (noisy - chance) / (clean - chance) if clean > chance else math.nan


def area_under_curve(curve: Mapping[float, float]) -> float:
    r"""Returns the mean of a curve, the values by their levels.

    .. math:: \frac{1}{l_m - l_1} \sum_{i=2}^m (l_i - l_{i-1}) \frac{A_i + A_{i-1}}{2}

    The mean is the area under straight lines between the points, divided by their range. Wide gaps between levels weigh more
    than narrow ones. A curve of one point is its own mean. Compare areas only if their levels are the same.

    Example:
        >>> area_under_curve({0.0: 1.0, 0.1: 1.0, 0.5: 0.5})  # (0.1 * 1 + 0.4 * 0.75) / 0.5
        0.8
    """
    points = sorted(curve.items())
    (first, value), (last, _) = points[0], points[-1]
    area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(points))
    return area / (last - first) if last > first else value


def corruption_error(errors: Sequence[float], baseline: Sequence[float]) -> float:
    r"""Returns the errors under a noise, relative to a baseline.

    .. math:: \text{CE} = \frac{\sum_s E_s}{\sum_s E_s^\text{baseline}}

    A value below 1 means that the model is more robust than the baseline. If the baseline makes no error, the value is NaN.

    Both hold an error rate for each level; the baseline is another model at the same levels.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261. Their
        baseline is AlexNet; yours is a run of your own.

    Example:
        >>> corruption_error([0.1, 0.2], baseline=[0.2, 0.4])
        0.5
    """
    if len(errors) != len(baseline):
        raise ValueError(
            f"errors and baseline must hold an error rate for each level, got {len(errors)} and {len(baseline)} levels"
        )
    return sum(errors) / sum(baseline) if sum(baseline) else math.nan


def mean_corruption_error(errors: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]]) -> float:
    """Returns the mean of :func:`corruption_error` over noises, the mCE, from error rates by the tags of noises.

    Example:
        >>> mean_corruption_error({"gaussian": [0.1], "shot": [0.3]}, baseline={"gaussian": [0.2], "shot": [0.3]})
        0.75
    """
    if errors.keys() != baseline.keys():
        raise ValueError(f"errors and baseline must hold the same noises, got {sorted(errors)} and {sorted(baseline)}")
    return fmean(corruption_error(rates, baseline[tag]) for tag, rates in errors.items())
