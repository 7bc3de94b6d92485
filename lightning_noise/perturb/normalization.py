"""The normalization of the data, so that levels and bounds are in raw units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_noise._checks import plain
from lightning_noise._tensor import at_least_float32

__all__ = ["Normalization", "normalization_of", "per_channel"]

Numbers = float | Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Normalization:
    r"""The normalization of the data, :math:`x = (r - \mu) / \sigma`.

    Args:
        mean: The mean :math:`\mu`: a number, or a list with a number for each channel, which is axis 1 or the last axis. A
            nested list broadcasts against a sample: ``[[1, 2]]`` has the channels last, ``[[1], [2]]`` first.
        std: The deviation :math:`\sigma`, in the same form.

    Example:
        >>> Normalization(0.5, 0.25).restore(torch.tensor([[-2.0, 2.0]]))
        tensor([[0., 1.]])
    """

    mean: Numbers = 0.0
    std: Numbers = 1.0

    def __post_init__(self):
        for name in ("mean", "std"):
            value = plain(getattr(self, name))
            try:
                numbers = torch.as_tensor(value, dtype=torch.float64)
                valid = numbers.ndim <= 2 and numbers.numel() and numbers.isfinite().all()
                if not valid or (name == "std" and (numbers <= 0).any()):
                    raise ValueError("not in range")
            except (TypeError, ValueError, RuntimeError) as error:
                form = "a positive number, or a list with one" if name == "std" else "a number, or a list with a number"
                raise ValueError(f"{name} must be {form} for each channel, got {value!r}") from error
            object.__setattr__(self, name, numbers.tolist())

    def restore(self, x: Tensor) -> Tensor:
        """Returns the raw values of normalized data of shape (B, *), in at least float32.

        What is smaller than the rounding error of its normalization is 0, so that a black pixel is not negative.
        """
        y = at_least_float32(x)
        scaled, mean = y * per_channel("std", self.std, y), per_channel("mean", self.mean, y)
        raw = scaled + mean
        eps = max(torch.finfo(dtype).eps for dtype in (x.dtype, torch.float32))  # data are seldom normalized in float64
        return raw.masked_fill_(raw.abs() <= 2 * eps * scaled.abs_(), 0.0)

    def normalize(self, raw: Tensor, before: Tensor, x: Tensor) -> Tensor:
        """Returns raw values as normalized data; those that are equal to the values before are exactly those of ``x``."""
        y = (raw - per_channel("mean", self.mean, raw)).div_(per_channel("std", self.std, raw)).to(x.dtype)
        return torch.where(raw == before, x, y)


def normalization_of(mean: Numbers | None, std: Numbers | None) -> Normalization | None:
    """Returns the normalization of optional arguments, or ``None`` if the data are not normalized."""
    if mean is None and std is None:
        return None
    return Normalization(0.0 if mean is None else mean, 1.0 if std is None else std)


def per_channel(name: str, value: Numbers, x: Tensor) -> float | Tensor:
    """Returns a number, or the numbers of the channels in the shape that broadcasts against ``x`` of shape (B, *).

    Raises:
        ValueError: If the channels fit neither axis 1 nor the last axis, or both.
    """
    if not isinstance(value, Sequence):
        return value
    numbers = torch.tensor(value, dtype=x.dtype).to(x.device, non_blocking=True)
    if numbers.ndim > 1:
        return numbers
    n = len(numbers)
    dims = [dim for dim in {1, x.ndim - 1} if 0 < dim < x.ndim and x.shape[dim] == n]
    if not dims:
        raise ValueError(
            f"{name} is given for {n} channels, but the input is of shape {tuple(x.shape)}; give one number, or a number for "
            "each channel, which is axis 1 or the last axis"
        )
    if len(dims) > 1:
        first, last = [[number] for number in numbers.tolist()], [numbers.tolist()]
        raise ValueError(
            f"{name} is given for {n} channels, which may be axis 1 or the last axis of an input of shape {tuple(x.shape)}; "
            f"type {name}={last} for channels last, or {name}={first} for channels first"
        )
    return numbers.view([-1 if dim == dims[0] else 1 for dim in range(1, x.ndim)])
