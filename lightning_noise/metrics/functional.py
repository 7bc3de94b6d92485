"""The formulas of the metrics, on tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor

__all__ = [
    "area_under_curve",
    "aurc",
    "bin_indices",
    "calibration_floor",
    "calibration_z",
    "corruption_error",
    "debiased_calibration_error",
    "expected_calibration_error",
    "failure_auroc",
    "flip_rate",
    "mean_corruption_error",
    "murphy_decomposition",
    "noise_detected",
    "retention",
    "robustness_summary",
    "signed_gap",
]


def aurc(correct: Tensor, count: Tensor) -> Tensor:
    r"""Returns the area under the risk-coverage curve: the error rate among the most confident, averaged over coverages.

    .. math:: \frac{1}{n} \sum_{m=1}^n \frac{1}{m} \sum_{i \leq m} (1 - a_i), \quad c_1 \geq c_2 \geq \ldots

    Predictions in a bin are tied, and count as their mean over all orders. For the error rate :math:`e`, a confidence that says
    nothing gives :math:`e` and one that ranks every error last :math:`e + (1 - e) \ln(1 - e)`.

    Args:
        correct: The number of right predictions in each bin, from the least confident to the most, of shape :math:`(M,)`.
        count: The number of predictions in each bin.

    References:
        Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers (Geifman et al., 2019), https://arxiv.org/abs/1805.08206

    Example:
        >>> import torch
        >>> aurc(torch.tensor([0, 1]), torch.tensor([1, 1]))  # the surer one is right: (0 + 1/2) / 2
        tensor(0.2500, dtype=torch.float64)
    """
    count, wrong = count.double().flip(0), (count - correct).double().flip(0)
    before, wrong_before = count.cumsum(0) - count, wrong.cumsum(0) - wrong
    # sums of 1 / m over the ranks of a bin, and of the mean of (wrong_before + j wrong / count) / m over its j = m - before
    harmonic = torch.digamma(before + count + 1) - torch.digamma(before + 1)
    risks = wrong_before * harmonic + wrong / count * (count - before * harmonic)
    return risks.where(count > 0, 0).sum() / count.sum()


def failure_auroc(correct: Tensor, count: Tensor) -> Tensor:
    r"""Returns the chance that a wrong prediction is less confident than a right one.

    .. math:: P(c_i < c_j) + \tfrac{1}{2} P(c_i = c_j), \quad a_i = 0, a_j = 1

    Predictions in a bin are tied. It is not a number where all predictions are right, or all wrong.

    Args:
        correct: The number of right predictions in each bin, from the least confident to the most, of shape :math:`(M,)`.
        count: The number of predictions in each bin.

    References:
        A Baseline for Detecting Misclassified and Out-of-Distribution Examples (Hendrycks and Gimpel, 2017),
        https://arxiv.org/abs/1610.02136

    Example:
        >>> import torch
        >>> failure_auroc(torch.tensor([0, 1]), torch.tensor([1, 1]))  # the surer one is right
        tensor(1., dtype=torch.float64)
    """
    correct, wrong = correct.double(), (count - correct).double()
    surer = correct.sum() - correct.cumsum(0)
    return (wrong * (surer + correct / 2)).sum() / (wrong.sum() * correct.sum())


def noise_detected(noisy: Tensor, clean: Tensor) -> Tensor:
    r"""Returns the share of the noisy predictions below the confidence that 95 % of the clean ones reach.

    .. math:: P(c_\text{noisy} < t), \quad t = \max \{ t : P(c_\text{clean} < t) \leq 0.05 \}

    The threshold is the lower edge of a bin, and what lies in its bin is as confident as it and counts as not detected: at most
    5 % of the clean predictions are taken for noisy ones, fewer where many are tied, and then fewer of the noisy are found.

    Args:
        noisy: The number of noisy predictions in each bin, from the least confident to the most, of shape :math:`(M,)`.
        clean: The number of clean predictions in each bin.

    Example:
        >>> import torch
        >>> noise_detected(torch.tensor([3, 0, 1]), torch.tensor([1, 0, 19]))  # one clean prediction in 20 may lie below
        tensor(0.7500, dtype=torch.float64)
    """
    noisy, clean = noisy.double(), clean.double()
    below = clean.cumsum(0) - clean
    told = 20 * below <= clean.sum()  # the bins up to that of the threshold
    return noisy[:-1].where(told[1:], 0).sum() / noisy.sum()


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
    accuracies are not comparable. What it reaches is :func:`calibration_floor`.

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


def debiased_calibration_error(confidence_sum: Tensor, correct: Tensor, count: Tensor) -> Tensor:
    r"""Returns the squared calibration error of binned predictions without the part that is the scatter of the bins.

    .. math:: \sum_b \frac{n_b}{n} \left[ (\text{acc}_b - \text{conf}_b)^2
        - \frac{\text{acc}_b (1 - \text{acc}_b)}{n_b - 1} \right]

    It is a square, in units of probability squared, and negative about as often as positive where the model is calibrated. The
    spread of the confidences within a bin counts as scatter too, which lowers the mean by less than :math:`1 / (4 M n)`. A bin
    of one prediction, whose scatter is unknown, adds nothing.

    Args:
        confidence_sum: The sum of the confidences in each bin, of shape :math:`(M,)`.
        correct: The number of right predictions in each bin.
        count: The number of predictions in each bin.

    References:
        Verified Uncertainty Calibration (Kumar et al., 2019), https://arxiv.org/abs/1909.10155

    Example:
        >>> import torch
        >>> sums = torch.tensor([1.0]), torch.tensor([1]), torch.tensor([2])  # as calibrated as two predictions can be
        >>> debiased_calibration_error(*sums)  # 0 - (1/2)(1/2) / (2 - 1)
        tensor(-0.2500)
    """
    accuracy = correct / count
    scatter = accuracy * (1 - accuracy) / (count - 1)
    gap = (correct - confidence_sum) / count
    return (count * (gap**2 - scatter)).where(count > 1, 0).sum() / count.sum()


def calibration_floor(variance_sum: Tensor, count: Tensor) -> Tensor:
    r"""Returns the expected calibration error that a perfectly calibrated model of these confidences would show.

    .. math:: \frac{1}{n} \sum_b \sqrt{\frac{2}{\pi} S_b}, \quad S_b = \sum_{i \in b} c_i (1 - c_i)

    It takes the hits in a bin as normal, which is within 5 % from 500 predictions on and a tenth too low with 50.

    Args:
        variance_sum: The sum :math:`S_b` in each bin, of shape :math:`(M,)`.
        count: The number of predictions in each bin.

    Example:
        >>> import torch
        >>> calibration_floor(torch.tensor([25.0]), torch.tensor([100]))  # 100 predictions of confidence 1/2
        tensor(0.0399)
    """
    return (2 / math.pi * variance_sum).sqrt().sum() / count.sum()


def calibration_z(confidence_sum: Tensor, correct: Tensor, count: Tensor, variance_sum: Tensor) -> Tensor:
    r"""Returns how many standard errors the expected calibration error lies above that of a perfectly calibrated model.

    .. math:: z = \frac{n \, (\text{ECE} - \text{floor})}{\sqrt{(1 - 2 / \pi) \sum_b S_b}}

    The one-sided p value is :math:`1 - \Phi(z)`; as the scatter of few bins is skewed, 5 to 8 % of calibrated models fall below
    a p of 0.05. :math:`z` is infinite where all confidences are 0 or 1 and one of them is wrong, and not a number where
    none is: nothing is left to chance.

    Args:
        confidence_sum: The sum of the confidences in each bin, of shape :math:`(M,)`.
        correct: The number of right predictions in each bin.
        count: The number of predictions in each bin.
        variance_sum: The sum :math:`S_b` of :math:`c (1 - c)` in each bin; see :func:`calibration_floor`.

    Example:
        >>> import torch
        >>> sums = torch.tensor([50.0]), torch.tensor([60]), torch.tensor([100]), torch.tensor([25.0])
        >>> calibration_z(*sums)  # 100 (0.1 - 0.0399) / sqrt(0.3634 * 25)
        tensor(1.9942)
    """
    excess = expected_calibration_error(confidence_sum, correct, count) - calibration_floor(variance_sum, count)
    return count.sum() * excess / ((1 - 2 / math.pi) * variance_sum.sum()).sqrt()


def signed_gap(confidence_sum: Tensor, correct: Tensor, count: Tensor) -> Tensor:
    r"""Returns the mean confidence minus the accuracy: positive where the model is too sure of itself.

    Args:
        confidence_sum: The sum of the confidences in each bin, of shape :math:`(M,)`.
        correct: The number of right predictions in each bin.
        count: The number of predictions in each bin.

    Example:
        >>> import torch
        >>> signed_gap(torch.tensor([1.8]), torch.tensor([1]), torch.tensor([2]))  # 0.9 - 0.5
        tensor(0.4000)
    """
    return (confidence_sum.sum() - correct.sum()) / count.sum()


def murphy_decomposition(probability_sum: Tensor, correct: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns reliability, resolution and uncertainty, the parts of a Brier score in bins.

    .. math:: \underbrace{\sum_{k, b} \frac{n_{kb}}{n} (\bar p_{kb} - \bar o_{kb})^2}_\text{reliability}
        - \underbrace{\sum_{k, b} \frac{n_{kb}}{n} (\bar o_{kb} - \bar o_k)^2}_\text{resolution}
        + \underbrace{\sum_k \bar o_k (1 - \bar o_k)}_\text{uncertainty}

    Here :math:`\bar p_{kb}` is the mean probability of class :math:`k` in a bin, :math:`\bar o_{kb}` the share there that is of
    that class and :math:`\bar o_k` the share in all. The sum is the Brier score where the probabilities in a bin are equal.

    Args:
        probability_sum: The sum of the probabilities in each bin of each class, of shape :math:`(*, M)`.
        correct: How often the sample was of the class.
        count: The number of probabilities in each bin.

    References:
        A New Vector Partition of the Probability Score (Murphy, 1973),
        https://doi.org/10.1175/1520-0450(1973)012%3C0595:ANVPOT%3E2.0.CO;2

    Example:
        >>> import torch
        >>> sums = torch.tensor([0.5, 1.5]), torch.tensor([0, 2]), torch.tensor([2, 2])  # 1/4 for 0 and 0, 3/4 for 1 and 1
        >>> murphy_decomposition(*sums)  # (1/4)^2, (1/2)^2, (1/2)(1/2)
        (tensor(0.0625), tensor(0.2500), tensor(0.2500))
    """
    weight = count / count.sum(-1, keepdim=True)
    rate, base = correct / count, correct.sum(-1, keepdim=True) / count.sum(-1, keepdim=True)
    # an empty bin, whose means are not a number, weighs nothing
    reliability = (weight * (probability_sum / count - rate) ** 2).where(count > 0, 0).sum()
    resolution = (weight * (rate - base) ** 2).where(count > 0, 0).sum()
    return reliability, resolution, (base * (1 - base)).sum()


def flip_rate(preds: Tensor, noisy_preds: Tensor) -> Tensor:
    r"""Returns the share of the predictions that change under noise, which needs no labels.

    Args:
        preds: Logits without noise, of shape :math:`(B, K, *)`.
        noisy_preds: The logits of the same samples under noise.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261, whose flip
        rate for noise compares with the first frame as this one does with the clean sample.

    Example:
        >>> import torch
        >>> flip_rate(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        tensor(0.5000)
    """
    return (preds.argmax(1) != noisy_preds.argmax(1)).float().mean()


def retention(noisy: float, clean: float, chance: float) -> float:
    r"""Returns the share of the skill above chance that is left under noise.

    .. math:: \frac{A_\text{noisy} - A_\text{chance}}{A_\text{clean} - A_\text{chance}}

    It is comparable between tasks with different numbers of classes, and not a number where the clean model has no skill.

    Example:
        >>> retention(noisy=0.5, clean=0.75, chance=0.25)
        0.5
    """
    return (noisy - chance) / (clean - chance) if clean > chance else math.nan


def area_under_curve(curve: Mapping[float, float]) -> float:
    r"""Returns the mean of a curve over its levels: the area under straight lines between the points, over their range.

    .. math:: \frac{1}{l_m - l_1} \sum_{i=2}^m (l_i - l_{i-1}) \frac{A_i + A_{i-1}}{2}

    It is a mean over levels in their own units, so a gap between two levels weighs as much as it is wide; a curve of one point
    is its own mean. Compare areas of the same levels only.

    Args:
        curve: The value at each level, in any order.

    Example:
        >>> area_under_curve({0.0: 1.0, 0.1: 1.0, 0.5: 0.5})  # (0.1 * 1 + 0.4 * 0.75) / 0.5
        0.8
    """
    points = sorted(curve.items())
    (first, value), (last, _) = points[0], points[-1]
    area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(points))
    return area / (last - first) if last > first else value


def corruption_error(errors: Sequence[float], baseline: Sequence[float]) -> float:
    r"""Returns the errors under a noise in units of those of a baseline: below 1 where the model is the more robust.

    .. math:: \text{CE} = \sum_s E_s \Big/ \sum_s E_s^\text{baseline}

    It is not a number where the baseline makes no error.

    Args:
        errors: The error rate at each level.
        baseline: The error rates of another model, at the same levels.

    Raises:
        ValueError: If the two are not of the same length.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261, whose
        baseline is AlexNet; here it is a run of your own.

    Example:
        >>> corruption_error([0.1, 0.2], baseline=[0.2, 0.4])
        0.5
    """
    if len(errors) != len(baseline):
        raise ValueError(f"errors must be of the levels of the baseline, got {len(errors)} and {len(baseline)}")
    return sum(errors) / sum(baseline) if sum(baseline) else math.nan


def mean_corruption_error(errors: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]]) -> float:
    """Returns the mean over noises of :func:`corruption_error`, the mCE.

    Args:
        errors: The error rates of each noise at its levels, by tag.
        baseline: Those of another model.

    Raises:
        ValueError: If the two are not of the same noises and levels.

    Example:
        >>> mean_corruption_error({"gaussian": [0.1], "shot": [0.3]}, baseline={"gaussian": [0.2], "shot": [0.3]})
        0.75
    """
    if errors.keys() != baseline.keys():
        raise ValueError(f"errors must be of the noises of the baseline, got {sorted(errors)} and {sorted(baseline)}")
    return fmean(corruption_error(of_levels, baseline[tag]) for tag, of_levels in errors.items())


def robustness_summary(
    clean: Mapping[str, float],
    noisy: Mapping[tuple[str, float], Mapping[str, float]],
    chance: float | None,
    weights: Collection[str] = (),
) -> dict[str, float]:
    """Returns what each noise costs, and the means over all of them.

    =============================  ================================================================================
    ``<tag>/<metric>_drop``        clean minus noisy, averaged over the levels
    ``<tag>/accuracy_retention``   the share of the skill above chance that is left, averaged over the levels
    ``<tag>/accuracy_area``        :func:`area_under_curve` of the accuracy from level 0, which is clean
    ``<tag>/sensitivity``          of noise in weights, the rise of the loss averaged over the levels: the sharpness
    ``<metric>_mean``              averaged over tags and levels
    ``score``                      half the clean and half the mean noisy accuracy
    =============================  ================================================================================

    Retention, area and score are those of an ``"accuracy"`` and the sensitivity is that of a ``"loss"``, where there is one
    among the metrics.

    Args:
        clean: Metrics without noise by name, of which drops are told.
        noisy: These metrics, and others of which only means are wanted, for each tag and level of a noise.
        chance: The accuracy of a guess; None where it is not known, and then there is no retention.
        weights: The tags of noise in weights.

    Example:
        >>> noisy = {("gaussian", 0.1): {"accuracy": 0.75}, ("gaussian", 0.2): {"accuracy": 0.5}}
        >>> robustness_summary({"accuracy": 1.0}, noisy, chance=0.5)["score"]
        0.8125
    """
    curves: dict[str, dict[float, Mapping[str, float]]] = {}
    for (tag, level), metrics in noisy.items():
        curves.setdefault(tag, {})[level] = metrics
    summary = {}
    for tag, curve in curves.items():
        drops = {key: fmean(clean[key] - metrics[key] for metrics in curve.values()) for key in clean}
        summary |= {f"{tag}/{key}_drop": drop for key, drop in drops.items()}
        if tag in weights and "loss" in clean:
            summary[f"{tag}/sensitivity"] = -drops["loss"]
        if "accuracy" in clean:
            accuracies = {level: metrics["accuracy"] for level, metrics in curve.items()}
            summary[f"{tag}/accuracy_area"] = area_under_curve({0.0: clean["accuracy"]} | accuracies)
            if chance is not None:
                kept = (retention(accuracy, clean["accuracy"], chance) for accuracy in accuracies.values())
                summary[f"{tag}/accuracy_retention"] = fmean(kept)
    every = list(noisy.values())
    summary |= {f"{key}_mean": fmean(metrics[key] for metrics in every) for key in every[0]}
    if "accuracy" in clean:
        summary["score"] = (clean["accuracy"] + summary["accuracy_mean"]) / 2
    return summary
