"""Metrics of a classifier that look at each class, or at more than the most probable class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_noise._checks import check_counts
from lightning_noise._tensor import column
from lightning_noise.metrics.base import RESOLUTION, Predictions, Sums, bin_indices, quantize

__all__ = ["BalancedAccuracy", "ClassBins", "ClasswiseCalibrationError", "TopKAccuracy"]


class TopKAccuracy(Sums):
    """The share of the targets that are among the :math:`k` most probable classes.

    Args:
        k: The number of classes. If the predictions have fewer, every target is among them.
        n_groups: The number of groups of samples; see :class:`~lightning_noise.metrics.base.Sums`.

    Example:
        >>> metric = TopKAccuracy(k=2)
        >>> metric.update(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([1, 2]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, k: int = 5, n_groups: int = 1):
        check_counts(k=k)
        # a name of its own, because a MetricCollection merges metrics whose states are equal in the first batch
        self._correct = f"correct_{k}"
        super().__init__(n_groups, **{self._correct: (), "count": ()})
        self.k = k

    @property
    def key(self) -> str:  # type: ignore[override]
        return f"top{self.k}_accuracy"

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        preds = self._read(preds, target)
        # not the number of larger logits, by which a model of equal logits would always be right
        best = preds.logits.topk(min(self.k, preds.logits.shape[1]), 1).indices
        correct = {self._correct: (best == target[:, None]).any(1)}
        self._add(groups, **correct, count=preds.ones, undefined=preds.undefined)

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.key: sums[self._correct] / sums["count"]}


class _OfClasses(Sums):
    """Sums for each of :math:`K` classes."""

    def __init__(self, num_classes: int, n_groups: int = 1, **shapes: tuple[int, ...]):
        check_counts(num_classes=num_classes)
        super().__init__(n_groups, **shapes)
        self.num_classes = num_classes

    def _read(self, preds: Tensor | Predictions, target: Tensor | None = None) -> Predictions:
        preds = super()._read(preds, target)
        if (n_classes := preds.logits.shape[1]) != self.num_classes:
            name = type(self).__name__
            raise ValueError(
                f"{name}(num_classes={self.num_classes}) expects logits of shape (B, {self.num_classes}, *), got "
                f"{n_classes} classes; give num_classes={n_classes}"
            )
        return preds


class BalancedAccuracy(_OfClasses):
    r"""The mean of the accuracies of the classes, in which all classes weigh alike.

    .. math:: \frac{1}{|\mathcal K|} \sum_{k \in \mathcal K} \frac{\sum_i [y_i = k] \, a_i}{\sum_i [y_i = k]}

    :math:`\mathcal K` are the classes with at least one target, and :math:`a_i = 1` if prediction :math:`i` is correct. A
    constant guess has the value :math:`1 / |\mathcal K|`.

    Args:
        num_classes: The number of classes, :math:`K`.
        n_groups: The number of groups of samples; see :class:`~lightning_noise.metrics.base.Sums`.

    References:
        The Balanced Accuracy and Its Posterior Distribution (Brodersen et al., 2010), https://doi.org/10.1109/ICPR.2010.764

    Example:
        >>> metric = BalancedAccuracy(num_classes=2)
        >>> metric.update(torch.tensor([[2.0, 1.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1]))  # always the first class
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    key = "balanced_accuracy"

    correct: Tensor

    def __init__(self, num_classes: int, n_groups: int = 1):
        super().__init__(num_classes, n_groups, correct=(num_classes,), count=(num_classes,))

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        preds = self._read(preds, target)
        self._add_binned(groups, target, correct=preds.label == target, count=preds.ones)
        self._add(groups, undefined=preds.undefined)

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.key: (sums["correct"] / sums["count"]).nanmean(-1)}


class ClassBins(_OfClasses):
    """Sums over the probability of each class, in bins of equal width."""

    probability_sum: Tensor
    correct: Tensor

    def __init__(self, num_classes: int, n_bins: int = 15, n_groups: int = 1, **shapes: tuple[int, ...]):
        check_counts(n_bins=n_bins)
        bins = (num_classes, n_bins)
        super().__init__(num_classes, n_groups, probability_sum=bins, correct=bins, count=bins, **shapes)
        self.n_bins = n_bins

    def update(self, preds: Any, target: Tensor, groups: Tensor | None = None) -> None:
        preds = self._read(preds, target)
        self._add(groups, undefined=preds.undefined)
        classes = column(torch.arange(self.num_classes, device=target.device), target)
        probabilities, correct = preds.probabilities.nan_to_num(0.0), target[:, None] == classes
        bins = bin_indices(probabilities, self.n_bins) + self.n_bins * classes
        sums = {"probability_sum": quantize(probabilities), "correct": correct, "count": torch.ones_like(bins)}
        self._add_binned(groups, bins, **sums)


class ClasswiseCalibrationError(ClassBins):
    r"""The expected calibration error of the probability of each class, averaged over the classes.

    .. math:: \frac{1}{K} \sum_{k, b} \frac{n_{kb}}{n} |\bar p_{kb} - \bar o_{kb}|

    :math:`\bar p_{kb}` is the mean probability of class :math:`k` in bin :math:`b`, and :math:`\bar o_{kb}` the share of the
    samples there that belong to the class. The expected calibration error looks at the most probable class alone. With many
    classes, most probabilities are near 0, so the value falls with :math:`K`.

    Args:
        num_classes: The number of classes, :math:`K`.
        n_bins: The number of bins of equal width.
        n_groups: The number of groups of samples; see :class:`~lightning_noise.metrics.base.Sums`.

    References:
        Beyond temperature scaling (Kull et al., 2019), https://arxiv.org/abs/1910.12656. The static calibration error of
        Measuring Calibration in Deep Learning (Nixon et al., 2019), https://arxiv.org/abs/1904.01685, is the same.

    Example:
        >>> metric = ClasswiseCalibrationError(num_classes=2)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()  # of each class (0.1 + 0.8) / 2
        tensor(0.4500)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    key = "classwise_ece"

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        gap = (sums["correct"] - sums["probability_sum"] / RESOLUTION).abs()
        return {self.key: gap.sum((-2, -1)) / sums["count"].sum((-2, -1))}
