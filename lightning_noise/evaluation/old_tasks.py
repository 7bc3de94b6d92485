"""The metrics that a monitor measures for each task, and the predictions and targets that they read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_noise.batch import describe
from lightning_noise.metrics.base import Predictions, Sums
from lightning_noise.metrics.calibration import CalibrationBins
from lightning_noise.metrics.confidence import FlipRate, NoiseDetection, PredictiveEntropy, SelectiveClassification
from lightning_noise.metrics.scores import BrierScore, CrossEntropy, MeanSquaredError

__all__ = ["LOGGED", "MonitorMetrics", "Task", "as_classes", "check_target", "monitor_metrics", "validate_rows"]

Task = Literal["multiclass", "binary", "multilabel", "regression"]

# what is logged in each validation; the rest is for reports
LOGGED = ("accuracy", "loss", "brier", "ece", "ece_floor", "signed_gap", "flip_rate", "entropy", "failure_auroc")

_READS = {
    "multiclass": "logits of shape (B, K, *) and class indices of shape (B, *)",
    "binary": "logits of shape (B, *) or (B, 1, *) and targets of 0 and 1 of shape (B, *)",
    "multilabel": "logits of shape (B, L, *) and targets of 0 and 1 of that shape",
    "regression": "floating predictions and targets of one shape (B, *), where (B, 1) is not (B,)",
}


class MonitorMetrics(MetricCollection):
    """Metrics of one task that share what they read of the logits; a value keeps the name that its metric gives it."""

    def read(self, preds: Any) -> Any:
        """Returns what several collections can be given, to read it once."""
        return Predictions.of(preds) if isinstance(self["loss"], CrossEntropy) else preds

    def update(self, *, preds: Any, clean_preds: Any, **kwargs: Any) -> None:
        """Adds ``preds``, ``target``, ``clean_preds`` and ``groups``."""
        super().update(preds=self.read(preds), clean_preds=self.read(clean_preds), **kwargs)

    def totals(self) -> dict[str, float]:
        """Returns the values of all data that are logged, and some more; see ``Sums.totals``."""
        return _merged([metric.totals() for metric in self._sums() if not isinstance(metric, NoiseDetection)])

    def estimates(self) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Returns the values of all data, and those without each group in turn; see ``Sums.estimates``."""
        totals, rests = zip(*(metric.estimates() for metric in self._sums()), strict=True)
        return _merged(totals), [_merged(parts) for parts in zip(*rests, strict=True)]

    def _sums(self) -> list[Sums]:
        return [metric for metric in self.values(copy_state=False) if isinstance(metric, Sums)]


def monitor_metrics(task: Task, num_classes: int = 2, n_groups: int = 1) -> MonitorMetrics:
    """Returns the metrics of a task, whose sums are kept apart for groups of samples.

    Args:
        task: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or ``"regression"``.
        num_classes: The number of classes of ``"multiclass"``; the binary tasks have two, and a regression has none.
        n_groups: The number of groups.

    Example:
        >>> metrics = monitor_metrics("multiclass", num_classes=4, n_groups=2)
        >>> logits, target, groups = torch.eye(4), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 1])
        >>> metrics.update(preds=logits, clean_preds=logits, target=target, groups=groups)
        >>> values, without = metrics.estimates()
        >>> values["accuracy"], [each["accuracy"] for each in without]
        (0.75, [0.0, 1.0])
    """
    if task == "regression":
        metric = MeanSquaredError(n_groups)
        metric.key = "loss"  # type: ignore[misc]  # the name that monitors and reports read
        return MonitorMetrics({"loss": metric}, compute_groups=False)
    metrics = {
        "loss": CrossEntropy(n_groups),
        "brier": BrierScore(n_groups),
        "calibration": CalibrationBins(n_groups=n_groups),
        "flip_rate": FlipRate(n_groups),
        "entropy": PredictiveEntropy(num_classes if task == "multiclass" else 2, n_groups),
        "selection": SelectiveClassification(n_groups),
        "detection": NoiseDetection(n_groups),
    }
    # no two have the same states, so there is nothing to be found out by comparing them
    return MonitorMetrics(metrics, compute_groups=False)


def as_classes(preds: Any, target: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    r"""Returns predictions and target as the metrics of a task read them.

    A binary logit :math:`z` becomes the logits :math:`(0, z)` of two classes, whose softmax is
    :math:`(1 - \sigma(z), \sigma(z))` and whose cross-entropy is the binary one. Each label of a multi-label prediction is a
    binary one of its own. What the target holds is not looked at, as that would wait for the device: :func:`check_target`
    does, once for each batch.

    Args:
        preds: Logits of shape :math:`(B, K, *)`; of a binary task of shape :math:`(B, *)` or :math:`(B, 1, *)`, of a
            multi-label task of shape :math:`(B, L, *)`; of a regression, predictions of shape :math:`(B, *)`.
        target: Class indices of shape :math:`(B, *)`; of a binary or multi-label task zeros and ones of any type; of a
            regression, values of the shape of the predictions.
        task: The task.

    Returns:
        Logits of shape :math:`(B, K, *)` in at least float32, with class indices of shape :math:`(B, *)`; of a regression, the
        predictions and target in at least float32.

    Raises:
        ValueError: If the two do not fit each other or the task.

    Example:
        >>> as_classes(torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 0.0]), "binary")
        (tensor([[ 0.,  2.],
                [ 0., -1.]]), tensor([1, 0]))
    """
    if isinstance(preds, Tensor) and preds.is_floating_point():
        preds = preds.to(torch.promote_types(preds.dtype, torch.float32))
        if task == "regression" and preds.shape == target.shape and target.is_floating_point():
            return preds, target.to(torch.promote_types(target.dtype, torch.float32))
        if task == "multiclass" and preds.ndim >= 2 and preds.shape[1] >= 2 and _without_classes(preds) == target.shape:
            return preds, target
        if task == "binary" and preds.ndim == target.ndim + 1 and preds.shape[1] == 1:
            preds = preds.squeeze(1)
        if task in ("binary", "multilabel") and preds.shape == target.shape:
            return torch.stack([torch.zeros_like(preds), preds], 1), target.long()
    raise ValueError(
        f"the module returned {describe(preds)} for a target of {describe(target)}, but the task {task!r} "
        f"reads {_READS[task]}; give predict=…, target=… or another task, one of {list(get_args(Task))}"
    )


def check_target(target: Tensor, preds: Tensor, task: Task) -> None:
    """Raises a ValueError where the target is not made of what the task says: class indices, or zeros and ones."""
    if task == "regression" or not target.numel():
        return
    if task != "multiclass":
        if not ((target == 0) | (target == 1)).all():
            raise ValueError(
                f"the task {task!r} reads targets of 0 and 1, got {_range(target)}; for class indices give 'multiclass'"
            )
    elif target.is_floating_point() or target.dtype == torch.bool or target.min() < 0 or target.max() >= preds.shape[1]:
        raise ValueError(
            f"the target must hold class indices in [0, {preds.shape[1]}), got {_range(target)}; for targets of 0 and 1 give "
            "'binary' or 'multilabel', for numbers 'regression', and where some are to be ignored metrics of your own "
            "that do so"
        )


def validate_rows(preds: Any, target: Tensor) -> Tensor:
    """Returns predictions for metrics of one's own, or raises a ValueError where there is not a row for each of the target."""
    if isinstance(preds, Tensor) and preds.shape[:1] == target.shape[:1]:
        return preds
    raise ValueError(
        f"the module returned {describe(preds)} for a target of {describe(target)}, but metrics are given a tensor with a "
        "row for each of the target; give predict=… or target=…"
    )


def _without_classes(preds: Tensor) -> tuple[int, ...]:
    return preds.shape[:1] + preds.shape[2:]


def _range(target: Tensor) -> str:
    return f"{describe(target)} from {target.min().item()} to {target.max().item()}"


def _merged(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    return {key: value for part in parts for key, value in part.items()}
