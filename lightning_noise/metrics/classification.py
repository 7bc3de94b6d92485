"""Metrics of a classifier as torchmetrics classes with sum states: memory does not grow with the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_noise.metrics.functional import bin_indices, expected_calibration_error

__all__ = ["CrossEntropy", "ExpectedCalibrationError"]

# confidences are summed as whole multiples of 2^-24, the resolution of float32 below 1: exact, in any order and on any device
_RESOLUTION = 2**24


class CrossEntropy(Metric):
    r"""The mean cross-entropy, :math:`-\log p_y` averaged over all predictions.

    Example:
        >>> metric = CrossEntropy()
        >>> metric.update(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        >>> metric.compute()  # log 4
        tensor(1.3863)
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False

    loss_sum: Tensor
    count: Tensor

    def __init__(self):
        super().__init__()
        self.add_state("loss_sum", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`."""
        self.loss_sum += F.cross_entropy(preds, target, reduction="sum")
        self.count += target.numel()

    def compute(self) -> Tensor:
        return self.loss_sum / self.count


class ExpectedCalibrationError(Metric):
    r"""The expected calibration error with bins of equal width, without keeping the predictions.

    It is the same for any split into batches, any order and any number of processes; see
    :func:`~lightning_noise.metrics.functional.expected_calibration_error`.

    Args:
        n_bins: The number of bins, :math:`M`.

    Example:
        >>> metric = ExpectedCalibrationError()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()  # (|1 - 0.9| + |0 - 0.8|) / 2
        tensor(0.4500)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    confidence_sum: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self, n_bins: int = 15):
        super().__init__()
        if n_bins < 1:
            raise ValueError(f"n_bins must be at least 1, got {n_bins}")
        self.n_bins = n_bins
        for state in ("confidence_sum", "correct", "count"):
            self.add_state(state, torch.zeros(n_bins, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`."""
        confidence, label = (values.flatten() for values in preds.softmax(1).max(1))
        bins = bin_indices(confidence, self.n_bins)
        self.confidence_sum.index_add_(0, bins, (confidence * _RESOLUTION).round().long())
        self.correct.index_add_(0, bins, (label == target.flatten()).long())
        self.count.index_add_(0, bins, torch.ones_like(bins))

    def compute(self) -> Tensor:
        return expected_calibration_error(self.confidence_sum / _RESOLUTION, self.correct, self.count)
