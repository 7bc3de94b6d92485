"""Distributions of noisy labels, given the true label and a level.

A label noise states the probability that a label changes at a level, and the class that the label becomes. It has two uses.
The probabilities of the noisy label are a soft label. A draw is a hard label, and its expectation is the soft label.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_noise._checks import plain
from lightning_noise._usage import Value, name_of, with_types
from lightning_noise.batch import describe

__all__ = ["ConfusionFlips", "FlipLabels", "LabelNoise", "SmoothLabels"]


@with_types
class LabelNoise(Value, ABC):
    r"""Base of the label noises: random maps from a class to a class.

    At the level :math:`\lambda` a label of class :math:`y` changes with the probability :math:`r_y(\lambda)`. A label that
    changes becomes another class :math:`k` with the probability :math:`c_{yk}`, which does not depend on the level:

    .. math:: P(\tilde y = k) = (1 - r_y) \, \delta_{yk} + r_y \, c_{yk}, \quad c_{yy} = 0

    A label that changes at some level therefore changes at every higher level, too, and to the same class. A subclass is a
    frozen dataclass.
    """

    n_classes: Any  # int | None
    max_level: ClassVar[float] = 1.0
    usage: ClassVar[str] = "TargetNoise({}, 0.1)"

    def probabilities(self, target: Tensor, level: float, *, ignore_index: int = -100) -> Tensor:
        """Returns the probabilities of the noisy labels.

        Class indices of shape :math:`(N, *)` give probabilities of shape :math:`(N, K, *)`. For two classes, binary labels of
        any shape, floats in [0, 1], give the probability of a yes. At positions with ``ignore_index``, or with a number that is
        no class, each class has the probability 0.
        """
        if target.is_floating_point():
            no, yes = self.probabilities(torch.arange(2, device=target.device), level)[:, 1].to(target.dtype)
            return torch.where(target == ignore_index, target, no + (yes - no) * target)
        y, counts = self._classes(target.long(), ignore_index)
        same = y.unsqueeze(1) == torch.arange(self._k, device=y.device).view(-1, *[1] * (y.ndim - 1))
        rate = self.rate(y, level)
        if isinstance(rate, Tensor):
            rate = rate.unsqueeze(1)
        return torch.where(same, 1 - rate, rate * self.partners(y)).float().masked_fill_(~counts.unsqueeze(1), 0.0)

    def sample(self, target: Tensor, level: float, *, change: Tensor, partner: Tensor, ignore_index: int = -100) -> Tensor:
        """Draws noisy labels, of the shape and dtype of the target.

        Uniform numbers in [0, 1) of that shape decide which labels change, and which class (``partner``) a label becomes.
        Labels with ``ignore_index`` stay, and so do NaN and numbers that are no class. No label becomes ``ignore_index``.
        """
        y = target.nan_to_num(0).round().long() if target.is_floating_point() else target.long()
        y, counts = self._classes(y, ignore_index)
        changes = (change < self.rate(y, level)) & counts
        if target.is_floating_point():
            return torch.where(changes, 1 - target, target)
        other = self.draw_other(y, partner, ignore_index)
        return torch.where(changes, other.to(target.dtype), target)

    def check(self, target: Tensor, *, ignore_index: int = -100) -> None:
        """Raises an error if labels are not classes, or are one-hot rows. The check synchronizes with the device."""
        if self._k > 2 and _is_one_hot(target, self._k):
            raise TypeError(
                f"labels must be class indices, got one-hot rows, {describe(target)}; type labels.argmax(1) in the data set"
            )
        target = target[(target.long() != ignore_index) & (target == target)]
        if target.is_floating_point() and (self._k != 2 or not ((target >= 0) & (target <= 1)).all()):
            raise TypeError(
                f"labels must be class indices, or for n_classes=2 binary labels in [0, 1], got {target.dtype} for "
                f"n_classes={self._k}; convert class indices with .long(), or type ignore_index=… for labels that do not count"
            )
        if target.numel() and not (target.min() >= 0 and target.max() < self._k):
            low, high = target.min().item(), target.max().item()
            are_classes = low >= 0 and high != 255 and hasattr(self, "n_classes")  # 255 is void in segmentation
            more = f"for {high + 1} classes type n_classes={high + 1}; " if are_classes else ""
            raise ValueError(
                f"labels must be in [0, {self._k}), got {low} to {high}; {more}if one label marks positions that do not count, "
                f"type TargetNoise(…, ignore_index={low if low < 0 else high}), or Mixup(…, via='loss')"
            )

    @abstractmethod
    def rate(self, target: Tensor, level: float) -> float | Tensor:
        """Returns the probability :math:`r_y` that a label changes. The target is int64."""

    @abstractmethod
    def partners(self, target: Tensor) -> float | Tensor:
        """Returns the probabilities :math:`c_{yk}` of the other classes, in a shape that broadcasts to :math:`(N, K, *)`."""

    @abstractmethod
    def draw_other(self, target: Tensor, u: Tensor, ignore_index: int = -100) -> Tensor:
        """Draws other classes from :math:`c_{yk}`, by uniform numbers in [0, 1), and never the class ``ignore_index``."""

    def _classes(self, y: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Returns a class for each label, and which labels count. The labels are int64, because an unsigned 156 equals -100."""
        classes = y.clamp(0, self._k - 1)
        counts = classes == y
        return classes, counts & (y != ignore_index) if 0 <= ignore_index < self._k else counts

    @property
    def _k(self) -> int:
        if self.n_classes is None:
            raise ValueError(f"{type(self).__name__} needs n_classes=… here; the labels do not show the number of classes")
        return self.n_classes


class _UniformLabelNoise(LabelNoise):
    """Base of the label noises for which all other classes are equally likely."""

    def __post_init__(self):
        n = self.n_classes
        if n is not None and (not isinstance(n, Integral) or n < 2):
            raise ValueError(
                f"n_classes must be a whole number of at least 2, got {n!r}; if this is the level, type "
                f"TargetNoise({name_of(type(self))}(n_classes=10), {n!r})"
            )

    def partners(self, target: Tensor) -> float:
        return 1 / (self._k - 1)

    def draw_other(self, target: Tensor, u: Tensor, ignore_index: int = -100) -> Tensor:
        if not 0 <= ignore_index < self._k:
            return _draw_other(target, u, self._k)
        drawn = _draw_other(target - (target > ignore_index).long(), u, self._k - 1)  # among the classes that count
        return drawn.add_(drawn >= ignore_index)


@dataclass(frozen=True)
class SmoothLabels(_UniformLabelNoise):
    r"""Mixes each label with the uniform distribution over all classes.

    .. math:: P(\tilde y = k) = (1 - \epsilon) \, \delta_{yk} + \epsilon / K

    The level is :math:`\epsilon \in [0, 1]`, as in ``torch.nn.functional.cross_entropy(label_smoothing=...)``; 0.1 is usual on
    ImageNet. A draw is the label itself with probability :math:`1 - \epsilon`, and otherwise any class, the label included.

    Smoothing lowers the confidence, whether or not the model is over-confident. A well calibrated model gets an expected
    calibration error of :math:`\epsilon \, E[\max_k p_k - 1 / K]`, on noisy data, too. A level that decays to 0 reduces this
    error and keeps most of the gain in accuracy.

    Args:
        n_classes: The number of classes :math:`K`. Default: the number of logits at the loss.

    References:
        Rethinking the Inception Architecture for Computer Vision (Szegedy et al., 2016), https://arxiv.org/abs/1512.00567

        When Does Label Smoothing Help? (Müller et al., 2019), https://arxiv.org/abs/1906.02629

        DisturbLabel: Regularizing CNN on the Loss Layer (Xie et al., 2016), https://arxiv.org/abs/1605.00055

    Example:
        >>> SmoothLabels(n_classes=4).probabilities(torch.tensor([2]), 0.2)
        tensor([[0.0500, 0.0500, 0.8500, 0.0500]])
    """

    n_classes: int | None = None

    def rate(self, target: Tensor, level: float) -> float:
        return level * (self._k - 1) / self._k


@dataclass(frozen=True)
class FlipLabels(_UniformLabelNoise):
    r"""Flips each label to a uniformly random other class.

    .. math:: P(\tilde y = k) = (1 - r) \, \delta_{yk} + \frac{r}{K - 1} (1 - \delta_{yk})

    The level is the exact probability :math:`r \in [0, 1]` that a label changes: no label is flipped onto itself. The
    expectation is that of :class:`SmoothLabels` at :math:`\epsilon = r K / (K - 1)`. If the predictions are independent of the
    flips and their accuracy is :math:`a`, the accuracy against the flipped labels is :math:`a (1 - r) + (1 - a) r / (K - 1)`.

    References:
        Learning with Noisy Labels (Natarajan et al., 2013),
        https://papers.nips.cc/paper/2013/hash/3871bd64012152bfb53fdf04b401193f-Abstract.html

    Example:
        >>> FlipLabels(n_classes=3).probabilities(torch.tensor([0, 2]), 0.5)
        tensor([[0.5000, 0.2500, 0.2500],
                [0.2500, 0.2500, 0.5000]])
    """

    n_classes: int

    def rate(self, target: Tensor, level: float) -> float:
        return level


@dataclass(frozen=True)
class ConfusionFlips(LabelNoise):
    r"""Flips labels with the probabilities of a confusion matrix.

    .. math:: P(\tilde y = k) = (1 - \lambda) \, \delta_{yk} + \lambda \, T_{yk}

    Classes that look alike are then mistaken for each other. The level is the share :math:`\lambda \in [0, 1]` of the matrix:
    at 1 the labels have the error rates of the matrix.

    Args:
        matrix: The rows of :math:`T`. Row :math:`y` holds the probabilities of the classes that a label of class :math:`y`
            becomes, and sums to 1.

    References:
        Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach (Patrini et al., 2017),
        https://arxiv.org/abs/1609.03683

    Example:
        >>> cats_for_dogs = ConfusionFlips([[0.8, 0.2, 0.0], [0.4, 0.6, 0.0], [0.0, 0.0, 1.0]])
        >>> cats_for_dogs.probabilities(torch.tensor([1]), 0.5)
        tensor([[0.2000, 0.8000, 0.0000]])
    """

    matrix: Sequence[Sequence[float]]

    def __post_init__(self):
        # a copy that is hashable, and that the caller cannot change
        object.__setattr__(self, "matrix", tuple(tuple(map(float, row)) for row in plain(self.matrix)))
        n = len(self.matrix)
        if n < 2 or any(len(row) != n or not (min(row) >= 0 and abs(sum(row) - 1) <= 1e-6) for row in self.matrix):
            raise ValueError(f"matrix must be square with rows of probabilities that sum to 1, got {self.matrix}")

    @property
    def n_classes(self) -> int:
        return len(self.matrix)

    def rate(self, target: Tensor, level: float) -> Tensor:
        return (level * (1 - self._own.to(target.device, non_blocking=True)))[target]

    def partners(self, target: Tensor) -> Tensor:
        return self._others.to(target.device, non_blocking=True)[target].movedim(-1, 1)

    def check(self, target: Tensor, *, ignore_index: int = -100) -> None:
        super().check(target, ignore_index=ignore_index)
        if 0 <= ignore_index < self.n_classes and self._others[:, ignore_index].any():
            raise ValueError(
                f"the matrix flips labels into ignore_index={ignore_index}, so that their positions would no longer count; set "
                f"column {ignore_index} of the other rows to zeros"
            )

    def draw_other(self, target: Tensor, u: Tensor, ignore_index: int = -100) -> Tensor:
        n = self.n_classes
        steps = self._steps.to(target.device, non_blocking=True)
        found = torch.searchsorted(steps, target + u.double(), right=True) - n * target
        return found.clamp_(0, n - 1)

    @cached_property
    def _own(self) -> Tensor:
        return torch.tensor([row[i] for i, row in enumerate(self.matrix)])

    @cached_property
    def _others(self) -> Tensor:
        off_diagonal = torch.tensor(self.matrix, dtype=torch.float64).fill_diagonal_(0)
        return (off_diagonal / off_diagonal.sum(1, keepdim=True).clamp_min(1e-300)).float()

    @cached_property
    def _steps(self) -> Tensor:
        """The cumulative probabilities of row y, plus y, so that one sorted search draws for all labels."""
        ends = self._others.double().cumsum(1)
        return (ends / ends[:, -1:].clamp_min(1e-300) + torch.arange(self.n_classes)[:, None]).flatten()


def _is_one_hot(target: Tensor, k: int) -> bool:
    if target.ndim < 2 or len(target) < 2 or target.shape[1] != k:
        return False
    return bool((target.amax(1) == 1).all() and (target.sum(1) == 1).all() and (target >= 0).all())


def _draw_other(target: Tensor, u: Tensor, k: int) -> Tensor:
    drawn = (u * (k - 1)).long().clamp_max_(k - 2)
    return drawn.add_(drawn >= target)
