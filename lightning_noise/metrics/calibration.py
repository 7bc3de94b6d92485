"""Whether the confidence of a classifier is the share of its predictions that are right."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_noise.metrics.base import RESOLUTION, Predictions, Sums, Value, validate_bins, whole
from lightning_noise.metrics.functional import (
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
            "confidence_sum": whole(confidence),
            "correct": preds.label == target,
            "count": preds.ones,
            "variance_sum": whole(confidence * (1 - confidence)),
        }
        self._add_binned(groups, bin_indices(confidence, self.n_bins), **{state: sums[state] for state in self.states})
        self._add(groups, undefined=preds.undefined)


class ExpectedCalibrationError(_Binned[Tensor]):
    r"""The expected calibration error with bins of equal width, without keeping the predictions.

    It is the same for any split into batches, any order and any number of processes, and not a number where a prediction was
    none; see :func:`~lightning_noise.metrics.functional.expected_calibration_error`.

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
        value = self._single(self._value_of({state: values.sum(0) for state, values in self._states().items()}))
        return value.where(self.undefined.sum() == 0, torch.nan)

    def _value(self, sums: dict[str, Tensor]) -> Tensor:
        return expected_calibration_error(sums["confidence_sum"] / RESOLUTION, sums["correct"], sums["count"])


class CalibrationBins(_Binned[dict[str, Tensor]]):
    r"""The calibration of a classifier beside what chance alone would show, from sums in bins of equal width.

    ==========================  ================================================================================
    ``accuracy``                the share of the predictions that are right
    ``ece``                     the expected calibration error
    ``ece_floor``               what it would be for a perfectly calibrated model of these confidences
    ``ece_z``, ``ece_p``        standard errors above that floor, and the one-sided p value
    ``debiased_squared_error``  the squared error without the scatter of the bins, of either sign
    ``signed_gap``              mean confidence minus accuracy: positive where the model is too sure of itself
    ==========================  ================================================================================

    The error of a model on clean and on noisy data is not comparable, as the floor rises where the accuracy falls; what lies
    above the floor is. The sums of each bin, in each group of samples, are the states ``correct`` and ``count``, and in units
    of :math:`2^{-24}` ``confidence_sum`` and ``variance_sum``, all of shape :math:`(G, M)`. The values are the same for any
    split into batches, any order and any number of processes.

    Args:
        n_bins: The number of bins, :math:`M`.
        n_groups: The number of groups of samples for :meth:`estimates`, :math:`G`.

    Raises:
        ValueError: At ``compute``, if a prediction was not a number.

    References:
        Increasing the Reliability of Reliability Diagrams (Bröcker and Smith, 2007), https://doi.org/10.1175/WAF993.1, for
        what a calibrated model would show, by resampling; here in closed form.

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
        """Returns the sums in each bin, of all groups and processes: of confidences, right ones, all, and c (1 - c)."""
        states = self._synchronised()
        sums = [states[state].sum(0) for state in self.states]
        return [sums[0] / RESOLUTION, sums[1], sums[2], sums[3] / RESOLUTION]

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
    r"""The temperature that fits the logits best, and the expected calibration error that is left at it.

    .. math:: T^* = \arg\min_T \sum_i -\log \text{softmax}(z_i / T)_{y_i}

    What is left is miscalibration that no temperature mends. :math:`T^* > 1` says that the model is too sure of itself. It is
    the best of 31 temperatures from 0.1 to 10, each 17 % above the one before, with 1 among them; at an end of the grid the
    optimum lies beyond it, as where every prediction is right. Sums at each temperature replace the logits, so it is the same
    for any split into batches, any order and any number of processes.

    ===============  ================================================================
    ``temperature``  :math:`T^*`, not a number without predictions
    ``scaled_ece``   the expected calibration error of :math:`\text{softmax}(z / T^*)`
    ===============  ================================================================

    Args:
        n_bins: The number of bins of the calibration error.
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if a prediction was not a number, or gave its class the probability 0.

    References:
        On Calibration of Modern Neural Networks (Guo et al., 2017), https://arxiv.org/abs/1706.04599

    Example:
        >>> logits = torch.tensor([2.0, -2.0]).repeat(100, 1) * 2.0  # twice the logits of a model that is right in 98 of 100
        >>> metric = TemperatureScaling()
        >>> metric.update(logits, (torch.arange(100) < 2).long())
        >>> metric.compute()["temperature"]  # the one on the grid that is nearest to 2
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
        hit, ones = preds.label == target, preds.ones  # no temperature changes which class is first
        defined = preds.log_probability(target).isfinite()
        self._add(groups, undefined=~defined)
        for i, temperature in enumerate(self.temperatures):  # not at once: that would hold the logits 31 times
            scaled = Predictions(preds.logits / temperature)
            loss = -scaled.log_probability(target).where(defined, 0)
            self._add_binned(groups, i * ones, loss_sum=whole(loss))
            bins = bin_indices(scaled.confidence, self.n_bins) + i * self.n_bins
            self._add_binned(groups, bins, confidence_sum=whole(scaled.confidence), correct=hit, count=ones)

    def _value(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        best = sums["loss_sum"].argmin()
        error = expected_calibration_error(
            sums["confidence_sum"][best] / RESOLUTION, sums["correct"][best], sums["count"][best]
        )
        temperature = error.new_tensor(self.temperatures)[best]
        return {"temperature": temperature.where(~error.isnan(), torch.nan), "scaled_ece": error}
