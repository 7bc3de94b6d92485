"""What the confidence of a classifier says about errors and about noise."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_noise.metrics.base import RESOLUTION, Predictions, Sums, quantize
from lightning_noise.metrics.functional.calibration import bin_indices
from lightning_noise.metrics.functional.confidence import aurc, failure_auroc, noise_detected

__all__ = ["FlipRate", "NoiseDetection", "PredictiveEntropy", "SelectiveClassification"]


class SelectiveClassification(Sums[dict[str, Tensor]]):
    r"""How well the confidence ranks correct predictions before wrong ones.

    =================  =====================================================================================
    ``aurc``           the area under the risk-coverage curve, between its best value and the error rate
    ``failure_auroc``  the area under the ROC curve of errors: 1/2 if the confidence says nothing about errors
    =================  =====================================================================================

    The formulas are :func:`~lightning_noise.metrics.functional.aurc` and
    :func:`~lightning_noise.metrics.functional.failure_auroc`. The states are histograms of 4096 bins of equal width in
    :math:`\log (c / (1 - c))`, because most confidences of many models lie above 0.999. Predictions in one bin, within 0.9 %
    in :math:`1 - c`, are tied.

    Args:
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if a prediction was not finite.

    Example:
        >>> import torch
        >>> metric = SelectiveClassification()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()["failure_auroc"]  # the more confident prediction is correct
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
    r"""How well a lower confidence tells noisy samples from clean ones.

    ==================  ==========================================================================================
    ``noise_auroc``     the probability that a noisy sample is less confident than a clean one, with ties counted
                        half: 1/2 if the noise does not show
    ``noise_detected``  the share of noisy samples that are less confident than 95 % of the clean ones
    ==================  ==========================================================================================

    Detection is not a goal by itself. Training that makes a model robust should lower it while the accuracy under noise
    holds. A model whose confidence falls under noise as its accuracy does has a high detection rate. So read both values
    beside the accuracy. :class:`SelectiveClassification` says whether the confidence tells correct from wrong; the bins are
    the same. For ties see :func:`~lightning_noise.metrics.functional.noise_detected`.

    Args:
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if a prediction was not finite.

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
        """Adds logits of shape :math:`(B, K, *)` under noise and without, in groups of shape :math:`(B,)`."""
        noisy, clean = Predictions.of(preds), Predictions.of(clean_preds)
        self._add_binned(groups, noisy.odds_bins, noisy=noisy.ones)
        self._add_binned(groups, clean.odds_bins, clean=clean.ones)
        self._add(groups, undefined=noisy.undefined | clean.undefined)

    def _value(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        noisy, clean = sums["noisy"], sums["clean"]
        return {"noise_auroc": failure_auroc(clean, clean + noisy), "noise_detected": noise_detected(noisy, clean)}


class PredictiveEntropy(Sums[Tensor]):
    r"""The mean entropy of the predicted distributions, in nats; no labels are needed.

    .. math:: \frac{1}{n} \sum_i \sum_k -p_{ik} \log p_{ik}

    The mean is 0 if each prediction is certain, and :math:`\log K` if each is uniform.

    Args:
        num_classes: The number of classes, :math:`K`.
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: If the logits have another number of classes; at ``compute``, if a prediction was not finite.

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

        The target is ignored; a ``MetricCollection`` passes it.
        """
        preds = Predictions.of(preds)
        preds.check_classes(self, self.num_classes)
        # a probability of 0, as all below the bound are, adds nothing; in place, because a third tensor of this size costs more
        entropy = -preds.log_probabilities.clamp_min(-1000.0).mul_(preds.probabilities).sum(1).nan_to_num(0.0)
        self._add(groups, entropy_sum=quantize(entropy), undefined=preds.undefined)
        bins = bin_indices(entropy / math.log(self.num_classes), self.n_bins)
        self._add_binned(groups, bins, count=preds.ones)

    def histogram(self) -> tuple[list[float], list[int]]:
        r"""Returns the edges of 64 bins from 0 to :math:`\log K`, in nats, and the counts in them over all ranks."""
        edges = [math.log(self.num_classes) * edge / self.n_bins for edge in range(self.n_bins + 1)]
        return edges, self._synchronized_states()["count"].sum(0).tolist()

    def _value(self, sums: dict[str, Tensor]) -> Tensor:
        return sums["entropy_sum"] / RESOLUTION / sums["count"].sum()


class FlipRate(Sums[Tensor]):
    """The share of predictions that change under noise.

    The formula is :func:`~lightning_noise.metrics.functional.flip_rate`.

    Args:
        n_groups: The number of groups of samples for :meth:`estimates`.

    Raises:
        ValueError: At ``compute``, if a prediction was not finite.

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
        """Adds logits of shape :math:`(B, K, *)` under noise and without, in groups of shape :math:`(B,)`."""
        noisy, clean = Predictions.of(preds), Predictions.of(clean_preds)
        undefined = noisy.undefined | clean.undefined
        self._add(groups, flips=noisy.label != clean.label, count=noisy.ones, undefined=undefined)

    def _value(self, sums: dict[str, Tensor]) -> Tensor:
        return sums["flips"] / sums["count"]
