"""Standard errors and 95 % intervals of metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, variance
from typing import NamedTuple

from scipy import stats

__all__ = ["Interval", "jackknife_error", "t_interval", "training_error", "wilson_interval"]


class Interval(NamedTuple):
    """A standard error with the limits of a 95 % interval; all three are NaN if the error is unknown."""

    standard_error: float
    low: float
    high: float


def jackknife_error(total: float, without: Sequence[float], sizes: Sequence[int]) -> float:
    r"""Returns the standard error of an estimate from its values without each group of samples.

    .. math:: \text{SE}^2 = \frac{1}{G} \sum_g \frac{(\tilde\theta_g - \bar\theta)^2}{h_g - 1}, \quad
        \tilde\theta_g = h_g \theta - (h_g - 1) \theta_{-g}, \quad h_g = \frac{n}{m_g}

    Here :math:`\bar\theta` is the mean of the pseudo-values :math:`\tilde\theta_g`, weighted by the group sizes :math:`m_g`.
    For a mean over samples that were assigned to groups at random, :math:`\text{SE}^2` is unbiased, whatever the sizes. The
    error has :math:`G - 1` degrees of freedom. If the estimate is not a smooth function of means, the error is too large: for
    the calibration error of a calibrated model, by half.

    Args:
        total: The estimate from all samples, :math:`\theta`.
        without: The estimate without each of the :math:`G` groups, :math:`\theta_{-g}`.
        sizes: The number of samples in each group. Empty groups are ignored; with fewer than two groups the error is NaN.

    References:
        Delete-m Jackknife for Unequal m (Busing et al., 1999), https://doi.org/10.1023/A:1008800423698

    Example:
        >>> jackknife_error(3.0, [4.5, 3.0, 1.5], [1, 1, 1])  # of 0, 3 and 6: their standard deviation over the root of 3
        1.7320508075688772
    """
    n = sum(sizes)
    groups = [(n / size, value) for size, value in zip(sizes, without, strict=True) if size]
    if len(groups) < 2:
        return math.nan
    pseudo = [(ratio, (ratio - 1) * (total - value)) for ratio, value in groups]  # minus the estimate, so that 0 is exact
    center = math.fsum(value / ratio for ratio, value in pseudo)
    return math.sqrt(fmean((value - center) ** 2 / (ratio - 1) for ratio, value in pseudo))


def training_error(totals: Sequence[float], without: Sequence[Sequence[float]], sizes: Sequence[int]) -> float:
    r"""Returns the standard error that the training adds to a mean over trainings, evaluated on the same samples.

    .. math:: \text{SE}^2 = \max\left(0, \frac{s^2}{k} - \frac{1}{k (k - 1)} \sum_{i=1}^k \text{SE}_i^2 \right)

    Here :math:`s^2` is the variance of the :math:`k` estimates, and :math:`\text{SE}_i` the jackknife error of the estimate of
    training :math:`i` minus the mean estimate. Two trainings disagree on some samples by chance. That part of :math:`s^2` is
    subtracted, because the jackknife error of the mean estimate already includes it. So the squares of both errors can be
    added; their sum is unbiased except for the cut at 0. The error has :math:`k - 1` degrees of freedom.

    Args:
        totals: The estimate of each training from all samples.
        without: For each training, its estimate without each group of samples. Empty if there are no groups.
        sizes: The number of samples in each group.

    References:
        On the Variance of Neural Network Training with respect to Test Sets and Distributions (Jordan, 2023),
        https://arxiv.org/abs/2304.01910

    Example:
        >>> training_error([1.0, 3.0], [[], []], [])
        1.0
        >>> training_error([1.0, 3.0], [[0.0, 2.0], [4.0, 2.0]], [5, 5])  # they disagree in the first half of the samples
        0.0
    """
    if not all(map(math.isfinite, totals)):
        return math.nan
    k, center = len(totals), fmean(totals)
    centers = [fmean(values) for values in zip(*without, strict=True)]
    shared = [
        jackknife_error(total - center, [value - mean for value, mean in zip(values, centers, strict=True)], sizes) ** 2
        for total, values in zip(totals, without, strict=True)
        if values
    ]
    return math.sqrt(max(0.0, variance(totals) / k - math.fsum(shared) / (k * (k - 1))))


def t_interval(value: float, errors: Iterable[tuple[float, int]]) -> Interval:
    r"""Returns the 95 % interval of an estimate with independent sources of error.

    .. math:: \theta \pm t_{0.975, \nu} \, \text{SE}, \quad \text{SE}^2 = \sum_j s_j^2, \quad
        \frac{1}{\nu} = \sum_j \frac{(s_j / \text{SE})^4}{\nu_j}

    The degrees of freedom :math:`\nu` are those of Welch and Satterthwaite.

    Args:
        value: The estimate, :math:`\theta`.
        errors: The standard error :math:`s_j` of each source with its degrees of freedom :math:`\nu_j`. Zeros are ignored.

    References:
        The Generalization of 'Student's' Problem When Several Different Population Variances Are Involved (Welch, 1947),
        https://doi.org/10.1093/biomet/34.1-2.28

    Example:
        >>> error, low, high = t_interval(5.0, [(3.0, 10), (4.0, 10)])
        >>> error, round(high - 5.0, 3)  # 18.5 degrees of freedom: 2.096 errors
        (5.0, 10.482)
    """
    standard_error, quantile = _combine(errors)
    half = quantile * standard_error if standard_error else 0.0
    return Interval(standard_error, value - half, value + half)


def wilson_interval(value: float, errors: Iterable[tuple[float, int]], n: int) -> Interval:
    r"""Returns Wilson's 95 % interval of a proportion with independent sources of error.

    .. math:: \{ p : |\hat p - p| \leq q \sqrt{p (1 - p) / m} \}, \quad m = \frac{\hat p (1 - \hat p)}{\text{SE}^2}

    The quantile :math:`q` and :math:`\text{SE}` are those of :func:`t_interval`, and :math:`m` is the number of independent
    samples with this error. If the proportion is 0 or 1, or its error is 0, then :math:`m` is ``n`` and :math:`q` is 1.96. So
    the interval stays within [0, 1], and a model without a mistake is not certain to make none.

    Args:
        value: The proportion, :math:`\hat p`.
        errors: As in :func:`t_interval`.
        n: The number of samples.

    References:
        Probable Inference, the Law of Succession, and Statistical Inference (Wilson, 1927),
        https://doi.org/10.1080/01621459.1927.10502953

    Example:
        >>> error, low, high = wilson_interval(1.0, [(0.0, 15)], n=100)
        >>> round(low, 3), round(high, 3)
        (0.963, 1.0)
    """
    standard_error, quantile = _combine(errors)
    if math.isnan(standard_error):
        return Interval(math.nan, math.nan, math.nan)
    if standard_error > 0 and 0 < value < 1:
        samples = value * (1 - value) / standard_error**2
    else:
        quantile, samples = 1.96, n
    shift = quantile**2 / samples
    center, half = value + shift / 2, math.sqrt(value * (1 - value) * shift + shift**2 / 4)
    return Interval(standard_error, (center - half) / (1 + shift), (center + half) / (1 + shift))


def _combine(errors: Iterable[tuple[float, int]]) -> tuple[float, float]:
    """Returns the standard error of all sources and its quantile of Student's t, which is NaN if there is no error."""
    errors = [(error, degrees) for error, degrees in errors if error != 0]
    standard_error = math.hypot(*(error for error, _ in errors))
    if not standard_error > 0:
        return standard_error, math.nan
    degrees = 1 / math.fsum((error / standard_error) ** 4 / degrees for error, degrees in errors)
    return standard_error, float(stats.t.ppf(0.975, degrees))
