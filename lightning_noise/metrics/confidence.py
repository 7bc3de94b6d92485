"""What the confidence of a classifier says, and how noise changes it."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_noise.metrics.base import RESOLUTION, Predictions, Sums, whole
from lightning_noise.metrics.functional import aurc, bin_indices, failure_auroc, noise_detected

__all__ = ["FlipRate", "NoiseDetection", "PredictiveEntropy", "SelectiveClassification"]


class SelectiveClassification(Sums[dict[str, Tensor]]):
    r"""How well the confidence ranks the predictions, right before wrong, from a histogram of 4096 bins.

    ===============  ===================================================================================
    ``aurc``         the area under the risk-coverage curve, between its best value and the error rate
    ``failure_auroc``  the area under the ROC curve of errors: 1/2 where the confidence says nothing of them
    ===============  ===================================================================================

    See :func:`~lightning_noise.metrics.functional.aurc` and :func:`~lightning_noise.metrics.functional.failure_auroc`. The bins
    are of equal width in the logarithm of :math:`c / (1 - c)`, as many models have most of their confidences above 0.999; those
    in a bin, within 0.9 % in :math:`1 - c`, are tied.

    Args:
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if a prediction was not a number.

    Example:
        >>> import torch
        >>> metric = SelectiveClassification()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()["failure_auroc"]  # the surer one is right
        tensor(1.)
    """

    correct: Tensor

    def __init__(self, n_groups: int = 1):
        super().__init__(n_groups, correct=Predictions.n_odds, count=Predictions.n_odds)

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        """Adds logits of shape :math:`(B, K, *)` and class indices of shape :math:`(B, *)`, in groups of shape :math:`(B,)`."""
        preds = Predictions.of(preds)
        self._add_binned(groups, preds.odds_bins, correct=preds.label == target, count=preds.ones)
        self._add(groups, undefined=preds.undefined)

    def _value(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = sums["correct"], sums["count"]
        return {"aurc": aurc(*counts), "failure_auroc": failure_auroc(*counts)}


class NoiseDetection(Sums[dict[str, Tensor]]):
    r"""How well noisy samples are told from clean ones by their lower confidence, from histograms of 4096 bins.

    ==================  =================================================================================================
    ``noise_auroc``     the chance that a noisy sample is less confident than a clean one, ties half: 1/2 if noise is unseen
    ``noise_detected``  the share of the noisy ones below the confidence that 95 % of the clean ones reach
    ==================  =================================================================================================

    It says how far noise shows in the confidence and is no goal by itself: training that makes a model robust should lower it
    while the accuracy under noise holds, and a model that is as unsure of everything under noise as its errors ask for has a
    high one. Read it beside the accuracy; whether confidence tells right from wrong is :class:`SelectiveClassification`. The
    bins are those of that class; see :func:`~lightning_noise.metrics.functional.noise_detected` for ties.

    Args:
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if a prediction was not a number.

    References:
        A Baseline for Detecting Misclassified and Out-of-Distribution Examples (Hendrycks and Gimpel, 2017),
        https://arxiv.org/abs/1610.02136

    Example:
        >>> import torch
        >>> metric = NoiseDetection()
        >>> metric.update(torch.tensor([[0.6, 0.4], [0.8, 0.2]]).log(), torch.tensor([[0.9, 0.1], [0.7, 0.3]]).log())
        >>> metric.compute()["noise_auroc"]  # three of four pairs
        tensor(0.7500)
    """

    noisy: Tensor
    clean: Tensor

    def __init__(self, n_groups: int = 1):
        super().__init__(n_groups, noisy=Predictions.n_odds, clean=Predictions.n_odds)

    def update(self, preds: Tensor | Predictions, clean_preds: Tensor | Predictions, groups: Tensor | None = None) -> None:
        """Adds logits of shape :math:`(B, K, *)`, under and without noise, in groups of shape :math:`(B,)`."""
        noisy, clean = Predictions.of(preds), Predictions.of(clean_preds)
        self._add_binned(groups, noisy.odds_bins, noisy=noisy.ones)
        self._add_binned(groups, clean.odds_bins, clean=clean.ones)
        self._add(groups, undefined=noisy.undefined | clean.undefined)

    def _value(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        noisy, clean = sums["noisy"], sums["clean"]
        return {"noise_auroc": failure_auroc(clean, clean + noisy), "noise_detected": noise_detected(noisy, clean)}


class PredictiveEntropy(Sums[Tensor]):
    r"""The mean entropy of the predicted distributions, in nats, which needs no labels.

    .. math:: \frac{1}{n} \sum_i \sum_k -p_{ik} \log p_{ik}

    It is 0 where each prediction is certain and :math:`\log K` where each is uniform.

    Args:
        num_classes: The number of classes, :math:`K`.
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: If the logits are of another number of classes; at ``compute``, if a prediction was not a number.

    Example:
        >>> import torch
        >>> metric = PredictiveEntropy(num_classes=4)
        >>> metric.update(torch.zeros(3, 4))
        >>> metric.compute()  # log 4
        tensor(1.3863)
    """

    key = "entropy"
    n_bins = 64

    entropy_sum: Tensor

    def __init__(self, num_classes: int, n_groups: int = 1):
        super().__init__(n_groups, entropy_sum=(), count=self.n_bins)
        self.num_classes = num_classes

    def update(self, preds: Tensor | Predictions, target: Tensor | None = None, groups: Tensor | None = None) -> None:
        """Adds logits of shape :math:`(B, K, *)`, in groups of shape :math:`(B,)`.

        The target is not read, and is taken from a ``MetricCollection``.
        """
        preds = Predictions.of(preds)
        preds.check_classes(self, self.num_classes)
        # a probability of 0 adds nothing, and below the bound all are; in place, as a third such tensor would cost more
        entropy = -preds.log_probabilities.clamp_min(-1000.0).mul_(preds.probabilities).sum(1).nan_to_num(0.0)
        self._add(groups, entropy_sum=whole(entropy), undefined=preds.undefined)
        bins = bin_indices(entropy / math.log(self.num_classes), self.n_bins)
        self._add_binned(groups, bins, count=preds.ones)

    def histogram(self) -> tuple[list[float], list[int]]:
        r"""Returns the limits of 64 bins from 0 to :math:`\log K`, in nats, and the predictions in each, of all processes."""
        limits = [math.log(self.num_classes) * edge / self.n_bins for edge in range(self.n_bins + 1)]
        return limits, self._synchronised()["count"].sum(0).tolist()

    def _value(self, sums: dict[str, Tensor]) -> Tensor:
        return sums["entropy_sum"] / RESOLUTION / sums["count"].sum()


class FlipRate(Sums[Tensor]):
    """The share of the predictions that change under noise; see :func:`~lightning_noise.metrics.functional.flip_rate`.

    Args:
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if a prediction was not a number.

    Example:
        >>> import torch
        >>> metric = FlipRate()
        >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = False
    key = "flip_rate"

    flips: Tensor

    def __init__(self, n_groups: int = 1):
        super().__init__(n_groups, flips=(), count=())

    def update(self, preds: Tensor | Predictions, clean_preds: Tensor | Predictions, groups: Tensor | None = None) -> None:
        """Adds logits of shape :math:`(B, K, *)`, under and without noise, in groups of shape :math:`(B,)`."""
        noisy, clean = Predictions.of(preds), Predictions.of(clean_preds)
        undefined = noisy.undefined | clean.undefined
        self._add(groups, flips=noisy.label != clean.label, count=noisy.ones, undefined=undefined)

    def _value(self, sums: dict[str, Tensor]) -> Tensor:
        return sums["flips"] / sums["count"]
