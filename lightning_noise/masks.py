"""Masks and documents: which positions are valid, and which belong together in a packed row.

A packed row holds several documents, one after another. Each document of a row has a number of its own, at least 1.
Positions that no document covers have a negative number. Numbers have the shape :math:`(B, T)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_noise.batch import describe, is_sequence, resolve, select, select_one

__all__ = [
    "Mask",
    "Packing",
    "align_mask",
    "before_padding",
    "check_documents",
    "document_lengths",
    "find_documents",
    "find_mask",
    "find_masks",
    "in_documents",
    "number_documents",
    "position_ids",
    "valid_positions",
]

# a function of the batch or a leaf; in this order, because a configuration takes the first that fits
Mask = Callable[[Any], Any] | int | str


def find_mask(batch: Any, mask: Mask | None) -> Tensor | None:
    """Returns the mask of a batch: a leaf, or what a function of the batch returns.

    Example:
        >>> batch = {"x": torch.ones(2, 3), "lengths": torch.tensor([2, 3])}
        >>> find_mask(batch, lambda batch: torch.arange(3) < batch["lengths"][:, None])
        tensor([[ True,  True, False],
                [ True,  True,  True]])
    """
    return _find(batch, mask, "mask")


def find_documents(batch: Any, documents: Mask | None) -> Tensor | None:
    """Returns the documents of a batch, in the same way as :func:`find_mask`."""
    return _find(batch, documents, "documents")


def find_masks(batch: Any, mask: Mask | None) -> Tensor | list[Tensor] | None:
    """Returns the mask of a batch as :func:`find_mask` does, or a list with the mask of each sample.

    Example:
        >>> find_masks({"masks": [torch.ones(2), torch.ones(3)]}, "masks")
        [tensor([1., 1.]), tensor([1., 1., 1.])]
    """
    if mask is None:
        return None
    if isinstance(mask, int | str):
        if any(is_sequence(value) for _, value in resolve(batch, mask)):
            mask = f"{mask}.*"
        return list(select(batch, mask).values()) if "*" in str(mask).split(".") else find_mask(batch, mask)
    found: Any = mask(batch) if callable(mask) else None
    return list(found) if is_sequence(found) else find_mask(batch, mask if found is None else lambda batch: found)


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
    mask = mask.to(x.device)  # a function may make its mask on the CPU
    if mask.shape == x.shape:
        return mask > 0
    is_column = mask.shape[1:].numel() == 1 and 1 not in x.shape[1:]
    if mask.dtype != torch.bool and (mask.ndim == 1 or is_column):
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
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {x!r}; type mask=lambda batch: masks.before_padding(batch['x'])")
    signal = x != torch.tensor(padding, dtype=x.dtype, device=x.device)
    return signal.to(torch.uint8).flip(dim).cummax(dim).values.flip(dim).bool()


def position_ids(document_ids: Tensor) -> Tensor:
    """Returns the position of each element within its document, for ids of documents of shape (B, T).

    Example:
        >>> position_ids(torch.tensor([[7, 7, 7, 4, 4]]))
        tensor([[0, 1, 2, 0, 1]])
    """
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids.diff(dim=1) != 0
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return index - torch.where(begins, index, 0).cummax(1).values


def number_documents(documents: Tensor, x: Tensor) -> Tensor:
    r"""Returns the numbers of the documents, of shape :math:`(B, T)`, of packed rows of shape :math:`(B, T, *)`.

    Args:
        documents: The position ids, of shape :math:`(B, T)`, or the lengths of the documents of each row, of shape
            :math:`(B, D)` with :math:`D < T`. A length of 0 is no document.
        x: The packed rows.

    Example:
        >>> number_documents(torch.tensor([[2, 3, 0]]), torch.zeros(1, 6))
        tensor([[ 1,  1,  2,  2,  2, -4]])
        >>> number_documents(torch.tensor([[0, 1, 0, 1, 2, 3]]), torch.zeros(1, 6))
        tensor([[1, 1, 2, 2, 2, 2]])
    """
    _check_fit(documents, x)
    if documents.shape == x.shape[:2]:
        return torch.cat([torch.ones_like(documents[:, :1]), documents.diff(dim=1) != 1], 1).cumsum(1)
    ends = documents.cumsum(1)
    index = torch.arange(x.shape[1], device=ends.device).expand(x.shape[:2]).contiguous()
    numbers = torch.searchsorted(ends, index, right=True) + 1
    return torch.where(index < ends[:, -1:], numbers, -numbers)


def document_lengths(numbers: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the number of valid positions of the document of each position, for numbers and a mask of shape (B, T).

    Example:
        >>> document_lengths(torch.tensor([[1, 1, 2, 2, 2, -3]]))
        tensor([[2, 2, 3, 3, 3, 0]])
    """
    valid = numbers > 0 if mask is None else (numbers > 0) & mask
    counts = numbers.new_zeros(len(numbers), numbers.shape[1] + 1).scatter_add_(1, numbers.abs(), valid.to(numbers.dtype))
    return counts.gather(1, numbers.abs())


def check_documents(documents: Tensor, x: Tensor) -> None:
    """Raises a ValueError if documents are neither position ids nor lengths, which looks at all values."""
    _check_fit(documents, x)
    if documents.shape == x.shape[:2]:
        later = documents[:, 1:]
        if not ((later == 0) | (documents.diff(dim=1) == 1)).all():
            raise ValueError(
                f"documents of the shape of the rows must be position ids, which count from 0 in each document, got "
                f"{describe(documents)} with other values; if these are ids of documents, type "
                "documents=lambda batch: masks.position_ids(batch[…])"
            )
    elif (documents < 0).any() or (documents.sum(1) > x.shape[1]).any():
        raise ValueError(
            f"the lengths of the documents must be at least 0 and sum to at most {x.shape[1]} in each row, got sums from "
            f"{documents.sum(1).min().item()} to {documents.sum(1).max().item()}"
        )


@dataclass(frozen=True, eq=False)
class Packing:
    """Packed rows taken apart: each document becomes a row, which is filled up at its end.

    Args:
        document: The index of the document of each position of the rows, over all rows.
        position: The position within the document.
        rows: The row from which each document comes.
        length: The length of the longest document.

    Example:
        >>> packing = Packing.of(torch.tensor([[1, 1, 2, 2, 2, -3]]))
        >>> packing.unpack(torch.tensor([[5, 6, 7, 8, 9, 0]]))
        tensor([[5, 6, 0],
                [7, 8, 9],
                [0, 0, 0]])
    """

    document: Tensor
    position: Tensor
    rows: Tensor
    length: int

    @classmethod
    def of(cls, numbers: Tensor) -> Packing:
        """Returns the packing of documents with numbers of shape (B, T); it waits for the device to know the sizes."""
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[:, 1:] = numbers.diff(dim=1) != 0
        starts = begins.flatten().nonzero().squeeze(1)
        document = begins.flatten().cumsum(0) - 1
        position = torch.arange(numbers.numel(), device=numbers.device) - starts[document]
        return cls(document, position, starts // numbers.shape[1], int(position.max()) + 1)

    def unpack(self, x: Tensor) -> Tensor:
        """Returns a tensor of shape :math:`(B, T, *)` as documents, :math:`(n, length, *)`, with zeros at their ends."""
        documents = x.new_zeros(len(self.rows), self.length, *x.shape[2:])
        return documents.index_put((self.document, self.position), x.flatten(0, 1))

    def pack(self, documents: Tensor, x: Tensor) -> Tensor:
        """Returns documents as rows of the shape of ``x``."""
        return documents[self.document, self.position].view(x.shape)


def in_documents(noise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a noise that perturbs each document of packed rows as a series of its own.

    Its mask has the shape of ``x`` and holds the number of the document at valid elements, and minus the number at others.

    Example:
        >>> def start(x, level, *, generator, mask):
        ...     return torch.cat([x[:, :1] + level, x[:, 1:]], 1)
        >>> numbers = number_documents(torch.tensor([[2, 3]]), torch.zeros(1, 5))
        >>> in_documents(start)(torch.zeros(1, 5), 0.5, generator=torch.Generator(), mask=numbers)
        tensor([[0.5000, 0.0000, 0.5000, 0.0000, 0.0000]])
    """

    def perturb(x: Tensor, level: float | Tensor, *, generator: torch.Generator, mask: Tensor) -> Tensor:
        packing = Packing.of((mask.flatten(2)[..., 0] if mask.ndim > 2 else mask).abs())
        levels = level[packing.rows] if isinstance(level, Tensor) else level
        y = noise(packing.unpack(x), levels, generator=generator, mask=packing.unpack(mask > 0))
        return packing.pack(y, x)

    return perturb


def _find(batch: Any, selector: Mask | None, kind: str) -> Tensor | None:
    if selector is None:
        return None
    if isinstance(selector, int | str):
        return select_one(batch, selector, kind)
    if not callable(selector):
        raise TypeError(
            f"{kind} must be a leaf of the batch, such as {kind}='{kind}', or a function of the batch, got {describe(selector)}"
        )
    found = selector(batch)
    if not isinstance(found, Tensor):
        raise TypeError(f"{kind}=… must be a function that returns a tensor, got a function that returns {describe(found)}")
    return found


def _check_fit(documents: Tensor, x: Tensor) -> None:
    fits = documents.ndim == 2 and x.ndim >= 2 and len(documents) == len(x) and documents.shape[1] <= x.shape[1]
    if not fits or documents.is_floating_point() or documents.is_complex() or documents.dtype == torch.bool:
        raise ValueError(
            "documents must be position ids of shape (B, T) or lengths of shape (B, D) for inputs of shape (B, T, …), "
            f"got {describe(documents)} for {describe(x)}; for cumulative lengths of a single row, type "
            'documents=lambda batch: batch["cu_seqlens"].diff()[None]'
        )


def _aligned_shape(mask: Tensor, x: Tensor) -> list[int]:
    """Returns the shape in which a mask broadcasts against ``x``."""
    missing = x.ndim - mask.ndim
    first = [*mask.shape, *[1] * missing]
    last = [*mask.shape[:1], *[1] * missing, *mask.shape[1:]]
    readings = {tuple(shape) for shape in (first, last) if missing >= 0 and _broadcasts(shape, x)}
    if not readings:
        raise ValueError(
            f"a mask must cover the first axes of the input, or the first and the last, got {describe(mask)} for {describe(x)}"
            f"; type mask=lambda batch: …, such as of shape {tuple(x.shape[:2])}, and another callback for inputs without mask"
        )
    if len(readings) > 1:
        raise ValueError(
            f"the axes of the mask {describe(mask)} are ambiguous for {describe(x)}; add the missing axis, such as "
            "mask=lambda batch: mask.unsqueeze(-1) for (B, T) of (B, T, C), or mask.unsqueeze(1) for (B, T) of (B, C, T)"
        )
    return list(readings.pop())


def _broadcasts(shape: list[int], x: Tensor) -> bool:
    return all(n in (1, m) for n, m in zip(shape, x.shape, strict=True))
