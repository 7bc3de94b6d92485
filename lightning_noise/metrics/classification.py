"""Metrics of a classifier as torchmetrics classes with sum states: memory does not grow with the data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise.batch import described
from lightning_noise.metrics.functional import bin_indices, expected_calibration_error

__all__ = ["CrossEntropy", "ExpectedCalibrationError", "check_classes", "checked_logits", "classifier_metrics"]

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

    It is the same for any split into batches, any order and any number of processes, and not a number where a prediction was
    none; see :func:`~lightning_noise.metrics.functional.expected_calibration_error`.

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
    undefined: Tensor

    def __init__(self, n_bins: int = 15):
        super().__init__()
        if n_bins < 1:
            raise ValueError(f"n_bins must be at least 1, got {n_bins}")
        self.n_bins = n_bins
        for state in ("confidence_sum", "correct", "count"):
            self.add_state(state, torch.zeros(n_bins, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("undefined", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`."""
        confidence, label = (values.flatten() for values in preds.softmax(1).max(1))
        self.undefined += confidence.isnan().sum()
        confidence = confidence.nan_to_num(0.0)
        bins = bin_indices(confidence, self.n_bins)
        self.confidence_sum.index_add_(0, bins, (confidence * _RESOLUTION).round().long())
        self.correct.index_add_(0, bins, (label == target.flatten()).long())
        self.count.index_add_(0, bins, torch.ones_like(bins))

    def compute(self) -> Tensor:
        error = expected_calibration_error(self.confidence_sum / _RESOLUTION, self.correct, self.count)
        return error.where(self.undefined == 0, torch.nan)


def classifier_metrics(num_classes: int) -> MetricCollection:
    """Returns accuracy, cross-entropy (``loss``) and expected calibration error (``ece``) of logits.

    Example:
        >>> metrics = classifier_metrics(4)
        >>> metrics.update(torch.eye(4), torch.arange(4))
        >>> metrics.compute()["accuracy"]
        tensor(1.)
    """
    metrics = {
        "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
        "loss": CrossEntropy(),
        "ece": ExpectedCalibrationError(),
    }
    return MetricCollection(metrics)


def checked_logits(logits: Any, target: Tensor) -> Tensor:
    """Returns the logits in at least float32, or raises a ValueError where they are no prediction of the target."""
    if not (
        isinstance(logits, Tensor)
        and logits.is_floating_point()
        and logits.ndim >= 2
        and logits.shape[1] >= 2
        and (len(logits), *logits.shape[2:]) == target.shape
    ):
        raise ValueError(
            f"the module returned {described(logits)} for a target of {described(target)}, but RobustnessMonitor reads "
            "logits of shape (B, K, *) and class indices of shape (B, *); give predict=… or targets=…"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_classes(target: Tensor, num_classes: int) -> None:
    """Raises a ValueError where the target is not made of class indices."""
    if target.numel() and (target.is_floating_point() or target.min() < 0 or target.max() >= num_classes):
        raise ValueError(
            f"the target must hold class indices in [0, {num_classes}), got {described(target)} "
            f"from {target.min().item()} to {target.max().item()}"
        )
