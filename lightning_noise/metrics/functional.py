"""The formulas of the metrics, on tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from torch import Tensor

__all__ = ["bin_indices", "expected_calibration_error", "retention", "robustness_summary"]


def bin_indices(confidence: Tensor, n_bins: int) -> Tensor:
    r"""Returns the bin of each confidence among bins of equal width, the last one closed.

    Bin :math:`b` is :math:`[b / M, (b + 1) / M)`; a confidence of exactly 1 falls in the last bin and not in one of its own.

    Example:
        >>> import torch
        >>> bin_indices(torch.tensor([0.0, 0.1, 0.95, 1.0]), n_bins=10)
        tensor([0, 1, 9, 9])
    """
    return (confidence * n_bins).long().clamp_(0, n_bins - 1)


def expected_calibration_error(confidence_sum: Tensor, correct: Tensor, count: Tensor) -> Tensor:
    r"""Returns the expected calibration error of binned predictions.

    .. math:: \text{ECE} = \sum_b \frac{n_b}{n} \left| \text{acc}_b - \text{conf}_b \right|
        = \frac{1}{n} \sum_b \left| \sum_{i \in b} a_i - \sum_{i \in b} c_i \right|

    A perfectly calibrated model does not reach 0: with few samples or low accuracy the bins scatter, so values at different
    accuracies are not comparable.

    Args:
        confidence_sum: The sum of the confidences in each bin, of shape :math:`(M,)`.
        correct: The number of right predictions in each bin.
        count: The number of predictions in each bin.

    References:
        Obtaining Well Calibrated Probabilities Using Bayesian Binning (Pakdaman Naeini et al., 2015),
        https://ojs.aaai.org/index.php/AAAI/article/view/9602

    Example:
        >>> import torch
        >>> expected_calibration_error(torch.tensor([0.8]), torch.tensor([1]), torch.tensor([1]))
        tensor(0.2000)
    """
    return (correct - confidence_sum).abs().sum() / count.sum()


def retention(noisy: float, clean: float, chance: float) -> float:
    r"""Returns the share of the skill above chance that is left under noise.

    .. math:: \frac{A_\text{noisy} - A_\text{chance}}{A_\text{clean} - A_\text{chance}}

    It is comparable between tasks with different numbers of classes, and not a number where the clean model has no skill.

    Example:
        >>> retention(noisy=0.5, clean=0.75, chance=0.25)
        0.5
    """
    return (noisy - chance) / (clean - chance) if clean > chance else math.nan


def robustness_summary(
    clean: Mapping[str, float], noisy: Mapping[tuple[str, float], Mapping[str, float]], chance: float
) -> dict[str, float]:
    """Returns the drops, the retention, the means and the score of a classifier.

    Args:
        clean: Metrics without noise by name, ``"accuracy"`` among them.
        noisy: The same metrics for each tag and level of a noise.
        chance: The accuracy of a guess.

    Returns:
        ``<tag>/<metric>_drop``, clean minus noisy, and ``<tag>/accuracy_retention``, each averaged over the levels;
        ``<metric>_mean`` over tags and levels; and ``score``, half the clean and half the mean noisy accuracy.

    Example:
        >>> noisy = {("gaussian", 0.1): {"accuracy": 0.75}, ("gaussian", 0.2): {"accuracy": 0.5}}
        >>> robustness_summary({"accuracy": 1.0}, noisy, chance=0.5)["score"]
        0.8125
    """
    summary = {}
    for tag in dict.fromkeys(tag for tag, _ in noisy):
        levels = [metrics for (owner, _), metrics in noisy.items() if owner == tag]
        for key, value in clean.items():
            summary[f"{tag}/{key}_drop"] = fmean(value - metrics[key] for metrics in levels)
        kept = (retention(metrics["accuracy"], clean["accuracy"], chance) for metrics in levels)
        summary[f"{tag}/accuracy_retention"] = fmean(kept)
    means = {f"{key}_mean": fmean(metrics[key] for metrics in noisy.values()) for key in clean}
    return summary | means | {"score": (clean["accuracy"] + means["accuracy_mean"]) / 2}
