r"""The calibration of binned predictions.

The functions take sums over the predictions in each of :math:`M` bins of equal width of the confidence:

==================  ==============================================================================
``confidence_sum``  the sum of the confidences :math:`c_i`
``correct``         the number of correct predictions, :math:`a_i = 1`
``count``           the number of predictions, :math:`n_b`
``variance_sum``    :math:`S_b = \sum_{i \in b} c_i (1 - c_i)`, the variance of ``correct`` under perfect calibration
==================  ==============================================================================

Each is a tensor of shape :math:`(M,)`.
"""

from __future__ import annotations

import math

from torch import Tensor

__all__ = [
    "bin_indices",
    "calibration_floor",
    "calibration_z",
    "debiased_calibration_error",
    "expected_calibration_error",
    "signed_gap",
]


def bin_indices(confidence: Tensor, n_bins: int) -> Tensor:
    r"""Returns the bin of each confidence among bins of equal width.

    Bin :math:`b` is :math:`[b / M, (b + 1) / M)`. The last bin is closed, so a confidence of exactly 1 needs no bin of its own.

    Example:
        >>> import torch
        >>> bin_indices(torch.tensor([0.0, 0.1, 0.95, 1.0]), n_bins=10)
        tensor([0, 1, 9, 9])
    """
    return (confidence * n_bins).long().clamp_(0, n_bins - 1)


def expected_calibration_error(confidence_sum: Tensor, correct: Tensor, count: Tensor) -> Tensor:
    r"""Returns the expected calibration error (ECE).

    .. math:: \text{ECE} = \sum_b \frac{n_b}{n} \left| \text{acc}_b - \text{conf}_b \right|
        = \frac{1}{n} \sum_b \left| \sum_{i \in b} a_i - \sum_{i \in b} c_i \right|

    A perfectly calibrated model does not reach 0, because the accuracy in a bin scatters. The scatter grows with fewer samples
    and with lower accuracy, so errors at different accuracies are not comparable. :func:`calibration_floor` is what a
    perfectly calibrated model reaches.

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
    r"""Returns the squared calibration error without the scatter of the bins.

    .. math:: \sum_b \frac{n_b}{n} \left[ (\text{acc}_b - \text{conf}_b)^2
        - \frac{\text{acc}_b (1 - \text{acc}_b)}{n_b - 1} \right]

    The unit is probability squared. For a calibrated model the result is negative about as often as positive. The spread of
    the confidences within a bin counts as scatter too, which lowers the mean by less than :math:`1 / (4 M n)`. A bin of one
    prediction adds nothing, because its scatter is unknown.

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
    r"""Returns the ECE that a perfectly calibrated model of these confidences would show.

    .. math:: \frac{1}{n} \sum_b \sqrt{\frac{2}{\pi} S_b}, \quad S_b = \sum_{i \in b} c_i (1 - c_i)

    The formula takes the number of correct predictions in a bin as normal. The result is within 5 % from 500 predictions on,
    and a tenth too low with 50.

    Example:
        >>> import torch
        >>> calibration_floor(torch.tensor([25.0]), torch.tensor([100]))  # 100 predictions of confidence 1/2
        tensor(0.0399)
    """
    return (2 / math.pi * variance_sum).sqrt().sum() / count.sum()


def calibration_z(confidence_sum: Tensor, correct: Tensor, count: Tensor, variance_sum: Tensor) -> Tensor:
    r"""Returns how many standard errors the ECE lies above its floor.

    .. math:: z = \frac{n \, (\text{ECE} - \text{floor})}{\sqrt{(1 - 2 / \pi) \sum_b S_b}}

    The floor is :func:`calibration_floor`, and the one-sided p value is :math:`1 - \Phi(z)`. The scatter of few bins is
    skewed, so 5 to 8 % of calibrated models have a p value below 0.05.

    If all confidences are 0 or 1, nothing is left to chance: :math:`z` is infinite if a prediction contradicts its confidence,
    and NaN otherwise.

    Example:
        >>> import torch
        >>> sums = torch.tensor([50.0]), torch.tensor([60]), torch.tensor([100]), torch.tensor([25.0])
        >>> calibration_z(*sums)  # 100 (0.1 - 0.0399) / sqrt(0.3634 * 25)
        tensor(1.9942)
    """
    excess = expected_calibration_error(confidence_sum, correct, count) - calibration_floor(variance_sum, count)
    return count.sum() * excess / ((1 - 2 / math.pi) * variance_sum.sum()).sqrt()


def signed_gap(confidence_sum: Tensor, correct: Tensor, count: Tensor) -> Tensor:
    r"""Returns the mean confidence minus the accuracy: positive if the model is over-confident.

    Example:
        >>> import torch
        >>> signed_gap(torch.tensor([1.8]), torch.tensor([1]), torch.tensor([2]))  # 0.9 - 0.5
        tensor(0.4000)
    """
    return (confidence_sum.sum() - correct.sum()) / count.sum()
