"""Masks: which positions of a tensor are valid, and which are padding or missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_noise.batch import describe, select_one

__all__ = ["Mask", "align_mask", "before_padding", "find_mask", "valid_positions"]

# a leaf of the batch, or a function of the batch
Mask = int | str | Callable[[Any], Tensor]


def find_mask(batch: Any, mask: Mask | None) -> Tensor | None:
    """Returns the mask of a batch: a leaf, or what a function of the batch returns.

    Example:
        >>> batch = {"x": torch.ones(2, 3), "lengths": torch.tensor([2, 3])}
        >>> find_mask(batch, lambda batch: torch.arange(3) < batch["lengths"][:, None])
        tensor([[ True,  True, False],
                [ True,  True,  True]])
    """
    if mask is None:
        return None
    if isinstance(mask, int | str):
        return select_one(batch, mask, "mask")
    found = mask(batch)
    if not isinstance(found, Tensor):
        raise TypeError(f"mask=… must be a function that returns a tensor, got a function that returns {describe(found)}")
    return found


def align_mask(mask: Tensor, x: Tensor) -> Tensor:
    r"""Returns a mask as booleans of the shape of ``x``.

    Positions at which the mask is above 0 are valid. A mask with fewer axes than ``x`` covers the first axes, such as
    :math:`(B, T)` of :math:`(B, T, C)`, or the first axis and the last ones, such as :math:`(B, T)` of :math:`(B, C, T)`.

    Raises:
        ValueError: If the mask does not fit, if both readings fit, or if the mask holds lengths.

    Example:
        >>> mask = torch.tensor([[1, 1, 0]])
        >>> align_mask(mask, torch.ones(1, 2, 3))
        tensor([[[ True,  True, False],
                 [ True,  True, False]]])
    """
    if mask.shape == x.shape:
        return mask > 0
    if mask.ndim == 1 and mask.dtype != torch.bool:
        raise ValueError(
            f"a mask must mark each position, got {describe(mask)} for {describe(x)}; if these are lengths, type "
            'mask=lambda batch: torch.arange(T, device=batch["lengths"].device) < batch["lengths"][:, None], where T is the '
            "length of the time axis"
        )
    return (mask > 0).view(_aligned_shape(mask, x)).expand(x.shape).contiguous()  # a broadcast mask is slow on the CPU


def valid_positions(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns which elements are valid: those that the mask marks and that are not NaN.

    Example:
        >>> valid_positions(torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([True, True, False]))
        tensor([ True, False, False])
    """
    if not (x.is_floating_point() or x.is_complex()):
        return torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    number = ~x.isnan()
    return number if mask is None else number.logical_and_(mask)


def before_padding(x: Tensor, padding: float = 0.0, dim: int = -1) -> Tensor:
    """Returns a mask of the positions up to the last element along an axis that is not padding.

    For ``mask=lambda batch: masks.before_padding(batch["x"])``, if the batch holds neither a mask nor lengths.

    Example:
        >>> before_padding(torch.tensor([[5.0, 0.0, 3.0, 0.0]]))
        tensor([[ True,  True,  True, False]])
    """
    signal = x != torch.tensor(padding, dtype=x.dtype, device=x.device)
    return signal.to(torch.uint8).flip(dim).cummax(dim).values.flip(dim).bool()


def _aligned_shape(mask: Tensor, x: Tensor) -> list[int]:
    """Returns the shape in which a mask broadcasts against ``x``."""
    missing = x.ndim - mask.ndim
    first = [*mask.shape, *[1] * missing]
    last = [*mask.shape[:1], *[1] * missing, *mask.shape[1:]]
    readings = {tuple(shape) for shape in (first, last) if missing >= 0 and _broadcasts(shape, x)}
    if not readings:
        raise ValueError(
            f"a mask must cover the first axes of the input, or the first and the last, got {describe(mask)} for {describe(x)}"
        )
    if len(readings) > 1:
        raise ValueError(
            f"the axes of the mask {describe(mask)} are ambiguous for {describe(x)}; add the missing axis, such as "
            "mask=lambda batch: mask.unsqueeze(-1) for (B, T) of (B, T, C), or mask.unsqueeze(1) for (B, T) of (B, C, T)"
        )
    return list(readings.pop())


def _broadcasts(shape: list[int], x: Tensor) -> bool:
    return all(n in (1, m) for n, m in zip(shape, x.shape, strict=True))
