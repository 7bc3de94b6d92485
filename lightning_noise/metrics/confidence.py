"""What the confidence of a classifier says about errors and about noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_noise.metrics.base import RESOLUTION, Predictions, Sums, quantize

__all__ = [
    "FlipRate",
    "NoiseDetection",
    "PredictiveEntropy",
    "SelectiveClassification",
    "aurc",
    "failure_auroc",
    "noise_detected",
]


class _Histograms(Sums):
    """Histograms of the log-odds of the confidence."""

    def __init__(self, states: tuple[str, str], n_groups: int):
        super().__init__(n_groups, **dict.fromkeys(states, (Predictions.n_odds,)))
        self.histograms = states

    def _sums(self) -> dict[str, Tensor]:
        return self._without_empty_bins(super()._sums())

    def _states(self) -> dict[str, Tensor]:
        return self._without_empty_bins(super()._states())

    def _without_empty_bins(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the states without the bins that are empty in all groups, which are most of them and change no value."""
        one, other = (states[state] for state in self.histograms)
        occupied = (one + other).view(-1, Predictions.n_odds).any(0)
        return states | {state: states[state][..., occupied] for state in self.histograms}


class SelectiveClassification(_Histograms):
    r"""How well the confidence ranks correct predictions before wrong ones.

    =================  =====================================================================================
    ``aurc``           the area under the risk-coverage curve, between its best value and the error rate
    ``failure_auroc``  the area under the ROC curve of errors: 1/2 if the confidence says nothing about errors
    =================  =====================================================================================

    The formulas are :func:`aurc` and :func:`failure_auroc`. Predictions are ranked by the log-odds of their confidence,
    :math:`z_\text{max} - \log \sum_\text{others} e^{z_k}`, because confidences of many models are rounded to 1. The states are
    histograms of 4096 bins. A bin is 0.02 wide around 0 (2 % of :math:`1 - c`), 0.13 at 90, and 14 % of the log-odds
    far beyond. Predictions in one bin are tied. So ``failure_auroc`` is off by at most half the share of pairs of a correct and
    a wrong prediction that are tied.

    Example:
        >>> metric = SelectiveClassification()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()["failure_auroc"]  # the more confident prediction is correct
        tensor(1.)
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    correct: Tensor

    def __init__(self, n_groups: int = 1):
        super().__init__(("correct", "count"), n_groups)

    def update(self, preds: Tensor | Predictions, target: Tensor, groups: Tensor | None = None) -> None:
        preds = self._read(preds, target)
        self._add_binned(groups, preds.odds_bins, correct=preds.label == target, count=preds.ones)
        self._add(groups, undefined=preds.undefined)

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = sums["correct"], sums["count"]
        return {"aurc": aurc(*counts), "failure_auroc": failure_auroc(*counts)}


class NoiseDetection(_Histograms):
    r"""How well a lower confidence tells noisy samples from clean ones.

    ==================  ==========================================================================================
    ``noise_auroc``     the probability that a noisy sample is less confident than a clean one, with ties counted
                        half: 1/2 if the noise does not show
    ``noise_detected``  the share of noisy samples that are less confident than 95 % of the clean ones
    ==================  ==========================================================================================

    Detection is not a goal by itself. Training that makes a model robust should lower it while the accuracy under noise
    holds. A model whose confidence falls under noise as its accuracy does has a high detection rate. So read both values
    beside the accuracy. The formula of the rate is :func:`noise_detected`; the bins are those of
    :class:`SelectiveClassification`. ``update(preds, clean_preds)`` adds logits under noise and without.

    References:
        A Baseline for Detecting Misclassified and Out-of-Distribution Examples (Hendrycks and Gimpel, 2017),
        https://arxiv.org/abs/1610.02136

    Example:
        >>> metric = NoiseDetection()
        >>> metric.update(torch.tensor([[0.6, 0.4], [0.8, 0.2]]).log(), torch.tensor([[0.9, 0.1], [0.7, 0.3]]).log())
        >>> metric.compute()["noise_auroc"]  # three of four pairs
        tensor(0.7500)
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    noisy: Tensor
    clean: Tensor

    def __init__(self, n_groups: int = 1):
        super().__init__(("noisy", "clean"), n_groups)

    def update(self, preds: Tensor | Predictions, clean_preds: Tensor | Predictions, groups: Tensor | None = None) -> None:
        noisy, clean = self._read(preds), self._read(clean_preds)
        self._add_binned(groups, noisy.odds_bins, noisy=noisy.ones)
        self._add_binned(groups, clean.odds_bins, clean=clean.ones)
        self._add(groups, undefined=noisy.undefined | clean.undefined)

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        noisy, clean = sums["noisy"], sums["clean"]
        return {"noise_auroc": failure_auroc(clean, clean + noisy), "noise_detected": noise_detected(noisy, clean)}


class PredictiveEntropy(Sums):
    r"""The mean entropy of the predicted distributions, in nats; no labels are needed.

    .. math:: \frac{1}{n} \sum_i \sum_k -p_{ik} \log p_{ik}

    The mean is 0 if each prediction is certain, and :math:`\log K` if each is uniform. ``update(preds)`` ignores a target.

    Example:
        >>> metric = PredictiveEntropy()
        >>> metric.update(torch.zeros(3, 4))
        >>> metric.compute()  # log 4
        tensor(1.3863)
    """

    key = "entropy"
    plot_lower_bound = 0.0

    entropy_sum: Tensor

    def __init__(self, n_groups: int = 1):
        super().__init__(n_groups, entropy_sum=(), count=())

    def update(self, preds: Tensor | Predictions, target: Tensor | None = None, groups: Tensor | None = None) -> None:
        preds = self._read(preds)
        # a probability of 0, as all below the bound are, adds nothing; in place, because a third tensor of this size costs more
        entropy = -preds.log_probabilities.clamp_min(-1000.0).mul_(preds.probabilities).sum(1).nan_to_num(0.0)
        self._add(groups, entropy_sum=quantize(entropy), count=preds.ones, undefined=preds.undefined)

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"entropy": sums["entropy_sum"] / RESOLUTION / sums["count"]}


class FlipRate(Sums):
    r"""The share of predictions that change under noise; no labels are needed.

    .. math:: \frac{1}{n} \sum_i [\arg\max_k \tilde z_{ik} \neq \arg\max_k z_{ik}]

    ``update(preds, clean_preds)`` adds logits :math:`\tilde z` under noise and :math:`z` without.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261. Their flip
        rate of noise compares with the first frame, as this rate does with the clean sample.

    Example:
        >>> metric = FlipRate()
        >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    key = "flip_rate"

    flips: Tensor

    def __init__(self, n_groups: int = 1):
        super().__init__(n_groups, flips=(), count=())

    def update(self, preds: Tensor | Predictions, clean_preds: Tensor | Predictions, groups: Tensor | None = None) -> None:
        noisy, clean = self._read(preds), self._read(clean_preds)
        undefined = noisy.undefined | clean.undefined
        self._add(groups, flips=noisy.label != clean.label, count=noisy.ones, undefined=undefined)

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"flip_rate": sums["flips"] / sums["count"]}


def aurc(correct: Tensor, count: Tensor) -> Tensor:
    r"""Returns the area under the risk-coverage curve (AURC).

    .. math:: \frac{1}{n} \sum_{m=1}^n \frac{1}{m} \sum_{i \leq m} (1 - a_i), \quad c_1 \geq c_2 \geq \ldots

    The area is the error rate among the most confident predictions, averaged over coverages. Tied predictions count as their
    mean over all orders. For an error rate :math:`e`, an uninformative confidence gives :math:`e`. A confidence that ranks
    every error last gives :math:`e + (1 - e) \ln(1 - e)`.

    Args:
        correct: The number of correct predictions in each bin, of shape :math:`(*, M)`, from the least confident to the most.
        count: The number of predictions in each bin.

    References:
        Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers (Geifman et al., 2019), https://arxiv.org/abs/1805.08206

    Example:
        >>> aurc(torch.tensor([0, 1]), torch.tensor([1, 1]))  # the more confident prediction is correct: (0 + 1/2) / 2
        tensor(0.2500, dtype=torch.float64)
    """
    count, wrong = count.double().flip(-1), (count - correct).double().flip(-1)
    ranks = pad(count.cumsum(-1), (1, 0))  # the predictions before each bin
    before, wrong_before = ranks[..., :-1], wrong.cumsum(-1) - wrong
    # sums of 1 / m over the ranks of a bin, and of the mean of (wrong_before + j wrong / count) / m over its j = m - before
    harmonic = torch.digamma(ranks + 1).diff()
    risks = wrong_before * harmonic + wrong / count * (count - before * harmonic)
    area = risks.where(count > 0, 0).cumsum(-1)[..., -1:].sum(-1)  # one by one: an empty bin then changes not even the rounding
    return area / count.sum(-1)


def failure_auroc(correct: Tensor, count: Tensor) -> Tensor:
    r"""Returns the probability that a wrong prediction is less confident than a correct one.

    .. math:: P(c_i < c_j) + \tfrac{1}{2} P(c_i = c_j), \quad a_i = 0, a_j = 1

    The result is NaN if all predictions are correct, or all wrong. The arguments are those of :func:`aurc`, and the reference
    is that of :class:`NoiseDetection`.
    """
    correct, wrong = correct.double(), (count - correct).double()
    more_confident = correct.sum(-1, keepdim=True) - correct.cumsum(-1)
    return (wrong * (more_confident + correct / 2)).sum(-1) / (wrong.sum(-1) * correct.sum(-1))


def noise_detected(noisy: Tensor, clean: Tensor) -> Tensor:
    r"""Returns the share of noisy predictions that are less confident than 95 % of clean ones.

    .. math:: P(c_\text{noisy} < t), \quad t = \max \{ t : P(c_\text{clean} < t) \leq 0.05 \}

    The arguments are the numbers of predictions in each bin, as for :func:`aurc`. The threshold is the lower edge of a bin, so
    at most 5 % of the clean predictions are taken for noisy. If many predictions are tied, fewer clean and noisy ones are.

    Example:
        >>> noise_detected(torch.tensor([3, 0, 1]), torch.tensor([1, 0, 19]))  # one clean prediction in 20 may lie below
        tensor(0.7500, dtype=torch.float64)
    """
    noisy, clean = noisy.double(), clean.double()
    below = clean.cumsum(-1) - clean
    reached = 20 * below <= clean.sum(-1, keepdim=True)  # the bins up to the threshold
    return noisy[..., :-1].where(reached[..., 1:], 0).sum(-1) / noisy.sum(-1)
