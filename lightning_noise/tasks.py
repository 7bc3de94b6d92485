r"""Tasks: what the outputs of a module mean, and which metrics compare them with the target.

A task is a value. It reads outputs and targets, says which positions of the target count, refuses values that contradict it,
knows chance, the metric of the best constant guess, and makes the metrics. Monitors, adaptive levels and the range test all ask
the task and never its name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_noise._tensor import at_least_float32
from lightning_noise._usage import Guided, nearest, typed, with_types
from lightning_noise.batch import describe, leaves, write_access
from lightning_noise.loop.internals import separate_metrics
from lightning_noise.metrics.base import Predictions, Sums, are_distributions
from lightning_noise.metrics.calibration import AdaptiveCalibrationError, CalibrationBins
from lightning_noise.metrics.classes import BalancedAccuracy, ClasswiseCalibrationError, TopKAccuracy
from lightning_noise.metrics.collections import CustomMetrics, GroupedMetrics, TaskMetrics
from lightning_noise.metrics.confidence import FlipRate, NoiseDetection, PredictiveEntropy, SelectiveClassification
from lightning_noise.metrics.guess import ConstantGuess
from lightning_noise.metrics.scores import (
    BrierScore,
    CrossEntropy,
    MeanAbsoluteError,
    MeanSquaredError,
    Perplexity,
    R2Score,
)

__all__ = [
    "Binary",
    "Custom",
    "Multiclass",
    "Multilabel",
    "Regression",
    "Task",
]


@with_types
class Task(Guided, ABC):
    """What the outputs of a module mean. A subclass is a frozen dataclass.

    Attributes:
        main: The metric that robustness curves rest on.
        logged: The metrics that a monitor logs by default, the most important first.
        compared: The metrics whose clean and noisy values are subtracted.
        proportions: The metrics that are shares, which have Wilson's intervals in [0, 1].
        expects: The shapes that the task reads, for messages.
        has_classes: Whether predictions are logits of shape :math:`(B, K, *)` after :meth:`read`.
        knows_chance: Whether the task knows the governed metric of the best constant guess.
    """

    main: ClassVar[str]
    logged: ClassVar[tuple[str, ...]]
    compared: ClassVar[tuple[str, ...]]
    proportions: ClassVar[tuple[str, ...]] = ()
    expects: ClassVar[str]
    has_classes: ClassVar[bool] = False
    knows_chance: ClassVar[bool] = False

    @classmethod
    def _advise(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        return super()._advise(args if cls is Custom else (), kwargs)  # a number of classes is not needed

    @property
    def governed(self) -> str:
        """The metric that adaptive levels follow, by default the main metric."""
        return self.main

    @property
    def name(self) -> str:
        """The name of the task in reports and messages."""
        return type(self).__name__.lower()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all metrics."""
        return tuple(self.metrics(torch.zeros(1, 2)).totals())

    @property
    def on_request(self) -> tuple[str, ...]:
        """The names of the metrics that the argument ``more`` adds."""
        return ()

    @abstractmethod
    def fits(self, output: Any, target: Tensor) -> bool:
        """Returns whether the task reads an output and a target of these shapes and types."""

    @abstractmethod
    def read(self, output: Any, target: Tensor) -> tuple[Any, Tensor]:
        """Returns predictions and target as the metrics read them, or raises a ValueError if their shapes do not fit.

        Only :meth:`check` and :meth:`check_outputs` look at values, because that waits for the device.
        """

    def settled(self, output: Any, target: Tensor) -> Task:
        """Returns the task that reads later outputs in the same way, even if their shape is ambiguous."""
        return self

    def counts(self, target: Tensor) -> Tensor | None:
        """Returns which positions of a target count, or ``None`` if all do. Monitors drop the others."""
        return None

    @abstractmethod
    def metrics(self, preds: Any, n_groups: int = 1) -> TaskMetrics:
        """Returns all metrics of the task, with sums for each of ``n_groups``; the predictions tell the number of classes."""

    @abstractmethod
    def governed_metrics(self, n_groups: int = 1) -> TaskMetrics:
        """Returns the governed metric alone, and the confidence if there is one."""

    def check(self, target: Tensor, preds: Any) -> None:  # most values suit most tasks
        """Raises a ValueError if the values of the target contradict the task; positions that do not count were dropped."""

    def check_outputs(self, preds: Any, are_squashed: Callable[[], bool]) -> None:
        """Raises a ValueError if the values of the predictions contradict the task.

        Args:
            preds: The predictions as the task reads them, at the positions that count.
            are_squashed: Returns whether the module ends in a sigmoid or softmax. This costs a forward pass, and is only asked
                if the values themselves leave a doubt.
        """

    def guess(self, outputs: Any, n_groups: int = 1) -> ConstantGuess | None:
        """Returns the metric of the best constant guess, or ``None`` if it does not depend on the targets.

        The outputs are those of the first batch as :meth:`read` returns them, which tell the number of classes or labels.
        """
        return None

    def classes(self, target: Tensor) -> Tensor | None:
        """Returns what the metric of :meth:`guess` counts of a target as the task reads it."""
        return None

    def balance_doubt(self, outputs: Any, classes: Tensor) -> str | None:
        """Returns a warning if the classes of a batch leave little room above chance."""
        return None

    def outputs_doubt(self, outputs: Any) -> str | None:
        """Returns a warning if the outputs of a batch, as the task reads them, seem to be those of another task."""
        return None

    def target_doubt(self, target: Tensor) -> str | None:
        """Returns a warning if the targets of a batch that count seem to be those of another task."""
        return None

    def chance(self, values: Mapping[str, Any]) -> Any:
        """Returns the governed metric of the best constant guess, from the values without noise. ``None`` if it is not known.

        A guess is constant if it does not depend on the input: the most frequent class, or the mean of a regression.
        """
        return None

    def higher_is_better(self, metric: str) -> bool:
        """Returns whether a larger value of a compared metric is better."""
        return metric == self.main

    def score(self, values: Mapping[str, float]) -> float:
        """Returns a number that is larger for a better model, from metrics by their names."""
        return values[self.main] if self.higher_is_better(self.main) else -values[self.main]

    def placeholder(self, output: Any, rows: Tensor) -> Tensor:
        """Returns a tensor of the shape that the target of such an output has, for data without labels."""
        if not _is_floating(output) or output.ndim < 1 or len(output) != len(rows):
            raise self._refuse_unlabelled(output, rows)
        return output

    def _refuse_unlabelled(self, output: Any, rows: Tensor) -> ValueError:
        found = [] if isinstance(output, Tensor) else leaves(output)
        fitting = [path for path, leaf in found if _is_floating(leaf) and leaf.shape[:1] == rows.shape[:1]]
        predict = _predict(write_access(output, fitting[0])) if fitting else "predict=…"
        return ValueError(
            f"the module returned {describe(output)} for {len(rows)} samples, but {type(self).__name__}() expects "
            f"{self.expects}; type {predict}, or another task: tasks.Multiclass() for the logits of classes, tasks.Binary() "
            "for one logit of yes or no, or tasks.Regression() for numbers"
        )

    def _refuse(self, output: Any, target: Tensor) -> ValueError:
        return ValueError(
            f"the module returned {describe(output)} for a target of {describe(target)}, but {type(self).__name__}() expects "
            f"{self.expects}; {_advise(self, output, target)}"
        )


def check_task(task: Any) -> None:
    """Raises a TypeError if a value is not a task."""
    if isinstance(task, Task):
        return
    names = [kind.__name__ for kind in _KINDS]
    if isinstance(task, Metric | MetricCollection):
        advice = f"tasks.Custom({type(task).__name__}(…))"
    else:
        asked = task.__name__ if isinstance(task, type) else task
        advice = f"tasks.{nearest(asked, names) or 'Multiclass'}()"
    raise TypeError(f"task must be a task such as tasks.Multiclass(), got {task!r}; type task={advice}")


class _Labels(Task):
    """A task whose targets may be missing: NaN, or the ``ignore_index`` of the task."""

    ignore_index: int | None = None

    def counts(self, target: Tensor) -> Tensor | None:
        missing = target.isnan() if target.is_floating_point() else None
        if self.ignore_index is not None:
            # in uint8, the label 156 would equal -100
            ignored = (target if target.is_floating_point() else target.long()) == self.ignore_index
            missing = ignored if missing is None else missing | ignored
        return ~missing if missing is not None and missing.any() else None


class _Classification(_Labels):
    """A task whose predictions are classes."""

    main: ClassVar[str] = "accuracy"
    logged: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "ece")
    compared: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    proportions: ClassVar[tuple[str, ...]] = (
        "accuracy",
        "accuracy_area",
        "top5_accuracy",
        "balanced_accuracy",
        "flip_rate",
        "noise_detected",
        "score",
    )
    has_classes: ClassVar[bool] = True
    knows_chance: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, str]]  # what outputs are without ``probabilities`` and with them
    loss: ClassVar[type[CrossEntropy]] = CrossEntropy

    probabilities: bool = False

    def metrics(self, preds: Any, n_groups: int = 1) -> GroupedMetrics:
        return GroupedMetrics(
            {
                "loss": self.loss(n_groups),
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

    def guess(self, outputs: Tensor, n_groups: int = 1) -> ConstantGuess:
        return ConstantGuess(outputs.shape[1], n_groups=n_groups)

    def classes(self, target: Tensor) -> Tensor:
        return target

    def chance(self, values: Mapping[str, Any]) -> Any:
        return values.get("chance", math.nan)

    def balance_doubt(self, outputs: Tensor, classes: Tensor) -> str | None:
        guess = self.guess(outputs).to(classes.device)
        guess.update(classes)
        share = guess.count[0].amax(-1).sum().item() / max(1, classes.numel())
        if classes.numel() < _ENOUGH or not _UNBALANCED <= share < 1:  # a batch of a sorted data set has one class
            return None
        name = type(self).__name__
        ignore = (
            f"for positions that do not count, type task=tasks.{name}(ignore_index=…); " if self.ignore_index is None else ""
        )
        metric, chance = self._balanced(outputs)
        governed = f"tasks.Custom({metric})"
        monitored = typed(self, more=["balanced_accuracy"]) if "balanced_accuracy" in self.on_request else governed
        return (
            f"a constant guess is right for {100 * share:.3g} % of the targets of the first batch, so one point of accuracy is "
            f"{1 / (1 - share):.0f} % of the skill above chance; {ignore}for a metric in which all classes weigh alike, type "
            f"RobustnessMonitor(task={monitored}) or AdaptiveLevel(rules.Governor(chance={chance}), task={governed}), with "
            f"{metric.partition('(')[0]} of torchmetrics.classification"
        )

    def _balanced(self, outputs: Tensor) -> tuple[str, str]:
        """Returns a metric of torchmetrics in which all classes weigh alike, and its value for a constant guess."""
        raise NotImplementedError

    def outputs_doubt(self, outputs: Tensor) -> str | None:
        values = self._values(outputs)
        if self.probabilities or values.numel() < _ENOUGH or not _are_in_unit_interval(values):
            return None
        if (values.amax(0) - values.amin(0)).max() < 0.5:  # logits of an untrained module differ little from sample to sample
            return None
        return (
            f"all outputs of the first batch are in [0, 1], but {type(self).__name__}() expects {self.kinds[0]}. If they are "
            f"probabilities: {self._advise_on_probabilities(outputs)}"
        )

    def _values(self, preds: Tensor) -> Tensor:
        """Returns what the module returned, of predictions of shape (B, K, *)."""
        return preds

    def check_outputs(self, preds: Tensor, are_squashed: Callable[[], bool]) -> None:
        name = type(self).__name__
        if self.probabilities and ((preds.exp().sum(1) - 1).abs() > _HALF).any():
            raise ValueError(
                f"{name}(probabilities=True) expects {self.kinds[1]}, got other values; if the module returns logits, "
                f"type task=tasks.{name}()"
            )
        if not self.probabilities and self._are_probabilities(preds, are_squashed):
            raise ValueError(
                f"the module returned probabilities, but {name}() expects {self.kinds[0]}; "
                f"{self._advise_on_probabilities(preds)}"
            )

    def _advise_on_probabilities(self, preds: Tensor) -> str:
        return f"type task=tasks.{type(self).__name__}(probabilities=True), or return logits with predict=…"

    def _are_probabilities(self, preds: Tensor, are_squashed: Callable[[], bool]) -> bool:
        raise NotImplementedError

    def _as_logits(self, values: Tensor) -> Tensor:
        """Returns values of shape (B, K, *) as logits in at least float32. The logarithms of probabilities are logits."""
        values = at_least_float32(values)
        return values.clamp_min(torch.finfo(torch.float32).tiny).log() if self.probabilities else values


@dataclass(frozen=True, kw_only=True)
class Multiclass(_Classification):
    r"""One class out of :math:`K` for each sample, or for each position of it.

    Outputs are logits of shape :math:`(B, K, *)` or :math:`(B, *, K)`, and targets are class indices of shape :math:`(B, *)`.
    Log-probabilities are logits, too. The ``perplexity`` is the exponential of the loss.

    For a language model, position :math:`t` of the logits must predict position :math:`t` of the target. If the model leaves
    the shift to its loss, let ``predict`` return ``torch.nn.functional.pad(logits[:, :-1], (0, 0, 1, 0))`` and let the first
    label be ``ignore_index``.

    Args:
        ignore_index: The label of positions that do not count, such as -100 or 255.
        probabilities: Whether the outputs are probabilities and not logits.
        class_dim: The dimension of the classes, 1 or -1. Default: the one that fits the target of the first batch. If both fit
            that batch, type ``class_dim``.
        more: Further metrics, which are logged, too: ``"top5_accuracy"``, ``"balanced_accuracy"``, ``"adaptive_ece"`` or
            ``"classwise_ece"``. The last takes time and memory for each class.

    Example:
        >>> task = Multiclass()
        >>> preds, target = task.read(torch.eye(4), torch.tensor([0, 1, 2, 0]))
        >>> metrics = task.metrics(preds, n_groups=2)
        >>> metrics.update(preds=preds, clean_preds=preds, target=target, groups=torch.tensor([0, 0, 0, 1]))
        >>> metrics.estimates()["accuracy"].tolist()  # of all samples, and without each group
        [0.75, 0.0, 1.0]
    """

    expects: ClassVar[str] = "logits of shape (B, K, *) or (B, *, K) and class indices of shape (B, *)"
    kinds: ClassVar[tuple[str, str]] = ("logits", "probabilities that sum to 1 over the classes")
    loss: ClassVar[type[CrossEntropy]] = Perplexity

    ignore_index: int | None = None
    probabilities: bool = False
    class_dim: int | None = None
    more: Sequence[str] = ()

    def __post_init__(self):
        object.__setattr__(self, "more", (self.more,) if isinstance(self.more, str) else tuple(dict.fromkeys(self.more)))
        for name in self.more:
            if name not in _MORE:
                likely = nearest(name, _MORE) or next(iter(_MORE))
                raise ValueError(f"more must name metrics among {[*_MORE]}, got {name!r}; type more=[{likely!r}]")
        if self.class_dim == 0:
            raise ValueError("class_dim must not be 0, the dimension of the samples; type class_dim=1 or class_dim=-1")

    @property
    def logged(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*super().logged, *self.more)

    @property
    def on_request(self) -> tuple[str, ...]:
        return tuple(_MORE)

    def balance_doubt(self, outputs: Tensor, classes: Tensor) -> str | None:
        return None if "balanced_accuracy" in self.more else super().balance_doubt(outputs, classes)

    def metrics(self, preds: Any, n_groups: int = 1) -> GroupedMetrics:
        metrics = super().metrics(preds, n_groups)
        metrics.add_metrics({name: _MORE[name](preds.shape[1], n_groups) for name in self.more})
        return metrics

    def read(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        dims = self._fitting_dims(output, target)
        if not dims:
            raise self._refuse(output, target)
        if len(dims) > 1 and output.ndim > 2:
            raise self._ambiguous(output)
        # not every function of torch takes indices of another dtype
        return self._as_logits(output.movedim(dims[0], 1)), target.long()

    def check(self, target: Tensor, preds: Tensor) -> None:
        n_classes = preds.shape[1]
        if not target.numel():
            return
        if target.is_floating_point() or target.dtype == torch.bool or target.min() < 0 or target.max() >= n_classes:
            raise ValueError(
                f"Multiclass() expects class indices in [0, {n_classes}), got {_describe_range(target)}; "
                f"{self._advise_on_labels(target, n_classes)}"
            )

    def placeholder(self, output: Any, rows: Tensor) -> Tensor:
        output = super().placeholder(output, rows)
        if output.ndim > 2 and self.class_dim is None:
            raise self._ambiguous(output)
        dim = 1 if self.class_dim is None else self.class_dim
        if not _has_classes(output, dim):
            raise self._refuse_unlabelled(output, rows)
        return output.select(dim, 0)

    def fits(self, output: Any, target: Tensor) -> bool:
        return bool(self._fitting_dims(output, target))

    def settled(self, output: Any, target: Tensor) -> Task:
        dims = self._fitting_dims(output, target)
        return replace(self, class_dim=dims[0]) if len(dims) == 1 and output.ndim > 2 else self

    def _fitting_dims(self, output: Any, target: Tensor) -> list[int]:
        dims = (1, -1) if self.class_dim is None else (self.class_dim,)
        return [dim for dim in dims if _has_classes(output, dim) and _without(output.shape, dim) == target.shape]

    def _are_probabilities(self, preds: Tensor, are_squashed: Callable[[], bool]) -> bool:
        return are_distributions(preds) or (_are_in_unit_interval(preds) and are_squashed())

    def _advise_on_probabilities(self, preds: Tensor) -> str:
        if ((preds.sum(1) - 1).abs() <= _HALF).all():
            return super()._advise_on_probabilities(preds)
        return (
            "these do not sum to 1 over the classes, as after a sigmoid or a softmax over another axis, so return logits with "
            "predict=…"
        )

    def _balanced(self, outputs: Tensor) -> tuple[str, str]:
        return f"MulticlassAccuracy(num_classes={outputs.shape[1]})", f"1/{outputs.shape[1]}"

    def _advise_on_labels(self, target: Tensor, n_classes: int) -> str:
        outside = target[(target < 0) | (target >= n_classes)].unique().tolist() if target.dtype != torch.bool else []
        if self.ignore_index is None and len(outside) == 1 and outside[0] in _USUAL_IGNORED:
            return f"to ignore these labels, type task=tasks.Multiclass(ignore_index={outside[0]:g})"
        if target.is_floating_point() and not outside and (target == target.round()).all():
            of_two = ", or type task=tasks.Binary() or tasks.Multilabel() for outputs with one logit for each label"
            return f"let the data return target.long(){of_two if target.max() <= 1 else ''}"
        if target.is_floating_point():
            return "for numbers, type task=tasks.Regression()"
        if outside == [n_classes] and target.min() > 0:
            return "if the labels begin at 1, let the data return target - 1"
        return (
            "for targets of 0 and 1 type task=tasks.Binary() or tasks.Multilabel(), and to ignore a label "
            "task=tasks.Multiclass(ignore_index=…)"
        )

    def _ambiguous(self, output: Tensor) -> ValueError:
        return ValueError(
            f"the module returned {describe(output)}, whose classes may be on axis 1 or the last axis; type "
            "task=tasks.Multiclass(class_dim=1) or task=tasks.Multiclass(class_dim=-1)"
        )


class _YesOrNo(_Classification):
    """Labels of 0 and 1, each of which counts as a prediction of two classes."""

    kinds: ClassVar[tuple[str, str]] = ("logits", "probabilities in [0, 1]")

    def _balanced(self, outputs: Tensor) -> tuple[str, str]:
        return "BinaryAUROC(thresholds=200)", "1/2"

    def fits(self, output: Any, target: Tensor) -> bool:
        return _is_floating(output) and output.shape == target.shape

    def read(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        if not self.fits(output, target):
            raise self._refuse(output, target)
        yes = at_least_float32(output)
        no = 1 - yes if self.probabilities else torch.zeros_like(yes)
        return self._as_logits(torch.stack([no, yes], 1)), target.long()

    def check(self, target: Tensor, preds: Tensor) -> None:
        outside = target[(target != 0) & (target != 1)]
        if not outside.numel():
            return
        name, label = type(self).__name__, outside[0].item()
        if label == -1 and (target.abs() == 1).all():
            advice = "if -1 means no, let the data return target.clamp(min=0)"
        elif self.ignore_index is None and (outside == label).all() and label in (-1, *_USUAL_IGNORED):
            advice = f"to ignore the label {label:g}, type task=tasks.{name}(ignore_index={label:g})"
        elif target.is_floating_point():
            advice = "for numbers, type task=tasks.Regression()"
        else:
            advice = "for class indices, type task=tasks.Multiclass()"
        raise ValueError(f"{name}() expects targets of 0 and 1, got {_describe_range(target)}; {advice}")

    def _values(self, preds: Tensor) -> Tensor:
        return preds[:, 1]

    def _are_probabilities(self, preds: Tensor, are_squashed: Callable[[], bool]) -> bool:
        values = self._values(preds)
        if not _are_in_unit_interval(values):
            return False
        # logits that fill the interval and never leave it are no logits; logits of an untrained module may lie anywhere in it
        fill = values.numel() >= _ENOUGH and values.min() < 0.05 and values.max() > 0.95
        return bool(fill) or are_squashed()


@dataclass(frozen=True, kw_only=True)
class Binary(_YesOrNo):
    r"""Yes or no for each sample, or for each position of it.

    Outputs are logits of shape :math:`(B, *)` or :math:`(B, 1, *)`, and targets are 0 or 1, of any dtype and of shape
    :math:`(B, *)`. A logit :math:`z` becomes the logits :math:`(0, z)` of two classes. Their softmax is
    :math:`(1 - \sigma(z), \sigma(z))` and their cross-entropy the binary one; a Brier score is the sum over both classes.

    Args:
        ignore_index: The label of positions that do not count. NaN never counts.
        probabilities: Whether the outputs are probabilities and not logits.

    Example:
        >>> Binary().read(torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 0]))
        (tensor([[ 0.,  2.],
                [ 0., -1.]]), tensor([1, 0]))
    """

    expects: ClassVar[str] = "logits of shape (B, *) or (B, 1, *) and targets of 0 and 1 of shape (B, *)"

    ignore_index: int | None = None
    probabilities: bool = False

    def fits(self, output: Any, target: Tensor) -> bool:
        return super().fits(_squeeze(output, target), target)

    def read(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        return super().read(_squeeze(output, target), target)


@dataclass(frozen=True, kw_only=True)
class Multilabel(_YesOrNo):
    r"""Yes or no for each of :math:`L` labels of a sample.

    Outputs are logits of shape :math:`(B, L, *)`, and targets are 0 or 1, of any dtype and of the same shape. Each label counts
    as a prediction of its own, as in :class:`Binary`. The arguments are those of :class:`Binary`.

    Example:
        >>> preds, target = Multilabel().read(torch.zeros(4, 3), torch.ones(4, 3))
        >>> preds.shape, target.shape
        (torch.Size([4, 2, 3]), torch.Size([4, 3]))
    """

    expects: ClassVar[str] = "logits of shape (B, L, *) and targets of 0 and 1 of that shape"

    ignore_index: int | None = None
    probabilities: bool = False

    def guess(self, outputs: Tensor, n_groups: int = 1) -> ConstantGuess:
        return ConstantGuess(2 * outputs.shape[2:3].numel(), per_label=True, n_groups=n_groups)

    def _balanced(self, outputs: Tensor) -> tuple[str, str]:
        return "MultilabelAUROC(num_labels=…, thresholds=200)", "1/2"

    def classes(self, target: Tensor) -> Tensor:
        labels = torch.arange(target.shape[1:2].numel(), device=target.device)
        return 2 * labels.view(-1, *[1] * (target.ndim - 2)) + target


@dataclass(frozen=True)
class Regression(_Labels):
    r"""Numbers.

    Outputs and targets are floating-point tensors of one shape :math:`(B, *)`, or outputs have the shape :math:`(B, 1)` for
    targets of shape :math:`(B,)`. A NaN in the target does not count.

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
    expects: ClassVar[str] = "floating-point outputs and targets of one shape (B, *)"

    knows_chance: ClassVar[bool] = True

    @property
    def governed(self) -> str:
        return "r2"

    def fits(self, output: Any, target: Tensor) -> bool:
        return _is_floating(output) and _squeeze(output, target).shape == target.shape and target.is_floating_point()

    def read(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        if not self.fits(output, target):
            raise self._refuse(output, target)
        return at_least_float32(_squeeze(output, target)), at_least_float32(target)

    def metrics(self, preds: Any, n_groups: int = 1) -> GroupedMetrics:
        return GroupedMetrics({"mse": MeanSquaredError(n_groups), "mae": MeanAbsoluteError(n_groups), "r2": R2Score(n_groups)})

    def governed_metrics(self, n_groups: int = 1) -> GroupedMetrics:
        return GroupedMetrics({"r2": R2Score(n_groups)})

    def target_doubt(self, target: Tensor) -> str | None:
        are_labels = target.numel() >= _ENOUGH and bool(((target == 0) | (target == 1)).all())
        if not are_labels or target.min() == target.max():
            return None
        return (
            "all targets of the first batch are 0 or 1; for yes or no, with a logit for each target, type task=tasks.Binary() "
            "or tasks.Multilabel()"
        )

    def chance(self, values: Mapping[str, Any]) -> Any:
        return 0.0  # the R2 of the mean of the target

    def higher_is_better(self, metric: str) -> bool:
        return metric == "r2"

    def score(self, values: Mapping[str, float]) -> float:
        return values["r2"]


@dataclass(frozen=True)
class Custom(Task):
    """Metrics of your own.

    The metrics receive the output of the module as it is, the target, and ``clean_preds=`` if a metric takes it. The output
    must be a tensor with a row for each row of the target. The main metric is ``"accuracy"``, or else the first; torchmetrics
    sorts a dict of metrics by name. Intervals are not known, because a ``MetricCollection`` keeps no groups apart.

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

    def fits(self, output: Any, target: Tensor) -> bool:
        return isinstance(output, Tensor) and output.shape[:1] == target.shape[:1]

    def read(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        if not self.fits(output, target):
            raise self._refuse(output, target)
        return output, target

    def metrics(self, preds: Any, n_groups: int = 1) -> CustomMetrics:
        return CustomMetrics(self._collection())

    def governed_metrics(self, n_groups: int = 1) -> CustomMetrics:
        return CustomMetrics(MetricCollection({self.main: self._collection()[self.main]}))

    def higher_is_better(self, metric: str) -> bool:
        return self._collection()[metric].higher_is_better is not False

    def _collection(self) -> MetricCollection:
        """Returns metrics that have seen nothing."""
        given = self.collection if isinstance(self.collection, MetricCollection) else MetricCollection(self.collection)
        collection = given.clone()
        separate_metrics(collection)
        collection.reset()
        return collection


# further metrics of Multiclass, from the number of classes and of groups
_MORE: dict[str, Callable[[int, int], Sums]] = {
    "top5_accuracy": lambda _, n_groups: TopKAccuracy(5, n_groups),
    "balanced_accuracy": BalancedAccuracy,
    "adaptive_ece": lambda _, n_groups: AdaptiveCalibrationError(n_groups=n_groups),
    "classwise_ece": lambda n_classes, n_groups: ClasswiseCalibrationError(n_classes, n_groups=n_groups),
}
MODULE_CALL = "module(batch[0])"  # in messages, in which a caller who knows the batch replaces the call
_HALF = 4 * torch.finfo(torch.bfloat16).eps  # of a sum of probabilities
_USUAL_IGNORED = (-100, 255)  # of torch's losses, and of masks of images
_ENOUGH = 20  # values
_UNBALANCED = 0.9  # of the targets are of one class


def _advise(task: Task, output: Any, target: Tensor) -> str:
    """Returns what to type to make output and target fit."""
    if not isinstance(output, Tensor):
        floating = [(path, leaf) for path, leaf in leaves(output) if _is_floating(leaf)]
        fitting = [path for path, leaf in floating if any(kind().fits(leaf, target) for kind in _KINDS)]
        path = next(iter(fitting or [path for path, _ in floating]), ())
        return f"type {_predict(write_access(output, path) or '…')}, or another task of lightning_noise.tasks"
    if output.shape == target.shape and isinstance(task, Multiclass) and are_distributions(target.float()):
        return "the target is one-hot or soft; let the data return target.argmax(1)"
    changes = {
        "": output,
        ".squeeze(1)": output.squeeze(1) if output.ndim > 1 else output,
        ".squeeze(-1)": output.squeeze(-1),
        ".unsqueeze(1)": output.unsqueeze(1),
        ".unsqueeze(-1)": output.unsqueeze(-1),
    }
    options = [_predict(change) for change, changed in changes.items() if suits(task, changed, target)][:1]
    options += [f"task=tasks.{kind.__name__}()" for kind in _KINDS if suits(kind(), output, target)]
    if target.ndim > 2 and suits(task, output, target.squeeze(1)):
        options.append("target.squeeze(1) in the data")
    options = options or [
        f"task=tasks.{kind.__name__}() with {_predict(change)}"
        for change, changed in changes.items()
        for kind in _KINDS
        if suits(kind(), changed, target)
    ]
    if isinstance(task, Regression) and not target.is_floating_point() and task.fits(output, target.float()):
        options.append("target.float() in the data")
    return f"type {' or '.join(options) or 'predict=…, target=… or another task of lightning_noise.tasks'}"


def _predict(change: str) -> str:
    return f"predict=lambda module, batch: {MODULE_CALL}{change}"


def suits(task: Task, output: Any, target: Tensor) -> bool:
    """Returns whether the shapes and the labels are of the task."""
    if not task.fits(output, target):
        return False
    counts = task.counts(target)
    try:
        task.check(target if counts is None else target[counts], task.read(output, target)[0])
    except ValueError:
        return False
    return True


_KINDS: tuple[type[Task], ...] = (Multiclass, Binary, Multilabel, Regression)


def _squeeze(output: Any, target: Tensor) -> Any:
    has_axis = isinstance(output, Tensor) and output.ndim == target.ndim + 1 and output.shape[1] == 1
    return output.squeeze(1) if has_axis else output


def _has_classes(output: Any, dim: int) -> bool:
    return _is_floating(output) and output.ndim >= 2 and -output.ndim < dim < output.ndim and output.shape[dim] >= 2


def _without(shape: torch.Size, dim: int) -> torch.Size:
    dim %= len(shape)
    return shape[:dim] + shape[dim + 1 :]


def _are_in_unit_interval(values: Tensor) -> bool:
    return values.numel() > 0 and bool((values.amin() >= 0) & (values.amax() <= 1))


def _is_floating(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point()


def _describe_range(target: Tensor) -> str:
    return f"{describe(target)} from {target.min().item()} to {target.max().item()}"
