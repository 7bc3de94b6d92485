"""The accuracy of a guess that knows how often each class occurs, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_noise.metrics.base import Sums

__all__ = ["ConstantGuess"]

_FEWEST = 4096  # indices that are counted apart, because a later batch may have more classes than the first


class ConstantGuess(Sums):
    r"""The accuracy of the best constant guess, also called the no-information rate: the share of the most frequent class.

    .. math:: \frac{1}{n} \sum_l \max_k n_{lk}

    Here :math:`n_{lk}` of the :math:`n` targets are of class :math:`k` of label :math:`l`. There is one label, or, with
    ``per_label``, a guess for each of several labels of two classes. If all :math:`K` classes are equally frequent, the value
    is :math:`1 / K`, else it is larger. A classifier that returns the same class for every sample has at most this accuracy.

    ``update(classes, groups=None)`` adds class indices, which are :math:`2 l + k` with ``per_label``. If an index is not below
    ``n_indices``, nor below 4096, the value is NaN.

    Args:
        n_indices: The number of class indices.
        per_label: Whether the guess may differ between labels.
        n_groups: The number of groups of samples; see :class:`~lightning_noise.metrics.base.Sums`.

    References:
        Measures of Association for Cross Classifications (Goodman and Kruskal, 1954),
        https://doi.org/10.1080/01621459.1954.10501231. Their lambda is the skill above this guess.

        The "no information rate" of ``confusionMatrix`` in the R package caret (Kuhn, 2008),
        https://www.rdocumentation.org/packages/caret/topics/confusionMatrix, and ``DummyClassifier(strategy="most_frequent")``
        of scikit-learn are this guess.

    Example:
        >>> metric = ConstantGuess()
        >>> metric.update(torch.tensor([0, 0, 0, 1]))
        >>> metric.compute()
        tensor(0.7500)
    """

    key = "chance"

    def __init__(self, n_indices: int = _FEWEST, per_label: bool = False, n_groups: int = 1):
        self.n_indices = max(n_indices, _FEWEST)
        super().__init__(n_groups, count=(self.n_indices // 2, 2) if per_label else (1, self.n_indices))

    def update(self, classes: Tensor, groups: Tensor | None = None) -> None:
        self._add_binned(groups, classes.clamp_max(self.n_indices - 1), count=torch.ones_like(classes))
        self._add(groups, undefined=classes >= self.n_indices)

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"chance": sums["count"].amax(-1).sum(-1) / sums["count"].sum((-2, -1))}
