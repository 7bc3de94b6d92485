"""Small tensor helpers that noises, losses and perturbations share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["as_type_of", "column", "detached", "like", "span", "validate_dim"]


def column(values: Tensor, x: Tensor) -> Tensor:
    """Returns one value per sample, of shape (B,), in the shape that broadcasts against ``x``."""
    return values.view(-1, *[1] * (x.ndim - 1))


def span(start: Tensor, length: float | Tensor, x: Tensor, dim: int) -> Tensor:
    """Returns a mask of [start, start + length) along an axis, in the shape that broadcasts against ``x``.

    The start has shape (B,), and so has the length if it is not a number. The axis counts from the end.
    """
    shape = [1] * (x.ndim - 1)
    shape[dim] = -1
    position = torch.arange(x.shape[dim], device=x.device).view(1, *shape)
    start, end = column(start, x), column(start + length, x)
    return (position >= start) & (position < end)


def like(leaf: Tensor, y: Tensor) -> Tensor:
    """Returns ``y`` as the subclass of ``leaf``, with its attributes and ``requires_grad``."""
    y = as_type_of(leaf, y)
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.requires_grad_(y, leaf.requires_grad)


def detached(leaf: Tensor) -> Tensor:
    """Returns the data of a leaf as a plain tensor, and calls nothing that a subclass may override."""
    return Tensor.as_subclass(leaf, Tensor).detach()


def as_type_of(leaf: Tensor, y: Tensor) -> Tensor:
    """Returns ``y`` as the subclass of ``leaf``, with its attributes."""
    if type(leaf) is not Tensor:
        y = y.as_subclass(type(leaf))
        vars(y).update(vars(leaf))
    return y


def validate_dim(dim: Sequence[int]) -> tuple[int, ...]:
    """Returns the axes as a tuple, or raises an error if they repeat or do not count from the end."""
    if isinstance(dim, int):
        raise TypeError(f"dim must be a tuple of axes such as (-1,), got {dim}")
    dim = tuple(dim)
    if not dim or len(set(dim)) < len(dim) or max(dim) >= 0:
        raise ValueError(f"dim must be different axes counted from the end, such as (-2, -1), got {dim}")
    return dim
