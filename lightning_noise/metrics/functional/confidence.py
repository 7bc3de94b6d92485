r"""What confidences and predictions say about errors and noise.

Histograms are counts in :math:`M` bins, from the least confident to the most. Predictions in one bin are tied.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["aurc", "failure_auroc", "flip_rate", "noise_detected"]


def aurc(correct: Tensor, count: Tensor) -> Tensor:
    r"""Returns the area under the risk-coverage curve (AURC).

    .. math:: \frac{1}{n} \sum_{m=1}^n \frac{1}{m} \sum_{i \leq m} (1 - a_i), \quad c_1 \geq c_2 \geq \ldots

    The area is the error rate among the most confident predictions, averaged over coverages. Tied predictions count as their
    mean over all orders. For an error rate :math:`e`, an uninformative confidence gives :math:`e`. A confidence that ranks
    every error last gives :math:`e + (1 - e) \ln(1 - e)`.

    Args:
        correct: The number of correct predictions in each bin, of shape :math:`(M,)`.
        count: The number of predictions in each bin.

    References:
        Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers (Geifman et al., 2019), https://arxiv.org/abs/1805.08206

    Example:
        >>> aurc(torch.tensor([0, 1]), torch.tensor([1, 1]))  # the more confident prediction is correct: (0 + 1/2) / 2
        tensor(0.2500, dtype=torch.float64)
    """
    count, wrong = count.double().flip(0), (count - correct).double().flip(0)
    before, wrong_before = count.cumsum(0) - count, wrong.cumsum(0) - wrong
    # sums of 1 / m over the ranks of a bin, and of the mean of (wrong_before + j wrong / count) / m over its j = m - before
    harmonic = torch.digamma(before + count + 1) - torch.digamma(before + 1)
    risks = wrong_before * harmonic + wrong / count * (count - before * harmonic)
    return risks.where(count > 0, 0).sum() / count.sum()


def failure_auroc(correct: Tensor, count: Tensor) -> Tensor:
    r"""Returns the probability that a wrong prediction is less confident than a correct one.

    .. math:: P(c_i < c_j) + \tfrac{1}{2} P(c_i = c_j), \quad a_i = 0, a_j = 1

    The result is NaN if all predictions are correct, or all wrong.

    Args:
        correct: The number of correct predictions in each bin, of shape :math:`(M,)`.
        count: The number of predictions in each bin.

    References:
        A Baseline for Detecting Misclassified and Out-of-Distribution Examples (Hendrycks and Gimpel, 2017),
        https://arxiv.org/abs/1610.02136

    Example:
        >>> failure_auroc(torch.tensor([0, 1]), torch.tensor([1, 1]))  # the more confident prediction is correct
        tensor(1., dtype=torch.float64)
    """
    correct, wrong = correct.double(), (count - correct).double()
    more_confident = correct.sum() - correct.cumsum(0)
    return (wrong * (more_confident + correct / 2)).sum() / (wrong.sum() * correct.sum())


def noise_detected(noisy: Tensor, clean: Tensor) -> Tensor:
    r"""Returns the share of noisy predictions that are less confident than 95 % of clean ones.

    .. math:: P(c_\text{noisy} < t), \quad t = \max \{ t : P(c_\text{clean} < t) \leq 0.05 \}

    The threshold is the lower edge of a bin, and predictions in that bin count as not detected. So at most 5 % of the clean
    predictions are taken for noisy. If many predictions are tied, fewer clean and fewer noisy predictions are.

    Args:
        noisy: The number of noisy predictions in each bin, of shape :math:`(M,)`.
        clean: The number of clean predictions in each bin.

    Example:
        >>> noise_detected(torch.tensor([3, 0, 1]), torch.tensor([1, 0, 19]))  # one clean prediction in 20 may lie below
        tensor(0.7500, dtype=torch.float64)
    """
    noisy, clean = noisy.double(), clean.double()
    below = clean.cumsum(0) - clean
    reached = 20 * below <= clean.sum()  # the bins up to the threshold
    return noisy[:-1].where(reached[1:], 0).sum() / noisy.sum()


def flip_rate(preds: Tensor, noisy_preds: Tensor) -> Tensor:
    r"""Returns the share of predictions that change under noise; no labels are needed.

    Args:
        preds: Logits without noise, of shape :math:`(B, K, *)`.
        noisy_preds: The logits of the same samples under noise.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261. Their flip
        rate of noise compares with the first frame, as this rate does with the clean sample.

    Example:
        >>> flip_rate(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        tensor(0.5000)
    """
    return (preds.argmax(1) != noisy_preds.argmax(1)).float().mean()
