"""Small tensor helpers that noises, losses and perturbations share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from numbers import Integral

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from lightning_noise._checks import is_flag

__all__ = [
    "add_scaled",
    "as_type_of",
    "at_least_float32",
    "center_span",
    "column",
    "count_valid",
    "detached",
    "empty_wide",
    "index_valid",
    "is_differentiated",
    "is_fast_as_bits",
    "like",
    "number_like",
    "over_norm",
    "row_norms",
    "span",
    "valid_part",
    "validate_axis",
    "validate_dim",
    "without_overrides",
    "zero_invalid_",
]


def at_least_float32(x: Tensor) -> Tensor:
    """Returns ``x`` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def column(values: Tensor, x: Tensor) -> Tensor:
    """Returns one value per sample, of shape (B,), in the shape that broadcasts against ``x``."""
    return values.view(-1, *[1] * (x.ndim - 1))


def span(start: Tensor, length: float | Tensor, x: Tensor, dim: int, index: Tensor | None = None) -> Tensor:
    """Returns a mask of [start, start + length) along an axis, in the shape that broadcasts against ``x``.

    The start has shape (B,), and so has the length if it is not a number. The axis counts from the end. Default index: the
    position along the axis.
    """
    if index is None:
        shape = [1] * x.ndim
        shape[dim] = -1
        index = torch.arange(x.shape[dim], device=x.device).view(shape)
    start, end = column(start, x), column(start + length, x)
    return (index >= start) & (index < end)


def center_span(u: Tensor, size: float | Tensor, n: float | Tensor) -> Tensor:
    """Returns the start of a span of a size, whose center is uniform over n positions, from uniform numbers.

    A span of even size has its center between two positions, so half of the spans are one position further.
    """
    return (u * n - size / 2 + 0.5).floor_()


def index_valid(mask: Tensor | None, x: Tensor, dim: int) -> tuple[Tensor | int, Tensor | None]:
    """Returns how many positions along an axis hold valid elements, of shape (B,), and the index of each among them.

    The index has the shape that broadcasts against ``x``. Without a mask, all positions count.
    """
    if mask is None:
        return x.shape[dim], None
    shape = [1] * x.ndim
    shape[0], shape[dim] = len(x), x.shape[dim]
    others = [axis for axis in range(1, x.ndim) if axis != x.ndim + dim]
    # as bytes, because reductions of booleans are slow on the CPU
    valid = mask.view(torch.uint8).amax(others) if others else mask
    return valid.sum(1), (valid.cumsum(1) - 1).view(shape)


def count_valid(mask: Tensor | None, x: Tensor, dim: int) -> Tensor:
    """Returns how many elements of each series along an axis are valid, at least 1, as numbers that broadcast against ``x``."""
    real = x.dtype.to_real()
    if mask is None:
        return torch.full((), x.shape[dim], dtype=real, device=x.device)
    # as bytes, because sums of booleans are slow on the CPU
    return mask.view(torch.uint8).sum(dim, keepdim=True, dtype=torch.int32).clamp_min_(1).to(real)


def is_fast_as_bits(x: Tensor) -> bool:
    """Returns whether to multiply the bits of ``x`` by 0 or 1, because ``torch.where`` takes ten times as long."""
    is_large = x.numel() > 2**13  # otherwise the number of calls counts
    return is_large and x.device.type == "cpu" and x.dtype == torch.float32 and not is_differentiated(x)


def number_like(value: float, x: Tensor) -> Tensor:
    """Returns a number as a tensor of the dtype and device of ``x``, without waiting for the device."""
    return torch.full((), value, dtype=x.dtype, device=x.device)


def empty_wide(x: Tensor) -> Tensor:
    """Returns an empty tensor of the shape of ``x``, in at least float32."""
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def zero_invalid_(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sets invalid elements to zero, in place and whatever they are: infinity times zero would be NaN."""
    if mask is None:
        return x
    if x.is_complex():
        return x.masked_fill_(~mask, 0)
    # on the CPU, a product of integers takes a third of the time of torch.where and no memory
    x.view({4: torch.int32, 8: torch.int64}[x.element_size()]).mul_(mask.view(torch.uint8))
    return x


def valid_part(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns ``x`` with zeros at invalid elements."""
    if mask is None:
        return x
    return torch.where(mask, x, 0.0) if x.requires_grad else zero_invalid_(x.clone(), mask)


def add_scaled(x: Tensor, noise: Tensor, scale: float | Tensor, mask: Tensor | None) -> Tensor:
    """Returns ``x + scale * noise``, and ``x`` to the last bit at invalid elements, if possible in the memory of the noise."""
    # a number, too, as a tensor: the same operation rounds a scale for each sample in the same way
    scale = scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=noise.dtype.to_real(), device=noise.device)
    if mask is not None:  # zero times a negative scale is -0.0, which changes no bit of x
        noise, scale = zero_invalid_(noise.neg_(), mask), -scale
    if is_differentiated(x) or x.is_complex():
        return torch.addcmul(x, noise, scale.to(noise.dtype))
    return torch.addcmul(x, noise, scale, out=noise if x.dtype == noise.dtype else torch.empty_like(x))


def over_norm(value: Tensor, norm: Tensor) -> Tensor:
    """Returns a value over a norm, and 0 over a norm of 0. A large factor of zeros may be infinite, and their product NaN."""
    return value / norm.masked_fill(norm == 0, math.inf)


def row_norms(x: Tensor) -> Tensor:
    """Returns the norm of each row. Squares of float32 leave its range if the data are as small or large as 10^-20 or 10^20."""
    norms = torch.linalg.vector_norm(x, dim=1)
    if x.device.type == "mps" or (x.device.type == "cpu" and _are_safe(norms)):  # elsewhere, to look would wait for the device
        return norms
    wide = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float64))
    return torch.where((norms > 1e-15) & (norms < 1e15), norms, wide.to(norms.dtype))


def _are_safe(norms: Tensor) -> bool:
    smallest, largest = norms.detach().aminmax()
    return smallest.item() > 1e-15 and largest.item() < 1e15


def is_differentiated(x: Tensor) -> bool:
    """Returns whether autograd follows a tensor, backward or forward: it cannot follow results in given memory."""
    return x.requires_grad or unpack_dual(x).tangent is not None


def like(leaf: Tensor, y: Tensor) -> Tensor:
    """Returns ``y`` as the subclass of ``leaf``, with its attributes and ``requires_grad``."""
    if type(leaf) is Tensor and not (leaf.requires_grad or y.requires_grad):
        return y
    y = as_type_of(leaf, y)
    with without_overrides():
        return Tensor.requires_grad_(y, leaf.requires_grad)


def without_overrides() -> AbstractContextManager[None]:
    """Returns a context in which no method of a tensor is that of its subclass."""
    return torch._C.DisableTorchFunctionSubclass()


def detached(leaf: Tensor) -> Tensor:
    """Returns the data of a leaf as a plain tensor, and calls nothing that a subclass may override."""
    # a sparse tensor cannot be made another view of a subclass
    return (leaf if type(leaf) is Tensor else Tensor.as_subclass(leaf, Tensor)).detach()


def as_type_of(leaf: Tensor, y: Tensor) -> Tensor:
    """Returns ``y`` as the subclass of ``leaf``, with its attributes."""
    if type(leaf) is not Tensor:
        y = y.as_subclass(type(leaf))
        vars(y).update(vars(leaf))
    return y


def validate_axis(dim: int) -> int:
    """Returns an axis as an int, or raises an error if the axis does not count from the end."""
    if is_flag(dim) or not isinstance(dim, Integral):
        raise TypeError(f"dim must be an axis counted from the end, such as -1, got {dim!r}")
    if dim >= 0:
        raise ValueError(
            f"dim must be an axis counted from the end, got {dim}; type dim=-1 for the last axis, or dim=-2 for the time of "
            "(B, T, C)"
        )
    return int(dim)


def validate_dim(dim: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the axes as a tuple, or raises an error if they repeat or do not count from the end."""
    if isinstance(dim, str) or not isinstance(dim, Iterable | Integral):
        raise TypeError(f"dim must be an axis or a tuple of axes such as (-1,), got {dim!r}")
    dim = tuple(map(validate_axis, dim if isinstance(dim, Iterable) else (dim,)))
    if not dim or len(set(dim)) < len(dim):
        raise ValueError(f"dim must be different axes counted from the end, such as (-2, -1), got {dim}")
    return dim
