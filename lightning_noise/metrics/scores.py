"""Scores of predictions against targets, for classifiers and regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_noise.batch import describe
from lightning_noise.loop.internals import cast_states
from lightning_noise.metrics.base import RESOLUTION, Predictions, Sums, quantize
from lightning_noise.metrics.classes import ClassBins

__all__ = [
    "BrierDecomposition",
    "BrierScore",
    "CrossEntropy",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "Perplexity",
    "PinballLoss",
    "R2Score",
    "murphy_decomposition",
]


class CrossEntropy(Sums):
    r"""The mean cross-entropy of all predictions, in nats.

    .. math:: \frac{1}{n} \sum_i -\log p_{i y_i}

    ``compute`` also refuses a loss above :math:`2^{40}`, as for a target with the probability 0.

    Example:
        >>> metric = CrossEntropy()
        >>> metric.update(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        >>> metric.compute()  # log 4
        tensor(1.3863)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    key = "loss"
    limit = 2.0**40  # the sum of 2^23 such losses fits an int64

    loss_whole: Tensor
    loss_fraction: Tensor

    def __init__(self, n_groups: int = 1):
        super().__init__(n_groups, loss_whole=(), loss_fraction=(), count=())

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        preds = self._read(preds, target)
        loss = -preds.log_probability(target)
        defined = loss <= self.limit
        loss = loss.where(defined, 0.0)
        floor = loss.floor()
        sums = {"loss_whole": floor.long(), "loss_fraction": quantize(loss - floor), "count": preds.ones}
        self._add(groups, **sums, undefined=~defined)

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": (sums["loss_whole"] + sums["loss_fraction"] / RESOLUTION) / sums["count"]}


class Perplexity(CrossEntropy):
    r"""The mean cross-entropy of all predictions, and the perplexity, its exponential.

    .. math:: \exp \left( \frac{1}{n} \sum_i -\log p_{i y_i} \right)

    A model that chooses evenly among :math:`m` tokens has the perplexity :math:`m`. The values are ``loss`` and ``perplexity``.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        >>> round(metric.compute()["perplexity"].item(), 4)
        4.0
    """

    key = ""

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        values = super()._values(sums)
        return {**values, "perplexity": values["loss"].exp()}


class BrierScore(Sums):
    r"""The Brier score of all classes: the mean squared distance of the probabilities from the truth.

    .. math:: \frac{1}{n} \sum_{i, k} (p_{ik} - [y_i = k])^2

    The score lies in [0, 2]; lower is better. :class:`BrierDecomposition` splits it into its parts.

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
    plot_lower_bound = 0.0
    plot_upper_bound = 2.0
    key = "brier"

    score_sum: Tensor

    def __init__(self, n_groups: int = 1):
        super().__init__(n_groups, score_sum=(), count=())

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        preds = self._read(preds, target)
        self._add(groups, score_sum=_brier(preds, target), count=preds.ones, undefined=preds.undefined)

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"brier": sums["score_sum"] / RESOLUTION / sums["count"]}


class BrierDecomposition(ClassBins):
    r"""The Brier score of all classes with its parts: reliability, resolution, uncertainty.

    .. math:: \text{Brier} \approx \underbrace{\sum_{k, b} \frac{n_{kb}}{n} (\bar p_{kb} - \bar o_{kb})^2}_\text{reliability}
        - \underbrace{\sum_{k, b} \frac{n_{kb}}{n} (\bar o_{kb} - \bar o_k)^2}_\text{resolution}
        + \underbrace{\sum_k \bar o_k (1 - \bar o_k)}_\text{uncertainty}

    Here :math:`\bar p_{kb}` is the mean probability of class :math:`k` in bin :math:`b`, :math:`\bar o_{kb}` the share of
    samples there that belong to the class, and :math:`\bar o_k` the share among all samples. The parts leave a remainder,
    because probabilities differ within a bin of width :math:`1 / M`.

    ===============  ======================================================================
    ``brier``        the score, see :class:`BrierScore`; lower is better
    ``reliability``  the squared miscalibration: how far probabilities are from frequencies
    ``resolution``   how far the predictions separate the samples; higher is better
    ``uncertainty``  the score of predicting class frequencies, a property of the data
    ===============  ======================================================================

    Args:
        num_classes: The number of classes, :math:`K`.
        n_bins: The number of bins, :math:`M`.
        n_groups: The number of groups of samples; see :class:`~lightning_noise.metrics.base.Sums`.

    References:
        A New Vector Partition of the Probability Score (Murphy, 1973),
        https://doi.org/10.1175/1520-0450(1973)012%3C0595:ANVPOT%3E2.0.CO;2

    Example:
        >>> metric = BrierDecomposition(num_classes=2)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()["uncertainty"]  # two classes of frequency 1/2
        tensor(0.5000)
    """

    score_sum: Tensor

    def __init__(self, num_classes: int, n_bins: int = 15, n_groups: int = 1):
        super().__init__(num_classes, n_bins, n_groups, score_sum=())

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        preds = self._read(preds, target)
        super().update(preds, target, groups)
        self._add(groups, score_sum=_brier(preds, target))

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = murphy_decomposition(sums["probability_sum"] / RESOLUTION, sums["correct"], sums["count"])
        score = sums["score_sum"] / RESOLUTION / (sums["count"].sum((-2, -1)) / self.num_classes)
        return {"brier": score, **dict(zip(("reliability", "resolution", "uncertainty"), parts, strict=True))}


class _RegressionSums(Sums):
    """A mean error from sums in float64 or, on a device without float64, in float32.

    Each subclass names its states, because a MetricCollection merges metrics whose states are equal in the first batch.
    """

    states: tuple[str, ...]  # the sum of the errors first

    def __init__(self, n_groups: int = 1):
        super().__init__(n_groups, count=())
        for state in self.states:
            self.add_state(state, torch.zeros(n_groups, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, groups: Tensor | None = None) -> None:
        if preds.shape != target.shape:  # they would be broadcast
            raise ValueError(
                f"{type(self).__name__} expects predictions and target of one shape, got {describe(preds)} and "
                f"{describe(target)}; type preds.reshape(target.shape)"
            )
        target = target.to(self._precision)
        terms = self._terms(preds.to(self._precision) - target, target)
        finite = torch.stack([term.isfinite() for term in terms.values()]).all(0)
        self._add(groups, **{state: term.where(finite, 0.0) for state, term in terms.items()})
        self._add(groups, count=torch.ones_like(finite), undefined=~finite)

    def _terms(self, error: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns what each element adds to each state."""
        raise NotImplementedError

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.key: sums[self.states[0]] / sums["count"]}

    @property
    def _precision(self) -> torch.dtype:
        return getattr(self, self.states[0]).dtype

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        if fn(torch.zeros(())).device.type in _WITHOUT_FLOAT64:
            cast_states(self, self.states, torch.float32)
        return super()._apply(fn, *args, **kwargs)


_WITHOUT_FLOAT64 = {"mps"}


class MeanSquaredError(_RegressionSums):
    r"""The mean squared error of a regression, in units of the target squared.

    .. math:: \text{MSE} = \frac{1}{n} \sum_i (\hat y_i - y_i)^2

    Predictions and targets have one shape :math:`(B, *)`. Sums are in float64, or in float32 on a device without float64, so
    another order of the samples changes only the rounding. ``compute`` raises a ValueError if a term was not finite.

    Example:
        >>> metric = MeanSquaredError()
        >>> metric.update(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
        >>> metric.compute()  # (0 + 4) / 2
        tensor(2.)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    key = "mse"
    states = ("squared_error_sum",)

    def _terms(self, error: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"squared_error_sum": error.square()}


class MeanAbsoluteError(_RegressionSums):
    r"""The mean absolute error of a regression, in units of the target.

    .. math:: \text{MAE} = \frac{1}{n} \sum_i |\hat y_i - y_i|

    Shapes and sums are those of :class:`MeanSquaredError`.

    Example:
        >>> metric = MeanAbsoluteError()
        >>> metric.update(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
        >>> metric.compute()  # (0 + 2) / 2
        tensor(1.)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    key = "mae"
    states = ("absolute_error_sum",)

    def _terms(self, error: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"absolute_error_sum": error.abs()}


class PinballLoss(_RegressionSums):
    r"""The mean pinball loss of quantile forecasts, also called the quantile loss, in units of the target.

    .. math:: \frac{1}{n Q} \sum_{i, q} \max(q \, (y_i - \hat y_{iq}), \; (q - 1) (y_i - \hat y_{iq}))

    Predictions have the shape :math:`(B, *, Q)` for targets of shape :math:`(B, *)`. With the quantile 1/2 alone, the loss is
    half the mean absolute error.

    Args:
        quantiles: The quantiles that are predicted, :math:`q`, each between 0 and 1.
        n_groups: The number of groups of samples; see :class:`~lightning_noise.metrics.base.Sums`.

    References:
        Regression Quantiles (Koenker and Bassett, 1978), https://doi.org/10.2307/1913643

    Example:
        >>> metric = PinballLoss([0.1, 0.9])
        >>> metric.update(torch.tensor([[0.0, 4.0]]), torch.tensor([1.0]))
        >>> metric.compute()  # (0.1 * 1 + 0.1 * 3) / 2
        tensor(0.2000)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    key = "pinball"

    def __init__(self, quantiles: Sequence[float], n_groups: int = 1):
        self.quantiles = tuple(quantiles)
        self.states = (f"pinball_sum_{'_'.join(map(str, self.quantiles))}",)
        super().__init__(n_groups)
        if not self.quantiles or not all(0 < quantile < 1 for quantile in self.quantiles):
            raise ValueError(f"quantiles must be between 0 and 1, got {quantiles!r}; type quantiles=[0.1, 0.5, 0.9]")

    def update(self, preds: Tensor, target: Tensor, groups: Tensor | None = None) -> None:
        if preds.shape != (*target.shape, len(self.quantiles)):
            raise ValueError(
                f"PinballLoss({list(self.quantiles)}) expects predictions of shape {(*target.shape, len(self.quantiles))}, got "
                f"{describe(preds)}; if the quantiles are axis 1, type preds.movedim(1, -1)"
            )
        super().update(preds, target[..., None].expand_as(preds), groups)

    def _terms(self, error: Tensor, target: Tensor) -> dict[str, Tensor]:
        quantiles = error.new_tensor(self.quantiles)
        return {self.states[0]: torch.maximum(-quantiles * error, (1 - quantiles) * error)}


class R2Score(_RegressionSums):
    r"""The coefficient of determination of a regression: the share of the target's variance that is explained.

    .. math:: R^2 = 1 - \frac{\text{MSE}}{\text{Var}(y)}, \quad
        \text{Var}(y) = \frac{1}{n} \sum_i y_i^2 - \left( \frac{1}{n} \sum_i y_i \right)^2

    Predicting the mean of the target gives 0, and a worse model is negative. All :math:`n` elements count alike: several
    outputs share one mean, unlike in scikit-learn, which averages a score for each output. Without a group, mean and variance
    are those of the remaining samples. If all targets are equal, the value is NaN.

    Shapes and sums are those of :class:`MeanSquaredError`. The variance is a difference, so its relative error is
    that of the sums times :math:`\overline{y^2} / \text{Var}(y)`. If the standard deviation of the target is less than a
    millionth of its size, or a fiftieth with sums in float32, the value is NaN; subtract the mean from the target.

    Example:
        >>> metric = R2Score()
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
        >>> metric.compute()  # 1 - (1 / 2) / 1
        tensor(0.5000)
    """

    higher_is_better = True
    plot_upper_bound = 1.0
    key = "r2"
    states = ("error_sum", "target_sum", "square_sum")

    target_sum: Tensor
    square_sum: Tensor

    def _terms(self, error: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"error_sum": error.square(), "target_sum": target, "square_sum": target.square()}

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        error, mean, square = (sums[state] / sums["count"] for state in self.states)
        variance = square - mean.square()
        # the difference of equal targets is not 0 but what rounding leaves
        is_known = variance > 2**12 * torch.finfo(self._precision).eps * square
        return {"r2": 1 - (error / variance).where(is_known, torch.nan)}


def murphy_decomposition(probability_sum: Tensor, correct: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns reliability, resolution and uncertainty; see :class:`BrierDecomposition`.

    Args:
        probability_sum: The sum of the probabilities in each bin of each class, of shape :math:`(*, K, M)`.
        correct: The number of samples in each bin that belong to the class.
        count: The number of probabilities in each bin.
    """
    weight = count / count.sum(-1, keepdim=True)
    rate, base = correct / count, correct.sum(-1, keepdim=True) / count.sum(-1, keepdim=True)
    # the means of an empty bin are NaN
    reliability = (weight * (probability_sum / count - rate) ** 2).where(count > 0, 0).sum((-2, -1))
    resolution = (weight * (rate - base) ** 2).where(count > 0, 0).sum((-2, -1))
    return reliability, resolution, (base * (1 - base)).sum((-2, -1))


def _brier(preds: Predictions, target: Tensor) -> Tensor:
    """Returns the score of each prediction, from differences, because sum p^2 - 2 p_y + 1 would round to 0 or below."""
    minus_one = preds.probabilities.new_full((), -1.0).expand(target[:, None].shape)
    error = preds.probabilities.scatter_add(1, target[:, None], minus_one)
    return quantize(error.square_().sum(1).nan_to_num(0.0))
