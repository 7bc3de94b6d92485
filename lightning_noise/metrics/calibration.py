"""Calibration metrics of classifiers."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lightning_noise.metrics.base import RESOLUTION, Predictions, Sums, Value, quantize, validate_bins
from lightning_noise.metrics.functional.calibration import (
    bin_indices,
    calibration_floor,
    calibration_z,
    debiased_calibration_error,
    expected_calibration_error,
    signed_gap,
)

__all__ = ["CalibrationBins", "ExpectedCalibrationError", "TemperatureScaling"]


class _Binned(Sums[Value]):
    """Sums over the predictions in bins of equal width of the confidence."""

    confidence_sum: Tensor
    correct: Tensor

    def __init__(self, n_bins: int, n_groups: int, *states: str):
        super().__init__(n_groups, **dict.fromkeys(states, validate_bins(n_bins)))
        self.n_bins = n_bins
        self.states = states

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`, in groups of shape :math:`(B,)`."""
        preds = Predictions.of(preds)
        confidence = preds.confidence
        sums = {
            "confidence_sum": quantize(confidence),
            "correct": preds.label == target,
            "count": preds.ones,
            "variance_sum": quantize(confidence * (1 - confidence)),
        }
        self._add_binned(groups, bin_indices(confidence, self.n_bins), **{state: sums[state] for state in self.states})
        self._add(groups, undefined=preds.undefined)


class ExpectedCalibrationError(_Binned[Tensor]):
    r"""The expected calibration error with bins of equal width, without storing predictions.

    The value is the same for any split into batches, any order and any number of ranks. If a prediction was not finite, the
    value is NaN. The formula is :func:`~lightning_noise.metrics.functional.expected_calibration_error`.

    Args:
        n_bins: The number of bins, :math:`M`.
        n_groups: The number of groups of samples for :meth:`estimates`.

    Example:
        >>> metric = ExpectedCalibrationError()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()  # (|1 - 0.9| + |0 - 0.8|) / 2
        tensor(0.4500)
    """

    higher_is_better = False
    key = "ece"

    def __init__(self, n_bins: int = 15, n_groups: int = 1):
        super().__init__(n_bins, n_groups, "confidence_sum", "correct", "count")

    def compute(self) -> Tensor:
        return torch.tensor(math.nan, device=self.device) if self.undefined.any() else super().compute()

    def _value(self, sums: dict[str, Tensor]) -> Tensor:
        return expected_calibration_error(sums["confidence_sum"] / RESOLUTION, sums["correct"], sums["count"])


class CalibrationBins(_Binned[dict[str, Tensor]]):
    r"""The calibration of a classifier, beside what chance alone would show.

    ==========================  ================================================================================
    ``accuracy``                the share of correct predictions
    ``ece``                     the expected calibration error
    ``ece_floor``               the expected calibration error of a perfectly calibrated model of these confidences
    ``ece_z``, ``ece_p``        standard errors above that floor, and the one-sided p value
    ``debiased_squared_error``  the squared calibration error without the scatter of the bins, of either sign
    ``signed_gap``              mean confidence minus accuracy: positive if the model is over-confident
    ==========================  ================================================================================

    Calibration errors on clean and on noisy data are not comparable, because the floor rises as the accuracy falls. The
    excess over the floor is comparable.

    The states are sums in bins of equal width, of shape :math:`(G, M)`: ``correct`` and ``count``, and in units of
    :math:`2^{-24}` ``confidence_sum`` and ``variance_sum``. The values are the same for any split into batches, any order and
    any number of ranks.

    Args:
        n_bins: The number of bins, :math:`M`.
        n_groups: The number of groups of samples for :meth:`estimates`, :math:`G`.

    Raises:
        ValueError: At ``compute``, if a prediction was not finite.

    References:
        Increasing the Reliability of Reliability Diagrams (Bröcker and Smith, 2007), https://doi.org/10.1175/WAF993.1. They
        resample to find what a calibrated model would show; here it is in closed form.

    Example:
        >>> metric = CalibrationBins()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> values = metric.compute()
        >>> values["ece"], values["signed_gap"]  # (0.1 + 0.8) / 2, 0.85 - 0.5
        (tensor(0.4500), tensor(0.3500))
    """

    variance_sum: Tensor

    def __init__(self, n_bins: int = 15, n_groups: int = 1):
        super().__init__(n_bins, n_groups, "confidence_sum", "correct", "count", "variance_sum")

    def bins(self) -> list[Tensor]:
        """Returns the sums in each bin over all groups and ranks: confidence, correct, count, and c (1 - c)."""
        states = self._synchronized_states()
        confidence_sum, correct, count, variance_sum = (states[state].sum(0) for state in self.states)
        return [confidence_sum / RESOLUTION, correct, count, variance_sum / RESOLUTION]

    def _value(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        binned = sums["confidence_sum"] / RESOLUTION, sums["correct"], sums["count"]
        variance_sum = sums["variance_sum"] / RESOLUTION
        z = calibration_z(*binned, variance_sum)
        return {
            "accuracy": sums["correct"].sum() / sums["count"].sum(),
            "ece": expected_calibration_error(*binned),
            "ece_floor": calibration_floor(variance_sum, sums["count"]),
            "ece_z": z,
            "ece_p": torch.special.ndtr(-z),
            "debiased_squared_error": debiased_calibration_error(*binned),
            "signed_gap": signed_gap(*binned),
        }


class TemperatureScaling(Sums[dict[str, Tensor]]):
    r"""The best temperature of the logits, and the expected calibration error that remains.

    .. math:: T^* = \arg\min_T \sum_i -\log \text{softmax}(z_i / T)_{y_i}

    ===============  ================================================================
    ``temperature``  :math:`T^*`; NaN without predictions
    ``scaled_ece``   the expected calibration error of :math:`\text{softmax}(z / T^*)`
    ===============  ================================================================

    :math:`T^* > 1` means that the model is over-confident. No temperature removes the error that remains.

    :math:`T^*` is the best of 31 temperatures from 0.1 to 10, which include 1 and are 17 % apart. At an end of the grid the
    optimum lies beyond it, for example if every prediction is correct. The states are sums at each temperature, so no logits
    are stored. The values are the same for any split into batches, any order and any number of ranks.

    Args:
        n_bins: The number of bins of the calibration error.
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if a prediction was not finite or gave its class the probability 0.

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
        n_temperatures = len(self.temperatures)
        bins = (n_temperatures, validate_bins(n_bins))
        super().__init__(n_groups, loss_sum=n_temperatures, confidence_sum=bins, correct=bins, count=bins)
        self.n_bins = n_bins

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`, in groups of shape :math:`(B,)`."""
        preds = Predictions.of(preds)
        correct, ones = preds.label == target, preds.ones  # the same at every temperature
        defined = preds.log_probability(target).isfinite()
        self._add(groups, undefined=~defined)
        for i, temperature in enumerate(self.temperatures):  # one at a time: all at once would hold the logits 31 times
            scaled = Predictions(preds.logits / temperature)
            loss = -scaled.log_probability(target).where(defined, 0)
            self._add_binned(groups, i * ones, loss_sum=quantize(loss))
            bins = bin_indices(scaled.confidence, self.n_bins) + i * self.n_bins
            self._add_binned(groups, bins, confidence_sum=quantize(scaled.confidence), correct=correct, count=ones)

    def _value(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        best = sums["loss_sum"].argmin()
        confidence_sum, correct, count = (sums[state][best] for state in ("confidence_sum", "correct", "count"))
        error = expected_calibration_error(confidence_sum / RESOLUTION, correct, count)
        temperature = error.new_tensor(self.temperatures)[best]
        return {"temperature": temperature.where(~error.isnan(), torch.nan), "scaled_ece": error}
