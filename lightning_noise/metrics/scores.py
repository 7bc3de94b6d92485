"""Scores of predictions against targets, for classifiers and regression."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_noise.loop.internals import cast_states
from lightning_noise.metrics.base import RESOLUTION, Predictions, Sums, quantize, validate_bins
from lightning_noise.metrics.functional.calibration import bin_indices
from lightning_noise.metrics.functional.scores import murphy_decomposition

__all__ = ["BrierDecomposition", "BrierScore", "CrossEntropy", "MeanAbsoluteError", "MeanSquaredError", "R2Score"]


class CrossEntropy(Sums[Tensor]):
    r"""The mean cross-entropy of all predictions, in nats.

    .. math:: \frac{1}{n} \sum_i -\log p_{i y_i}

    The value is the same for any split into batches, any order and any number of ranks.

    Args:
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if a loss was NaN or above :math:`2^{40}`, as for a class with the probability 0.

    Example:
        >>> metric = CrossEntropy()
        >>> metric.update(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        >>> metric.compute()  # log 4
        tensor(1.3863)
    """

    higher_is_better = False
    key = "loss"
    limit = 2.0**40  # the sum of 2^23 such losses fits an int64

    loss_whole: Tensor
    loss_fraction: Tensor

    def __init__(self, n_groups: int = 1):
        super().__init__(n_groups, loss_whole=(), loss_fraction=(), count=())

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`, in groups of shape :math:`(B,)`."""
        preds = Predictions.of(preds)
        loss = -preds.log_probability(target)
        defined = loss <= self.limit
        loss = loss.where(defined, 0.0)
        floor = loss.floor()
        sums = {"loss_whole": floor.long(), "loss_fraction": quantize(loss - floor), "count": preds.ones}
        self._add(groups, **sums, undefined=~defined)

    def _value(self, sums: dict[str, Tensor]) -> Tensor:
        return (sums["loss_whole"] + sums["loss_fraction"] / RESOLUTION) / sums["count"]


class BrierScore(Sums[Tensor]):
    r"""The Brier score of all classes.

    .. math:: \frac{1}{n} \sum_{i, k} (p_{ik} - [y_i = k])^2

    The score is the mean squared distance of the probabilities from the truth. It lies in [0, 2]; lower is better.
    :class:`BrierDecomposition` splits it into its parts.

    Args:
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if a prediction was not finite.

    References:
        Verification of Forecasts Expressed in Terms of Probability (Brier, 1950),
        https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2

    Example:
        >>> metric = BrierScore()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()  # (0.1^2 + 0.1^2 + 0.8^2 + 0.8^2) / 2
        tensor(0.6500)
    """

    higher_is_better = False
    key = "brier"

    score_sum: Tensor

    def __init__(self, n_groups: int = 1):
        super().__init__(n_groups, score_sum=(), count=())

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`, in groups of shape :math:`(B,)`."""
        preds = Predictions.of(preds)
        self._add(groups, score_sum=_brier(preds, target), count=preds.ones, undefined=preds.undefined)

    def _value(self, sums: dict[str, Tensor]) -> Tensor:
        return sums["score_sum"] / RESOLUTION / sums["count"]


class BrierDecomposition(Sums[dict[str, Tensor]]):
    r"""The Brier score of all classes with its parts: reliability, resolution, uncertainty.

    .. math:: \frac{1}{n} \sum_{i, k} (p_{ik} - [y_i = k])^2 \approx \text{reliability} - \text{resolution} + \text{uncertainty}

    The states are sums in bins of equal width for each class. The parts leave a remainder, because probabilities differ within
    a bin of width :math:`1 / M`.

    ===============  ======================================================================
    ``brier``        the score; lower is better
    ``reliability``  the squared miscalibration: how far probabilities are from frequencies
    ``resolution``   how far the predictions separate the samples; higher is better
    ``uncertainty``  the score of predicting class frequencies, a property of the data
    ===============  ======================================================================

    Args:
        num_classes: The number of classes, :math:`K`.
        n_bins: The number of bins, :math:`M`.
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: If the logits have another number of classes; at ``compute``, if a prediction was not finite.

    References:
        See :class:`BrierScore` and :func:`~lightning_noise.metrics.functional.murphy_decomposition`.

    Example:
        >>> metric = BrierDecomposition(num_classes=2)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()["uncertainty"]  # two classes of frequency 1/2
        tensor(0.5000)
    """

    score_sum: Tensor
    probability_sum: Tensor
    correct: Tensor

    def __init__(self, num_classes: int, n_bins: int = 15, n_groups: int = 1):
        bins = (num_classes, validate_bins(n_bins))
        super().__init__(n_groups, score_sum=(), probability_sum=bins, correct=bins, count=bins)
        self.num_classes = num_classes
        self.n_bins = n_bins

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`, in groups of shape :math:`(B,)`."""
        preds = Predictions.of(preds)
        preds.check_classes(self, self.num_classes)
        self._add(groups, score_sum=_brier(preds, target), undefined=preds.undefined)
        classes = torch.arange(self.num_classes, device=target.device).view(-1, *[1] * (target.ndim - 1))
        probabilities, correct = preds.probabilities.nan_to_num(0.0), target[:, None] == classes
        bins = bin_indices(probabilities, self.n_bins) + self.n_bins * classes
        sums = {"probability_sum": quantize(probabilities), "correct": correct, "count": torch.ones_like(bins)}
        self._add_binned(groups, bins, **sums)

    def _value(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = murphy_decomposition(sums["probability_sum"] / RESOLUTION, sums["correct"], sums["count"])
        score = sums["score_sum"] / RESOLUTION / (sums["count"].sum() / self.num_classes)
        return {"brier": score, **dict(zip(("reliability", "resolution", "uncertainty"), parts, strict=True))}


class _RegressionSums(Sums[Tensor]):
    """A mean error from sums in float64 or, on a device without float64, in float32."""

    states: ClassVar[tuple[str, ...]] = ("error_sum",)

    error_sum: Tensor

    def __init__(self, n_groups: int = 1):
        super().__init__(n_groups, count=())
        for state in self.states:
            self.add_state(state, torch.zeros(n_groups, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, groups: Tensor | None = None) -> None:
        """Adds predictions and targets of shape :math:`(B, *)`, in groups of shape :math:`(B,)`."""
        target = target.to(self.error_sum.dtype)
        terms = self._terms(preds.to(self.error_sum.dtype) - target, target)
        finite = torch.stack([term.isfinite() for term in terms.values()]).all(0)
        self._add(groups, **{state: term.where(finite, 0.0) for state, term in terms.items()})
        self._add(groups, count=torch.ones_like(finite), undefined=~finite)

    def _terms(self, error: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns what each element adds to each state."""
        raise NotImplementedError

    def _value(self, sums: dict[str, Tensor]) -> Tensor:
        return sums["error_sum"] / sums["count"]

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        if fn(torch.zeros(())).device.type in _WITHOUT_FLOAT64:
            cast_states(self, self.states, torch.float32)
        return super()._apply(fn, *args, **kwargs)


_WITHOUT_FLOAT64 = {"mps"}


class MeanSquaredError(_RegressionSums):
    r"""The mean squared error of a regression, in units of the target squared.

    .. math:: \text{MSE} = \frac{1}{n} \sum_i (\hat y_i - y_i)^2

    Sums are in float64, or in float32 on a device without float64, so another order of the samples changes only the rounding.

    Args:
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if a squared error was not finite.

    Example:
        >>> metric = MeanSquaredError()
        >>> metric.update(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
        >>> metric.compute()  # (0 + 4) / 2
        tensor(2.)
    """

    higher_is_better = False
    key = "mse"

    def _terms(self, error: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"error_sum": error.square()}


class MeanAbsoluteError(_RegressionSums):
    r"""The mean absolute error of a regression, in units of the target.

    .. math:: \text{MAE} = \frac{1}{n} \sum_i |\hat y_i - y_i|

    Sums are as in :class:`MeanSquaredError`.

    Args:
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if an error was not finite.

    Example:
        >>> metric = MeanAbsoluteError()
        >>> metric.update(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
        >>> metric.compute()  # (0 + 2) / 2
        tensor(1.)
    """

    higher_is_better = False
    key = "mae"

    def _terms(self, error: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"error_sum": error.abs()}


class R2Score(_RegressionSums):
    r"""The coefficient of determination of a regression: the share of the target's variance that is explained.

    .. math:: R^2 = 1 - \frac{\text{MSE}}{\text{Var}(y)}, \quad
        \text{Var}(y) = \frac{1}{n} \sum_i y_i^2 - \Big( \frac{1}{n} \sum_i y_i \Big)^2

    Predicting the mean of the target gives 0, and a worse model is negative. All :math:`n` elements count alike: several
    outputs share one mean, unlike in scikit-learn, which averages a score for each output. Without a group, mean and variance
    are those of the remaining samples. If all targets are equal, the value is NaN.

    Sums are as in :class:`MeanSquaredError`. The variance is a difference, so its relative error is that of the sums times
    :math:`\overline{y^2} / \text{Var}(y)`.

    Args:
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if a squared error or a squared target was not finite.

    Example:
        >>> metric = R2Score()
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
        >>> metric.compute()  # 1 - (1 / 2) / 1
        tensor(0.5000)
    """

    higher_is_better = True
    key = "r2"
    states = ("error_sum", "target_sum", "square_sum")

    target_sum: Tensor
    square_sum: Tensor

    def _terms(self, error: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"error_sum": error.square(), "target_sum": target, "square_sum": target.square()}

    def _value(self, sums: dict[str, Tensor]) -> Tensor:
        variance = sums["square_sum"] / sums["count"] - (sums["target_sum"] / sums["count"]).square()
        return 1 - (super()._value(sums) / variance).where(variance > 0, torch.nan)


def _brier(preds: Predictions, target: Tensor) -> Tensor:
    """Returns the score of each prediction as sum p^2 - 2 p_y + 1, which needs no one-hot targets."""
    score = preds.probabilities.square().sum(1) - 2 * preds.log_probability(target).exp() + 1
    return quantize(score.nan_to_num(0.0).clamp_min(0))
