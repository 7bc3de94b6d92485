"""Standard errors and 95 % intervals of metrics, for one estimate as a float or for many as an array."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

__all__ = ["Interval", "average", "jackknife_error", "t_interval", "training_error", "wilson_interval"]


class Interval(NamedTuple):
    """A standard error with the limits of a 95 % interval; all three are NaN if the error is unknown."""

    standard_error: Any
    low: Any
    high: Any


def average(values: ArrayLike) -> Any:
    """Returns the mean over the first axis. Equal values are their own mean, to the last bit.

    Example:
        >>> average([0.1] * 3)
        0.1
    """
    values = np.asarray(values, float)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return _as_float(np.where((values == values[0]).all(0), values[0], values.mean(0)))


@np.errstate(invalid="ignore", over="ignore")
def jackknife_error(total: ArrayLike, without: ArrayLike, sizes: Sequence[int]) -> Any:
    r"""Returns the standard error of an estimate from its values without each group of samples.

    .. math:: \text{SE}^2 = \frac{1}{G} \sum_g \frac{(\tilde\theta_g - \bar\theta)^2}{h_g - 1}, \quad
        \tilde\theta_g = h_g \theta - (h_g - 1) \theta_{-g}, \quad h_g = \frac{n}{m_g}

    Here :math:`\bar\theta` is the mean of the pseudo-values :math:`\tilde\theta_g`, weighted by the group sizes :math:`m_g`.
    For a mean over samples that were assigned to groups at random, :math:`\text{SE}^2` is unbiased, whatever the sizes. The
    error has :math:`G - 1` degrees of freedom. If the estimate is not a smooth function of means, the error is too large: for
    the calibration error of a calibrated model, by half.

    Args:
        total: The estimate from all samples, :math:`\theta`, of shape :math:`(*)`.
        without: The estimate without each of the :math:`G` groups, :math:`\theta_{-g}`, of shape :math:`(*, G)`.
        sizes: The number of samples in each group. Empty groups are ignored; with fewer than two groups the error is NaN.

    References:
        Delete-m Jackknife for Unequal m (Busing et al., 1999), https://doi.org/10.1023/A:1008800423698

    Example:
        >>> jackknife_error(3.0, [4.5, 3.0, 1.5], [1, 1, 1])  # of 0, 3 and 6: their standard deviation over the root of 3
        1.7320508075688772
    """
    total, used = np.asarray(total, float), np.asarray(sizes, int) > 0
    if used.sum() < 2:
        return _as_float(np.full(total.shape, np.nan))
    ratios = sum(sizes) / np.asarray(sizes)[used]
    pseudo = (ratios - 1) * (total[..., None] - np.asarray(without)[..., used])  # minus the estimate, so that 0 is exact
    scatter = pseudo - (pseudo / ratios).sum(-1, keepdims=True)
    error = np.sqrt((scatter**2 / (ratios - 1)).mean(-1))
    return _as_float(np.where(error < 1e-12 * abs(total), 0.0, error))  # less is rounding, of which reports would show digits


@np.errstate(invalid="ignore", over="ignore")
def training_error(totals: ArrayLike, without: ArrayLike, sizes: Sequence[int]) -> Any:
    r"""Returns the standard error that the training adds to a mean over trainings, evaluated on the same samples.

    .. math:: \text{SE}^2 = \max\left(0, \frac{s^2}{k} - \frac{1}{k (k - 1)} \sum_{i=1}^k \text{SE}_i^2 \right)

    Here :math:`s^2` is the variance of the :math:`k` estimates, and :math:`\text{SE}_i` the jackknife error of the estimate of
    training :math:`i` minus the mean estimate. Two trainings disagree on some samples by chance. That part of :math:`s^2` is
    subtracted, because the jackknife error of the mean estimate already includes it. So the squares of both errors can be
    added; their sum is unbiased except for the cut at 0. The error has :math:`k - 1` degrees of freedom.

    Args:
        totals: The estimate of each training from all samples, of shape :math:`(k, *)`.
        without: The same without each of the :math:`G` groups of samples, of shape :math:`(k, *, G)`, with :math:`G = 0` if
            there are no groups.
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
    totals, without = np.asarray(totals, float), np.asarray(without, float)
    k = len(totals)
    squares = totals.var(0, ddof=1) / k
    if len(sizes):
        shared = jackknife_error(totals - average(totals), without - average(without), sizes)
        squares = np.maximum(0, squares - (np.asarray(shared) ** 2).sum(0) / (k * (k - 1)))
    return _as_float(np.sqrt(squares))


def t_interval(value: ArrayLike, errors: Iterable[tuple[ArrayLike, ArrayLike]]) -> Interval:
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
    value, (standard_error, quantile) = np.asarray(value), _combine(errors)
    half = np.where(standard_error == 0, 0.0, quantile * standard_error)
    return Interval(*map(_as_float, (standard_error, value - half, value + half)))


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def wilson_interval(value: ArrayLike, errors: Iterable[tuple[ArrayLike, ArrayLike]], n: int) -> Interval:
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
    value, (standard_error, quantile) = np.asarray(value), _combine(errors)
    scatters = (standard_error > 0) & (value > 0) & (value < 1)
    samples = np.where(scatters, value * (1 - value) / standard_error**2, n)
    shift = np.where(scatters, quantile, 1.96) ** 2 / samples + 0 * standard_error  # NaN if the error is unknown
    center, half = value + shift / 2, np.sqrt(value * (1 - value) * shift + shift**2 / 4)
    low = np.clip((center - half) / (1 + shift), 0, value)  # rounding may lead beyond
    high = np.clip((center + half) / (1 + shift), value, 1)
    return Interval(*map(_as_float, (standard_error, low, high)))


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def _combine(errors: Iterable[tuple[ArrayLike, ArrayLike]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the standard error of all sources and its quantile of Student's t, which is NaN if there is no error."""
    sources = [(np.asarray(error, float), np.asarray(degrees)) for error, degrees in errors]
    standard_error = np.hypot.reduce([error for error, _ in sources])
    shares = [np.where(error == 0, 0, (error / standard_error) ** 4 / degrees) for error, degrees in sources]
    return standard_error, stdtrit(1 / sum(shares), 0.975)


def _as_float(value: np.ndarray) -> Any:
    """Returns an array, or the number in an array without axes."""
    return value if value.ndim else value.item()
