"""Metrics of a classifier as torchmetrics classes with sum states: memory does not grow with the data."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise.batch import described
from lightning_noise.metrics.functional import (
    aurc,
    bin_indices,
    calibration_floor,
    calibration_z,
    debiased_calibration_error,
    error_auroc,
    expected_calibration_error,
    murphy_decomposition,
    signed_gap,
)

__all__ = [
    "BrierScore",
    "CalibrationBins",
    "CrossEntropy",
    "ExpectedCalibrationError",
    "FlipRate",
    "PredictiveEntropy",
    "SelectiveClassification",
    "TemperatureScaling",
    "check_classes",
    "checked_logits",
    "classifier_metrics",
]

# what is summed becomes whole multiples of 2^-24, the resolution of float32 below 1: exact, in any order and on any device
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


class _Sums(Metric):
    """A metric of sums that are whole numbers, and so exact in any order; it counts the predictions that are none."""

    is_differentiable = False
    full_state_update = False

    undefined: Tensor

    def __init__(self, **shapes: int | tuple[int, ...]):
        super().__init__()
        for state, shape in {**shapes, "undefined": ()}.items():
            self.add_state(state, torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def _raise_if_undefined(self) -> None:
        # in compute, not in update, where the question would wait for the device in each step
        if self.undefined:
            raise ValueError(
                f"{type(self).__name__} reads finite logits, but {self.undefined.item()} predictions were not a number or "
                "gave their class an infinite loss; look for NaN and infinity in what the module returns"
            )


class _Binned(_Sums):
    """Sums over the predictions in bins of equal width of the confidence."""

    confidence_sum: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self, n_bins: int, *states: str):
        super().__init__(**dict.fromkeys(states, _checked_bins(n_bins)))
        self.n_bins = n_bins
        self.states = states

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`."""
        logits, target = _flat(preds), target.flatten()
        confidence, label = logits.softmax(1).max(1)
        self.undefined += confidence.isnan().sum()
        confidence = confidence.nan_to_num(0.0)
        bins = bin_indices(confidence, self.n_bins)
        sums = {
            "confidence_sum": _whole(confidence),
            "correct": (label == target).long(),
            "count": torch.ones_like(bins),
            "variance_sum": _whole(confidence * (1 - confidence)),
        }
        for state in self.states:
            getattr(self, state).index_add_(0, bins, sums[state])


class ExpectedCalibrationError(_Binned):
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

    higher_is_better = False

    def __init__(self, n_bins: int = 15):
        super().__init__(n_bins, "confidence_sum", "correct", "count")

    def compute(self) -> Tensor:
        error = expected_calibration_error(self.confidence_sum / _RESOLUTION, self.correct, self.count)
        return error.where(self.undefined == 0, torch.nan)


class CalibrationBins(_Binned):
    r"""The calibration of a classifier beside what chance alone would show, from sums in bins of equal width.

    ==========================  ================================================================================
    ``ece``                     the expected calibration error
    ``ece_floor``               what it would be for a perfectly calibrated model of these confidences
    ``ece_z``, ``ece_p``        standard errors above that floor, and the one-sided p value
    ``debiased_squared_error``  the squared error without the scatter of the bins, of either sign
    ``signed_gap``              mean confidence minus accuracy: positive where the model is too sure of itself
    ==========================  ================================================================================

    The error of a model on clean and on noisy data is not comparable, as the floor rises where the accuracy falls; what lies
    above the floor is. The sums of each bin are the states ``correct`` and ``count``, and in units of :math:`2^{-24}`
    ``confidence_sum`` and ``variance_sum``. The values are the same for any split into batches, any order and any number of
    processes.

    Args:
        n_bins: The number of bins, :math:`M`.

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

    def __init__(self, n_bins: int = 15):
        super().__init__(n_bins, "confidence_sum", "correct", "count", "variance_sum")

    def compute(self) -> dict[str, Tensor]:
        self._raise_if_undefined()
        sums = self.confidence_sum / _RESOLUTION, self.correct, self.count
        variance_sum = self.variance_sum / _RESOLUTION
        z = calibration_z(*sums, variance_sum)
        return {
            "ece": expected_calibration_error(*sums),
            "ece_floor": calibration_floor(variance_sum, self.count),
            "ece_z": z,
            "ece_p": torch.special.ndtr(-z),
            "debiased_squared_error": debiased_calibration_error(*sums),
            "signed_gap": signed_gap(*sums),
        }


class SelectiveClassification(_Sums):
    r"""How well the confidence ranks the predictions, right before wrong, from a histogram of 4096 bins.

    ===============  ===================================================================================
    ``aurc``         the area under the risk-coverage curve, between its best value and the error rate
    ``error_auroc``  the area under the ROC curve of errors: 1/2 where the confidence says nothing of them
    ===============  ===================================================================================

    See :func:`~lightning_noise.metrics.functional.aurc` and :func:`~lightning_noise.metrics.functional.error_auroc`. The bins
    are of equal width in the logarithm of :math:`c / (1 - c)`, as many models have most of their confidences above 0.999; those
    in a bin, within 0.9 % in :math:`1 - c`, are tied.

    Raises:
        ValueError: At ``compute``, if a prediction was not a number.

    Example:
        >>> metric = SelectiveClassification()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()["error_auroc"]  # the surer one is right
        tensor(1.)
    """

    n_bins = 4096
    limit = 18.0  # of the log-odds: beyond it, 1 - c is below the resolution of float32

    correct: Tensor
    count: Tensor

    def __init__(self):
        super().__init__(correct=self.n_bins, count=self.n_bins)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`."""
        log_confidence, label = _flat(preds).log_softmax(1).max(1)
        self.undefined += log_confidence.isnan().sum()
        log_odds = (log_confidence - (-log_confidence.expm1()).log()).nan_to_num(0.0).clamp(-self.limit, self.limit)
        bins = bin_indices((log_odds / self.limit + 1) / 2, self.n_bins)
        self.correct.index_add_(0, bins, (label == target.flatten()).long())
        self.count.index_add_(0, bins, torch.ones_like(bins))

    def compute(self) -> dict[str, Tensor]:
        self._raise_if_undefined()
        correct, count = self.correct.cpu(), self.count.cpu()  # not every device has float64
        values = {"aurc": aurc(correct, count), "error_auroc": error_auroc(correct, count)}
        return {key: value.float().to(self.count.device) for key, value in values.items()}


class TemperatureScaling(_Sums):
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
    count: Tensor

    def __init__(self, n_bins: int = 15):
        n_temperatures = len(self.temperatures)
        bins = (n_temperatures, _checked_bins(n_bins))
        super().__init__(loss_sum=n_temperatures, confidence_sum=bins, correct=bins, count=bins)
        self.n_bins = n_bins

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`."""
        logits, target = _flat(preds), target.flatten()
        hit = (logits.argmax(1) == target).long()  # no temperature changes which class is first
        defined = F.cross_entropy(logits, target, reduction="none").isfinite()
        self.undefined += (~defined).sum()
        for i, temperature in enumerate(self.temperatures):  # not at once: that would hold the logits 31 times
            log_probabilities = (logits / temperature).log_softmax(1)
            loss = F.nll_loss(log_probabilities, target, reduction="none")
            confidence = log_probabilities.amax(1).exp().nan_to_num(0.0)
            bins = bin_indices(confidence, self.n_bins)
            self.loss_sum[i] += _whole(loss.where(defined, 0)).sum()
            self.confidence_sum[i].index_add_(0, bins, _whole(confidence))
            self.correct[i].index_add_(0, bins, hit)
            self.count[i].index_add_(0, bins, torch.ones_like(bins))

    def compute(self) -> dict[str, Tensor]:
        self._raise_if_undefined()
        best = self.loss_sum.argmin()
        error = expected_calibration_error(self.confidence_sum[best] / _RESOLUTION, self.correct[best], self.count[best])
        temperature = error.new_tensor(self.temperatures)[best]
        return {"temperature": temperature.where(~error.isnan(), torch.nan), "scaled_ece": error}


class BrierScore(_Sums):
    r"""The Brier score of all classes and its parts, from sums in bins of equal width for each class.

    .. math:: \frac{1}{n} \sum_{i, k} (p_{ik} - [y_i = k])^2 \approx \text{reliability} - \text{resolution} + \text{uncertainty}

    It lies in [0, 2]. The parts leave a remainder, from probabilities that differ within a bin of width :math:`1 / M`.

    ===============  ======================================================================
    ``brier``        the score; lower is better
    ``reliability``  how far probabilities are from frequencies: miscalibration, squared
    ``resolution``   how far the predictions tell the samples apart; higher is better
    ``uncertainty``  the score of predicting the frequency of each class, a fact of the data
    ===============  ======================================================================

    Args:
        num_classes: The number of classes, :math:`K`.
        n_bins: The number of bins, :math:`M`.

    Raises:
        ValueError: If the logits are of another number of classes; at ``compute``, if a prediction was not a number.

    References:
        Verification of Forecasts Expressed in Terms of Probability (Brier, 1950), and the decomposition of
        :func:`~lightning_noise.metrics.functional.murphy_decomposition`.

    Example:
        >>> metric = BrierScore(num_classes=2)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()["brier"]  # (0.1^2 + 0.1^2 + 0.8^2 + 0.8^2) / 2
        tensor(0.6500)
    """

    score_sum: Tensor
    probability_sum: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self, num_classes: int, n_bins: int = 15):
        bins = num_classes * _checked_bins(n_bins)
        super().__init__(score_sum=(), probability_sum=bins, correct=bins, count=bins)
        self.num_classes = num_classes
        self.n_bins = n_bins

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`."""
        logits, target = _flat(preds), target.flatten()
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"BrierScore(num_classes={self.num_classes}) got logits of {logits.shape[1]} classes")
        classes = torch.arange(self.num_classes, device=logits.device)
        probabilities, hot = logits.softmax(1), target[:, None] == classes
        self.undefined += probabilities.isnan().any(1).sum()
        probabilities = probabilities.nan_to_num(0.0)
        self.score_sum += _whole((probabilities - hot.to(probabilities.dtype)).square().sum(1)).sum()
        bins = (bin_indices(probabilities, self.n_bins) + self.n_bins * classes).flatten()
        self.probability_sum.index_add_(0, bins, _whole(probabilities.flatten()))
        self.correct.index_add_(0, bins, hot.flatten().long())
        self.count.index_add_(0, bins, torch.ones_like(bins))

    def compute(self) -> dict[str, Tensor]:
        self._raise_if_undefined()
        sums = self.probability_sum / _RESOLUTION, self.correct, self.count
        parts = murphy_decomposition(*(values.view(self.num_classes, self.n_bins) for values in sums))
        score = self.score_sum / _RESOLUTION / (self.count.sum() / self.num_classes)
        return {"brier": score, **dict(zip(("reliability", "resolution", "uncertainty"), parts, strict=True))}


class PredictiveEntropy(_Sums):
    r"""The mean entropy of the predicted distributions, in nats, which needs no labels.

    .. math:: \frac{1}{n} \sum_i \sum_k -p_{ik} \log p_{ik}

    It is 0 where each prediction is certain and :math:`\log K` where each is uniform.

    Raises:
        ValueError: At ``compute``, if a prediction was not a number.

    Example:
        >>> metric = PredictiveEntropy()
        >>> metric.update(torch.zeros(3, 4))
        >>> metric.compute()  # log 4
        tensor(1.3863)
    """

    entropy_sum: Tensor
    count: Tensor

    def __init__(self):
        super().__init__(entropy_sum=(), count=())

    def update(self, preds: Tensor, target: Tensor | None = None) -> None:
        """Adds logits of shape :math:`(B, K, *)`; the target is not read, and is taken from a ``MetricCollection``."""
        entropy = torch.special.entr(_flat(preds).softmax(1)).sum(1)
        self.undefined += entropy.isnan().sum()
        self.entropy_sum += _whole(entropy.nan_to_num(0.0)).sum()
        self.count += entropy.numel()

    def compute(self) -> Tensor:
        self._raise_if_undefined()
        return self.entropy_sum / _RESOLUTION / self.count


class FlipRate(_Sums):
    """The share of the predictions that change under noise; see :func:`~lightning_noise.metrics.functional.flip_rate`.

    Raises:
        ValueError: At ``compute``, if a prediction was not a number.

    Example:
        >>> metric = FlipRate()
        >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = False

    flips: Tensor
    count: Tensor

    def __init__(self):
        super().__init__(flips=(), count=())

    def update(self, preds: Tensor, noisy_preds: Tensor) -> None:
        """Adds logits of shape :math:`(B, K, *)`, without and under noise."""
        flips = preds.argmax(1) != noisy_preds.argmax(1)
        self.undefined += (preds.isnan() | noisy_preds.isnan()).any(1).sum()
        self.flips += flips.sum()
        self.count += flips.numel()

    def compute(self) -> Tensor:
        self._raise_if_undefined()
        return self.flips / self.count


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


def _checked_bins(n_bins: int) -> int:
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    return n_bins


def _flat(preds: Tensor) -> Tensor:
    """Returns logits of shape (B, K, *) as (N, K) in at least float32: in half precision the sums would overflow."""
    logits = preds.to(torch.promote_types(preds.dtype, torch.float32))
    return logits.movedim(1, -1).flatten(0, -2)


def _whole(values: Tensor) -> Tensor:
    """Returns the values as whole multiples of the resolution."""
    return (values * _RESOLUTION).round().long()
