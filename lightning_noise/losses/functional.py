"""Losses of smoothed and weighted labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "smoothed_binary_cross_entropy",
    "smoothed_binary_cross_entropy_with_logits",
    "smoothed_cross_entropy",
    "smoothed_nll_loss",
]


def smoothed_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    level: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Returns the cross-entropy of smoothed labels.

    .. math:: L_\varepsilon = (1 - \varepsilon) \, L + \frac{\varepsilon}{K} \sum_{k=1}^{K} -w_k \log p_k

    Without class weights :math:`L_\varepsilon = (1 - \varepsilon) L + \varepsilon (\mathrm{KL}(U \Vert p) + \log K)`, with the
    uniform distribution :math:`U`.

    The loss equals ``F.cross_entropy(..., label_smoothing=level)`` bit for bit, with one exception: the mean over class weights
    with ignored positions may differ in the last bit, because its denominator sums zeros, too. The level is a tensor, so that
    a compiled step is not recompiled when the level changes.

    Args:
        input: The logits, of shape :math:`(N, K, *)` or :math:`(K)`.
        target: The classes, of shape :math:`(N, *)` or :math:`()`, or probabilities of the shape of the input.
        weight: The weights of the classes, of shape :math:`(K)`.
        level: The share :math:`\varepsilon \in [0, 1]` of the uniform distribution, of shape :math:`()`; 0.1 is usual.
        ignore_index: The class of positions that do not count.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    References:
        Rethinking the Inception Architecture for Computer Vision (Szegedy et al., 2016), https://arxiv.org/abs/1512.00567

        When Does Label Smoothing Help? (Müller et al., 2019), https://arxiv.org/abs/1906.02629

    Example:
        >>> logits, target = torch.randn(8, 3), torch.arange(8) % 3
        >>> loss = smoothed_cross_entropy(logits, target, level=torch.tensor(0.1, dtype=torch.float64))
        >>> torch.equal(loss, F.cross_entropy(logits, target, label_smoothing=0.1))
        True
    """
    # torch's own loss is the fastest; with class weights it would wait for the device
    if weight is None and level.device.type == "cpu" and not torch.compiler.is_compiling():
        smoothing = float(level.numpy())
        return F.cross_entropy(input, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)
    if target.is_floating_point():
        soft = _smooth(target, level, input.shape[class_dim(input)])
        return F.cross_entropy(input, soft, weight, ignore_index=ignore_index, reduction=reduction)
    return smoothed_nll_loss(log_softmax(input), target, weight, level=level, ignore_index=ignore_index, reduction=reduction)


def smoothed_nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    level: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Returns the negative log-likelihood of smoothed labels.

    The formula and the arguments are those of :func:`smoothed_cross_entropy`, with log-probabilities of shape
    :math:`(N, K, *)` or :math:`(K)` instead of logits. The target holds classes, of shape :math:`(N, *)` or :math:`()`.

    Example:
        >>> log_probs = torch.full((2, 4), 0.25).log()
        >>> loss = smoothed_nll_loss(log_probs, torch.tensor([0, 1]), level=torch.tensor(0.3))
        >>> torch.allclose(loss, torch.tensor(4.0).log())
        True
    """
    input, dim = _cast_as_autocast(input), class_dim(input)
    hard = F.nll_loss(input, target, weight, ignore_index=ignore_index, reduction=reduction)
    weighted = input if weight is None else input * weight.view(-1, *[1] * (input.ndim - dim - 1))
    uniform = (-weighted.sum(dim)).masked_fill(target == ignore_index, 0)
    if reduction != "none":
        uniform = uniform.sum()
    if reduction == "mean":
        uniform = uniform / sum_weights(target, weight, ignore_index)
    level = level.to(torch.promote_types(level.dtype, input.dtype))
    return scale(hard, 1 - level) + scale(uniform, level / input.shape[dim])


def smoothed_binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    level: Tensor,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Returns the binary cross-entropy of smoothed labels.

    .. math:: \tilde y = (1 - \varepsilon) \, y + \varepsilon / 2

    Args:
        input: The logits, of any shape.
        target: The labels in [0, 1], of the same shape.
        weight: A weight that broadcasts to the input.
        level: The share :math:`\varepsilon` of the uniform distribution over yes and no, of shape :math:`()`.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        pos_weight: The weights of the positive labels.

    Example:
        >>> loss = smoothed_binary_cross_entropy_with_logits(torch.zeros(5), torch.ones(5), level=torch.tensor(0.2))
        >>> torch.allclose(loss, torch.tensor(2.0).log())
        True
    """
    soft = _smooth(target, level, 2)
    return F.binary_cross_entropy_with_logits(input, soft, weight, reduction=reduction, pos_weight=pos_weight)


def smoothed_binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, level: Tensor, reduction: str = "mean"
) -> Tensor:
    """Returns the binary cross-entropy of smoothed labels, for probabilities instead of logits.

    The formula and the arguments are those of :func:`smoothed_binary_cross_entropy_with_logits`, without ``pos_weight``.

    Example:
        >>> loss = smoothed_binary_cross_entropy(torch.full((5,), 0.5), torch.ones(5), level=torch.tensor(0.2))
        >>> torch.allclose(loss, torch.tensor(2.0).log())
        True
    """
    return F.binary_cross_entropy(input, _smooth(target, level, 2), weight, reduction=reduction)


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """Multiplies a tensor by a factor in at least float32, as torch multiplies by a Python number."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == factor.dtype == dtype:
        return x * factor
    return (x.to(dtype) * factor.to(dtype)).to(x.dtype)


def log_softmax(logits: Tensor) -> Tensor:
    """Returns the log-probabilities from which torch computes the cross-entropy."""
    return F.log_softmax(_cast_as_autocast(logits), class_dim(logits))


def class_dim(x: Tensor) -> int:
    """Returns the dimension of the classes."""
    return 0 if x.ndim == 1 else 1


def sum_weights(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Returns the denominator of the mean."""
    ignored = target.long() == ignore_index  # an unsigned label 156 would equal -100
    if weight is None:
        return ignored.numel() - ignored.sum()
    weights = weight.gather(0, target.long().masked_fill(ignored, 0).flatten())
    return weights.masked_fill(ignored.flatten(), 0).sum()


def _smooth(target: Tensor, level: Tensor, n_classes: int) -> Tensor:
    level = level.to(torch.promote_types(level.dtype, target.dtype))
    return (scale(target, 1 - level) + level / n_classes).to(target.dtype)


def _cast_as_autocast(x: Tensor) -> Tensor:
    """Casts a tensor as autocast does before it calls a loss."""
    return x.float() if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64 else x
