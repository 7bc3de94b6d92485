r"""Tasks: what the outputs of a module mean, and which metrics compare them with the target.

A task is a value. It reads outputs and targets, refuses values that contradict it, knows the metric of a guess, and makes the
metrics. Monitors, adaptive levels and the range test all ask the task and never its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_noise.batch import describe
from lightning_noise.metrics.base import Predictions, Sums
from lightning_noise.metrics.calibration import CalibrationBins
from lightning_noise.metrics.confidence import FlipRate, NoiseDetection, PredictiveEntropy, SelectiveClassification
from lightning_noise.metrics.scores import BrierScore, CrossEntropy, MeanAbsoluteError, MeanSquaredError, R2Score

__all__ = [
    "Binary",
    "Custom",
    "CustomMetrics",
    "GroupedMetrics",
    "Multiclass",
    "Multilabel",
    "Regression",
    "Task",
    "TaskMetrics",
]


class Task(ABC):
    """What the outputs of a module mean. A subclass is a frozen dataclass.

    Attributes:
        main: The metric that robustness curves rest on.
        logged: The metrics that a monitor logs by default, the most important first.
        compared: The metrics whose clean and noisy values are subtracted.
        proportions: The metrics that are shares of the samples, which have Wilson's intervals.
        expects: The shapes that the task reads, for messages.
        has_classes: Whether predictions are logits of shape :math:`(B, K, *)` after :meth:`read`.
        knows_chance: Whether the task knows the governed metric of a guess.
    """

    main: ClassVar[str]
    logged: ClassVar[tuple[str, ...]]
    compared: ClassVar[tuple[str, ...]]
    proportions: ClassVar[tuple[str, ...]] = ()
    expects: ClassVar[str]
    has_classes: ClassVar[bool] = False
    knows_chance: ClassVar[bool] = False

    @property
    def governed(self) -> str:
        """The metric that adaptive levels follow. Default: the main metric."""
        return self.main

    @property
    def name(self) -> str:
        """The name of the task in reports and messages."""
        return type(self).__name__.lower()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all metrics."""
        return tuple(self.metrics(torch.zeros(1, 2)).totals())

    @abstractmethod
    def read(self, output: Any, target: Tensor) -> tuple[Any, Tensor]:
        """Returns predictions and target as the metrics read them, or raises a ValueError if their shapes do not fit.

        Only :meth:`check` looks at the values of the target, because that waits for the device.
        """

    @abstractmethod
    def metrics(self, preds: Any, n_groups: int = 1) -> TaskMetrics:
        """Returns all metrics of the task, with sums for each of ``n_groups``; the predictions tell the number of classes."""

    @abstractmethod
    def governed_metrics(self, n_groups: int = 1) -> TaskMetrics:
        """Returns the governed metric alone, and the confidence if there is one."""

    def check(self, target: Tensor, preds: Any) -> None:  # noqa: B027  # most values suit most tasks
        """Raises a ValueError if the values of the target contradict the task."""

    def chance(self, preds: Any) -> float | None:
        """Returns the governed metric of a guess, or ``None`` if the task does not know it."""
        return None

    def higher_is_better(self, metric: str) -> bool:
        """Returns whether a larger value of a compared metric is better."""
        return metric == self.main

    def score(self, values: Mapping[str, float]) -> float:
        """Returns a number that is larger for a better model, from metrics by their names."""
        return values[self.main] if self.higher_is_better(self.main) else -values[self.main]

    def placeholder(self, output: Any, rows: Tensor) -> Tensor:
        """Returns a tensor of the shape that the target of such an output has, for data without labels."""
        if not isinstance(output, Tensor) or output.ndim < 1 + self.has_classes or len(output) != len(rows):
            raise ValueError(
                f"the module returned {describe(output)} for {len(rows)} samples, but {type(self).__name__}() expects "
                f"{self.expects}; give predict=… or another task"
            )
        return output

    def _refuse(self, output: Any, target: Tensor) -> ValueError:
        return ValueError(
            f"the module returned {describe(output)} for a target of {describe(target)}, but {type(self).__name__}() expects "
            f"{self.expects}; give predict=…, target=… or another task of lightning_noise.tasks"
        )


class GroupedMetrics(MetricCollection):
    """Metrics of a task with sums for groups of samples; ``read`` computes once what all need of the predictions."""

    def __init__(self, metrics: dict[str, Metric], read: Callable[[Any], Any] | None = None):
        # no two metrics have the same states, so comparing the states finds nothing
        super().__init__(metrics, compute_groups=False)  # type: ignore[arg-type]
        self._read = read

    def read(self, preds: Any) -> Any:
        """Returns predictions that several collections can be updated with, so that they are read once."""
        return preds if self._read is None else self._read(preds)

    def update(self, *, preds: Any, clean_preds: Any, **kwargs: Any) -> None:
        """Adds ``preds``, ``target``, ``clean_preds`` and ``groups``."""
        super().update(preds=self.read(preds), clean_preds=self.read(clean_preds), **kwargs)

    def totals(self) -> dict[str, float]:
        """Returns the values of all samples of all ranks; NaN if a prediction was NaN."""
        return _merge([metric.totals() for metric in self._sums()])

    def estimates(self) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Returns the values of all samples of all ranks, and the values without each group."""
        totals, rests = zip(*(metric.estimates() for metric in self._sums()), strict=True)
        return _merge(totals), [_merge(parts) for parts in zip(*rests, strict=True)]

    def calibration_bins(self) -> list[Tensor] | None:
        """Returns the sums in bins of the confidence, or ``None`` if there is no confidence."""
        return next((metric.bins() for metric in self._sums() if isinstance(metric, CalibrationBins)), None)

    def _sums(self) -> list[Sums]:
        return [metric for metric in self.values(copy_state=False) if isinstance(metric, Sums)]


class CustomMetrics:
    """Metrics of the user, which know no groups of samples. The methods are those of :class:`GroupedMetrics`."""

    def __init__(self, collection: MetricCollection):
        self.collection = collection

    def to(self, device: torch.device) -> CustomMetrics:
        self.collection.to(device)
        return self

    def read(self, preds: Any) -> Any:
        return preds

    def update(self, *, preds: Any, target: Tensor, clean_preds: Any, groups: Tensor | None = None) -> None:
        self.collection.update(preds=preds, target=target, clean_preds=clean_preds)

    def totals(self) -> dict[str, float]:
        values = self.collection.compute()
        for name in map(str, self.collection):
            value = values.get(name)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError(
                    f"a metric must be one number to be logged, but {name!r} is {value!r}; choose an average for it"
                )
        return {name: value.item() for name, value in values.items()}

    def estimates(self) -> tuple[dict[str, float], list[dict[str, float]]]:
        return self.totals(), []

    def calibration_bins(self) -> None:
        return None


TaskMetrics = GroupedMetrics | CustomMetrics


class _Classification(Task):
    """A task whose predictions are classes."""

    main: ClassVar[str] = "accuracy"
    logged: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "ece")
    compared: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    proportions: ClassVar[tuple[str, ...]] = ("accuracy", "accuracy_area", "flip_rate", "noise_detected", "score")
    has_classes: ClassVar[bool] = True
    knows_chance: ClassVar[bool] = True

    def metrics(self, preds: Any, n_groups: int = 1) -> GroupedMetrics:
        return GroupedMetrics(
            {
                "loss": CrossEntropy(n_groups),
                "brier": BrierScore(n_groups),
                "calibration": CalibrationBins(n_groups=n_groups),
                "flip_rate": FlipRate(n_groups),
                "entropy": PredictiveEntropy(n_groups),
                "selection": SelectiveClassification(n_groups),
                "detection": NoiseDetection(n_groups),
            },
            read=Predictions.of,
        )

    def governed_metrics(self, n_groups: int = 1) -> GroupedMetrics:
        return GroupedMetrics({"calibration": CalibrationBins(n_groups=n_groups)}, read=Predictions.of)

    def chance(self, preds: Any) -> float:
        return 1 / preds.shape[1]


@dataclass(frozen=True)
class Multiclass(_Classification):
    r"""One class out of :math:`K` for each sample, or for each position of it.

    Outputs are logits of shape :math:`(B, K, *)` and targets class indices of shape :math:`(B, *)`.

    Example:
        >>> task = Multiclass()
        >>> preds, target = task.read(torch.eye(4), torch.tensor([0, 1, 2, 0]))
        >>> metrics = task.metrics(preds, n_groups=2)
        >>> metrics.update(preds=preds, clean_preds=preds, target=target, groups=torch.tensor([0, 0, 0, 1]))
        >>> values, without = metrics.estimates()
        >>> values["accuracy"], [each["accuracy"] for each in without], task.chance(preds)
        (0.75, [0.0, 1.0], 0.25)
    """

    expects: ClassVar[str] = "logits of shape (B, K, *) and class indices of shape (B, *)"

    def read(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        if not _is_floating(output) or output.ndim < 2 or output.shape[1] < 2 or output[:, 0].shape != target.shape:
            raise self._refuse(output, target)
        return _at_least_float32(output), target

    def check(self, target: Tensor, preds: Tensor) -> None:
        n_classes = preds.shape[1]
        if not target.numel():
            return
        whole = not target.is_floating_point() and target.dtype != torch.bool
        if not whole or target.min() < 0 or target.max() >= n_classes:
            raise ValueError(
                f"Multiclass() expects class indices in [0, {n_classes}), got {_describe_range(target)}; for targets of 0 "
                "and 1 give task=tasks.Binary() or tasks.Multilabel(), for numbers tasks.Regression(), and to ignore some "
                "labels tasks.Custom() of metrics that ignore them"
            )

    def placeholder(self, output: Any, rows: Tensor) -> Tensor:
        return super().placeholder(output, rows)[:, 0]


class _YesOrNo(_Classification):
    """Labels of 0 and 1, each of which counts as a prediction of two classes."""

    def read(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        if not _is_floating(output) or output.shape != target.shape:
            raise self._refuse(output, target)
        logits = _at_least_float32(output)
        return torch.stack([torch.zeros_like(logits), logits], 1), target.long()

    def check(self, target: Tensor, preds: Tensor) -> None:
        if not ((target == 0) | (target == 1)).all():
            raise ValueError(
                f"{type(self).__name__}() expects targets of 0 and 1, got {_describe_range(target)}; for class indices give "
                "task=tasks.Multiclass()"
            )


@dataclass(frozen=True)
class Binary(_YesOrNo):
    r"""Yes or no for each sample, or for each position of it.

    Outputs are logits of shape :math:`(B, *)` or :math:`(B, 1, *)`, and targets are 0 or 1, of any dtype and of shape
    :math:`(B, *)`. A logit :math:`z` becomes the logits :math:`(0, z)` of two classes. Their softmax is
    :math:`(1 - \sigma(z), \sigma(z))` and their cross-entropy the binary one; a Brier score is the sum over both classes.

    Example:
        >>> Binary().read(torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 0.0]))
        (tensor([[ 0.,  2.],
                [ 0., -1.]]), tensor([1, 0]))
    """

    expects: ClassVar[str] = "logits of shape (B, *) or (B, 1, *) and targets of 0 and 1 of shape (B, *)"

    def read(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(output, Tensor) and output.ndim == target.ndim + 1 and output.shape[1] == 1:
            output = output.squeeze(1)
        return super().read(output, target)


@dataclass(frozen=True)
class Multilabel(_YesOrNo):
    r"""Yes or no for each of :math:`L` labels of a sample.

    Outputs are logits of shape :math:`(B, L, *)`, and targets are 0 or 1, of any dtype and of the same shape. Each label counts
    as a prediction of its own, as in :class:`Binary`.

    Example:
        >>> preds, target = Multilabel().read(torch.zeros(4, 3), torch.ones(4, 3))
        >>> preds.shape, target.shape
        (torch.Size([4, 2, 3]), torch.Size([4, 3]))
    """

    expects: ClassVar[str] = "logits of shape (B, L, *) and targets of 0 and 1 of that shape"


@dataclass(frozen=True)
class Regression(Task):
    r"""Numbers.

    Outputs and targets are floating-point tensors of one shape :math:`(B, *)`; a target of shape :math:`(B,)` does not fit an
    output of shape :math:`(B, 1)`.

    Example:
        >>> preds, target = Regression().read(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
        >>> metrics = Regression().metrics(preds)
        >>> metrics.update(preds=preds, clean_preds=preds, target=target)
        >>> metrics.totals()["mse"]
        2.0
    """

    main: ClassVar[str] = "mse"
    logged: ClassVar[tuple[str, ...]] = ("mse", "mae")
    compared: ClassVar[tuple[str, ...]] = ("mse", "mae", "r2")
    expects: ClassVar[str] = "floating-point outputs and targets of one shape (B, *), where (B, 1) is not (B,)"

    knows_chance: ClassVar[bool] = True

    @property
    def governed(self) -> str:
        return "r2"

    def read(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        if not _is_floating(output) or output.shape != target.shape or not target.is_floating_point():
            raise self._refuse(output, target)
        return _at_least_float32(output), _at_least_float32(target)

    def metrics(self, preds: Any, n_groups: int = 1) -> GroupedMetrics:
        return GroupedMetrics({"mse": MeanSquaredError(n_groups), "mae": MeanAbsoluteError(n_groups), "r2": R2Score(n_groups)})

    def governed_metrics(self, n_groups: int = 1) -> GroupedMetrics:
        return GroupedMetrics({"r2": R2Score(n_groups)})

    def chance(self, preds: Any) -> float:
        return 0.0  # the R2 of the mean of the target

    def higher_is_better(self, metric: str) -> bool:
        return metric == "r2"

    def score(self, values: Mapping[str, float]) -> float:
        return values["r2"]


@dataclass(frozen=True)
class Custom(Task):
    """Metrics of your own.

    They are given the output of the module as it is, the target, and ``clean_preds=`` if a metric takes it. The output must be
    a tensor with a row for each row of the target. The main metric is ``"accuracy"``, or else the first;
    torchmetrics sorts a dict of metrics by name. Intervals are not known, because a ``MetricCollection`` keeps no groups apart.

    Args:
        collection: A metric of torchmetrics or of this package, or a ``MetricCollection``; each value must be one number.

    Example:
        >>> from torchmetrics.classification import MulticlassF1Score
        >>> Custom(MulticlassF1Score(5)).main
        'MulticlassF1Score'
    """

    collection: Metric | MetricCollection
    expects: ClassVar[str] = "a tensor with a row for each row of the target"

    def __post_init__(self):
        if not isinstance(self.collection, Metric | MetricCollection):
            raise TypeError(f"Custom expects a Metric or MetricCollection of torchmetrics, got {self.collection!r}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(map(str, self._collection()))

    @property
    def main(self) -> str:  # type: ignore[override]
        return "accuracy" if "accuracy" in self.names else self.names[0]

    @property
    def logged(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.main, *(name for name in self.names if name != self.main))

    @property
    def compared(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.logged

    def read(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(output, Tensor) or output.shape[:1] != target.shape[:1]:
            raise self._refuse(output, target)
        return output, target

    def metrics(self, preds: Any, n_groups: int = 1) -> CustomMetrics:
        return CustomMetrics(self._collection())

    def governed_metrics(self, n_groups: int = 1) -> CustomMetrics:
        return CustomMetrics(MetricCollection({self.main: self._collection()[self.main]}))

    def higher_is_better(self, metric: str) -> bool:
        return self._collection()[metric].higher_is_better is not False

    def _collection(self) -> MetricCollection:
        if isinstance(self.collection, MetricCollection):
            return self.collection.clone()
        return MetricCollection(self.collection.clone())


def _is_floating(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _describe_range(target: Tensor) -> str:
    return f"{describe(target)} from {target.min().item()} to {target.max().item()}"


def _merge(parts: Any) -> dict[str, float]:
    return {key: value for part in parts for key, value in part.items()}
