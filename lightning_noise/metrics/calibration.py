r"""Calibration of classifiers, from sums in :math:`M` bins of equal width of the confidence.

The functions take these sums as tensors of shape :math:`(*, M)`:

==================  =============================================================================================
``confidence_sum``  the sum of the confidences :math:`c_i`
``correct``         the number of correct predictions, :math:`a_i = 1`
``count``           the number of predictions, :math:`n_b`
``variance_sum``    :math:`S_b = \sum_{i \in b} c_i (1 - c_i)`, the variance of ``correct`` under perfect calibration
==================  =============================================================================================
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lightning_noise._checks import check_counts
from lightning_noise.metrics.base import RESOLUTION, Predictions, Sums, bin_indices, quantize

__all__ = [
    "AdaptiveCalibrationError",
    "CalibrationBins",
    "ExpectedCalibrationError",
    "TemperatureScaling",
    "calibration_floor",
    "calibration_z",
    "debiased_calibration_error",
    "expected_calibration_error",
]


class _ConfidenceSums(Sums):
    """Sums over the predictions in bins of the confidence, by default of equal width."""

    states: ClassVar[tuple[str, ...]] = ("confidence_sum", "correct", "count")

    confidence_sum: Tensor
    correct: Tensor

    def __init__(self, n_bins: int = 15, n_groups: int = 1):
        check_counts(n_bins=n_bins)
        super().__init__(n_groups, **dict.fromkeys(self.states, (n_bins,)))
        self.n_bins = n_bins

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        preds = self._read(preds, target)
        confidence = preds.confidence
        sums = {
            "confidence_sum": quantize(confidence),
            "correct": preds.label == target,
            "count": preds.ones,
            "variance_sum": quantize(confidence * (1 - confidence)),
        }
        self._add_binned(groups, self._place(preds), **{state: sums[state] for state in self.states})
        self._add(groups, undefined=preds.undefined)

    def _place(self, preds: Predictions) -> Tensor:
        """Returns the bin of each prediction."""
        return bin_indices(preds.confidence, self.n_bins)


class ExpectedCalibrationError(_ConfidenceSums):
    r"""The expected calibration error (ECE) with bins of equal width, without storing predictions.

    .. math:: \text{ECE} = \sum_b \frac{n_b}{n} \left| \text{acc}_b - \text{conf}_b \right|

    A perfectly calibrated model does not reach 0, because the accuracy in a bin scatters. The scatter grows with fewer samples
    and with lower accuracy, so errors at different accuracies are not comparable; see :class:`CalibrationBins`. If a prediction
    was not finite, the value is NaN.

    Args:
        n_bins: The number of bins, :math:`M`.
        n_groups: The number of groups of samples; see :class:`~lightning_noise.metrics.base.Sums`.

    References:
        Obtaining Well Calibrated Probabilities Using Bayesian Binning (Pakdaman Naeini et al., 2015),
        https://ojs.aaai.org/index.php/AAAI/article/view/9602

    Example:
        >>> metric = ExpectedCalibrationError()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()  # (|1 - 0.9| + |0 - 0.8|) / 2
        tensor(0.4500)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    key = "ece"
    refuses_nan = False

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"ece": expected_calibration_error(sums["confidence_sum"] / RESOLUTION, sums["correct"], sums["count"])}


class AdaptiveCalibrationError(_ConfidenceSums):
    r"""The expected calibration error with bins of equally many predictions.

    .. math:: \frac{1}{M} \sum_b \left| \text{acc}_b - \text{conf}_b \right|

    If the model is confident, bins of equal width have most predictions in the last bin. Bins of equal mass resolve these
    predictions. The states are histograms of the log-odds, so no predictions are stored. At the edge of a bin, the
    predictions of an interval of at most 2 % of the odds are split evenly. The floor of a calibrated model is not 0 either;
    see :class:`CalibrationBins`.

    Args:
        n_bins: The number of bins, :math:`M`.
        n_groups: The number of groups of samples; see :class:`~lightning_noise.metrics.base.Sums`.

    References:
        Posterior calibration and exploratory analysis for natural language processing models (Nguyen and O'Connor, 2015),
        https://arxiv.org/abs/1508.05154

    Example:
        >>> metric = AdaptiveCalibrationError(n_bins=2)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()  # (|1 - 0.9| + |0 - 0.8|) / 2
        tensor(0.4500)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    key = "adaptive_ece"

    def __init__(self, n_bins: int = 15, n_groups: int = 1):
        check_counts(n_bins=n_bins)
        super().__init__(Predictions.n_odds, n_groups)
        self.n_bins = n_bins

    def _place(self, preds: Predictions) -> Tensor:
        return preds.odds_bins

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        gap = sums["correct"] - sums["confidence_sum"] / RESOLUTION
        n = sums["count"].sum(-1, keepdim=True)
        edges = n * torch.arange(1, self.n_bins, dtype=n.dtype) / self.n_bins
        at = torch.searchsorted(sums["count"].cumsum(-1), edges)  # the interval in which each bin ends
        past = (sums["count"].cumsum(-1).gather(-1, at) - edges) / sums["count"].gather(-1, at)
        ends = gap.cumsum(-1).gather(-1, at) - (past * gap.gather(-1, at)).nan_to_num(0.0)
        zero, total = torch.zeros_like(n), gap.sum(-1, keepdim=True)
        return {"adaptive_ece": torch.cat([zero, ends, total], -1).diff(dim=-1).abs().sum(-1) / n.squeeze(-1)}


class CalibrationBins(_ConfidenceSums):
    r"""The calibration of a classifier, beside what chance alone would show.

    ==========================  ================================================================================
    ``accuracy``                the share of correct predictions
    ``ece``                     the expected calibration error
    ``ece_floor``               the ECE of a perfectly calibrated model of these confidences
    ``ece_z``, ``ece_p``        standard errors above that floor, and the one-sided p value
    ``debiased_squared_error``  the squared calibration error without the scatter of the bins, of either sign
    ``signed_gap``              mean confidence minus accuracy: positive if the model is over-confident
    ==========================  ================================================================================

    Calibration errors on clean and on noisy data are not comparable, because the floor rises as the accuracy falls. The
    excess over the floor is comparable. The formulas are :class:`ExpectedCalibrationError`, :func:`calibration_floor`,
    :func:`calibration_z` and :func:`debiased_calibration_error`; the arguments are those of :class:`ExpectedCalibrationError`.

    References:
        Increasing the Reliability of Reliability Diagrams (Bröcker and Smith, 2007), https://doi.org/10.1175/WAF993.1. They
        resample to find what a calibrated model would show; here it is in closed form.

    Example:
        >>> metric = CalibrationBins()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()["signed_gap"]  # 0.85 - 0.5
        tensor(0.3500)
    """

    states = (*_ConfidenceSums.states, "variance_sum")

    variance_sum: Tensor

    def bins(self) -> list[Tensor]:
        """Returns the sums in each bin over all groups and ranks: confidence, correct, count, and c (1 - c)."""
        states = self._synchronized_states()
        confidence_sum, correct, count, variance_sum = (states[state].sum(0) for state in self.states)
        return [confidence_sum / RESOLUTION, correct, count, variance_sum / RESOLUTION]

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        correct, count = sums["correct"], sums["count"]
        confidence_sum, variance_sum = sums["confidence_sum"] / RESOLUTION, sums["variance_sum"] / RESOLUTION
        z = calibration_z(confidence_sum, correct, count, variance_sum)
        return {
            "accuracy": correct.sum(-1) / count.sum(-1),
            "ece": expected_calibration_error(confidence_sum, correct, count),
            "ece_floor": calibration_floor(variance_sum, count),
            "ece_z": z,
            "ece_p": torch.special.ndtr(-z),
            "debiased_squared_error": debiased_calibration_error(confidence_sum, correct, count),
            "signed_gap": (confidence_sum.sum(-1) - correct.sum(-1)) / count.sum(-1),
        }


class TemperatureScaling(Sums):
    r"""The best temperature of the logits, and the expected calibration error that remains.

    .. math:: T^* = \arg\min_T \sum_i -\log \text{softmax}(z_i / T)_{y_i}

    ``temperature`` is :math:`T^*`, or NaN without predictions. ``scaled_ece`` is the ECE of :math:`\text{softmax}(z / T^*)`,
    which no temperature removes. :math:`T^* > 1` means that the model is over-confident.

    :math:`T^*` is the best of 31 temperatures from 0.1 to 10, which include 1 and are 17 % apart. At an end of the grid the
    optimum lies beyond it, for example if every prediction is correct. The states are sums at each temperature, so no logits
    are stored. ``compute`` also refuses a target with the probability 0. The arguments are those of
    :class:`ExpectedCalibrationError`.

    References:
        On Calibration of Modern Neural Networks (Guo et al., 2017), https://arxiv.org/abs/1706.04599

    Example:
        >>> logits = torch.tensor([2.0, -2.0]).repeat(100, 1) * 2.0  # twice the logits of a model with 98 % accuracy
        >>> metric = TemperatureScaling()
        >>> metric.update(logits, (torch.arange(100) < 2).long())
        >>> metric.compute()["temperature"]  # the temperature on the grid that is nearest to 2
        tensor(2.1544)
    """

    temperatures: ClassVar[tuple[float, ...]] = tuple(10 ** (i / 15 - 1) for i in range(31))

    loss_sum: Tensor
    confidence_sum: Tensor
    correct: Tensor

    def __init__(self, n_bins: int = 15, n_groups: int = 1):
        check_counts(n_bins=n_bins)
        bins = (len(self.temperatures), n_bins)
        super().__init__(n_groups, loss_sum=bins[:1], confidence_sum=bins, correct=bins, count=bins)
        self.n_bins = n_bins

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        preds = self._read(preds, target)
        correct, ones = preds.label == target, preds.ones  # the same at every temperature
        defined = preds.log_probability(target).isfinite()
        self._add(groups, undefined=~defined)
        for i, temperature in enumerate(self.temperatures):  # one at a time: all at once would hold the logits 31 times
            scaled = Predictions(preds.logits / temperature)
            loss = -scaled.log_probability(target).where(defined, 0)
            self._add_binned(groups, i * ones, loss_sum=quantize(loss))
            bins = bin_indices(scaled.confidence, self.n_bins) + i * self.n_bins
            self._add_binned(groups, bins, confidence_sum=quantize(scaled.confidence), correct=correct, count=ones)

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        best = sums["loss_sum"].argmin(-1)
        of_bins = (sums[state] for state in ("confidence_sum", "correct", "count"))
        confidence_sum, correct, count = (x.take_along_dim(best[..., None, None], -2).squeeze(-2) for x in of_bins)
        error = expected_calibration_error(confidence_sum / RESOLUTION, correct, count)
        temperature = error.new_tensor(self.temperatures)[best]
        return {"temperature": temperature.where(~error.isnan(), torch.nan), "scaled_ece": error}


def expected_calibration_error(confidence_sum: Tensor, correct: Tensor, count: Tensor) -> Tensor:
    """Returns the ECE; see :class:`ExpectedCalibrationError`."""
    return (correct - confidence_sum).abs().sum(-1) / count.sum(-1)


def debiased_calibration_error(confidence_sum: Tensor, correct: Tensor, count: Tensor) -> Tensor:
    r"""Returns the squared calibration error without the scatter of the bins.

    .. math:: \sum_b \frac{n_b}{n} \left[ (\text{acc}_b - \text{conf}_b)^2
        - \frac{\text{acc}_b (1 - \text{acc}_b)}{n_b - 1} \right]

    The unit is probability squared. For a calibrated model the result is negative about as often as positive. The spread of
    the confidences within a bin counts as scatter too, which lowers the mean by less than :math:`1 / (4 M n)`. A bin of one
    prediction adds nothing, because its scatter is unknown.

    References:
        Verified Uncertainty Calibration (Kumar et al., 2019), https://arxiv.org/abs/1909.10155

    Example:
        >>> sums = torch.tensor([1.0]), torch.tensor([1]), torch.tensor([2])  # as calibrated as two predictions can be
        >>> debiased_calibration_error(*sums)  # 0 - (1/2)(1/2) / (2 - 1)
        tensor(-0.2500)
    """
    accuracy = correct / count
    scatter = accuracy * (1 - accuracy) / (count - 1)
    gap = (correct - confidence_sum) / count
    return (count * (gap**2 - scatter)).where(count > 1, 0).sum(-1) / count.sum(-1)


def calibration_floor(variance_sum: Tensor, count: Tensor) -> Tensor:
    r"""Returns the ECE that a perfectly calibrated model of these confidences would show.

    .. math:: \frac{1}{n} \sum_b \sqrt{\frac{2}{\pi} S_b}

    The number of correct predictions in a bin is taken as normal. The result is within 5 % from 500 predictions on, and a tenth
    too low with 50.

    Example:
        >>> calibration_floor(torch.tensor([25.0]), torch.tensor([100]))  # 100 predictions of confidence 1/2
        tensor(0.0399)
    """
    return (2 / math.pi * variance_sum).sqrt().sum(-1) / count.sum(-1)


def calibration_z(confidence_sum: Tensor, correct: Tensor, count: Tensor, variance_sum: Tensor) -> Tensor:
    r"""Returns how many standard errors the ECE lies above its floor.

    .. math:: z = \frac{n \, (\text{ECE} - \text{floor})}{\sqrt{(1 - 2 / \pi) \sum_b S_b}}

    The one-sided p value is :math:`1 - \Phi(z)`. The scatter of few bins is skewed, so 5 to 8 % of calibrated models have a p
    value below 0.05. If all confidences are 0 or 1, nothing is left to chance: :math:`z` is infinite if a prediction
    contradicts its confidence, and NaN otherwise.

    Example:
        >>> sums = torch.tensor([50.0]), torch.tensor([60]), torch.tensor([100]), torch.tensor([25.0])
        >>> calibration_z(*sums)  # 100 (0.1 - 0.0399) / sqrt(0.3634 * 25)
        tensor(1.9942)
    """
    excess = expected_calibration_error(confidence_sum, correct, count) - calibration_floor(variance_sum, count)
    return count.sum(-1) * excess / ((1 - 2 / math.pi) * variance_sum.sum(-1)).sqrt()
