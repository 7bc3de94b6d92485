"""The parts of a Brier score."""

from __future__ import annotations

from torch import Tensor

__all__ = ["murphy_decomposition"]


def murphy_decomposition(probability_sum: Tensor, correct: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns reliability, resolution and uncertainty, the parts of a binned Brier score.

    .. math:: \underbrace{\sum_{k, b} \frac{n_{kb}}{n} (\bar p_{kb} - \bar o_{kb})^2}_\text{reliability}
        - \underbrace{\sum_{k, b} \frac{n_{kb}}{n} (\bar o_{kb} - \bar o_k)^2}_\text{resolution}
        + \underbrace{\sum_k \bar o_k (1 - \bar o_k)}_\text{uncertainty}

    Here :math:`\bar p_{kb}` is the mean probability of class :math:`k` in bin :math:`b`, :math:`\bar o_{kb}` the share of
    samples there that belong to the class, and :math:`\bar o_k` the share among all samples. The sum is the Brier score if the
    probabilities within each bin are equal.

    Args:
        probability_sum: The sum of the probabilities in each bin of each class, of shape :math:`(*, M)`.
        correct: The number of samples in each bin that belong to the class.
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
    # the means of an empty bin are NaN
    reliability = (weight * (probability_sum / count - rate) ** 2).where(count > 0, 0).sum()
    resolution = (weight * (rate - base) ** 2).where(count > 0, 0).sum()
    return reliability, resolution, (base * (1 - base)).sum()
