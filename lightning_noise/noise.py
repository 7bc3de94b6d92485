r"""Noise as a value: a distribution around a tensor, with the amount left open.

A noise maps a tensor :math:`x` and a level to a perturbed copy of :math:`x`. The level is the one number that is scheduled,
and always an amplitude: 0 is no noise and more is more. Where the randomness comes from is the caller's business, so a noise
has no state, compares by its fields and can be used in any place and in any order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Gaussian", "Impulse", "Noise", "Speckle", "Uniform"]


class Noise(ABC):
    r"""A random map of a tensor onto a tensor of the same shape, dtype, device and memory format.

    Calling it returns a new tensor, ``x`` itself at level 0, and never writes to ``x``. Half precision is perturbed in float32
    and rounded once, at the end. A subclass is a frozen dataclass that implements :meth:`perturb`; any callable with the
    signature of :meth:`__call__` serves as a noise, too.

    Attributes:
        severities: The five levels that the literature tests with, for data in [0, 1].
        additive: Whether the level is in the units of the data, so that it can be given relative to their standard deviation.
        max_level: The largest level that has a meaning.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> generator = torch.Generator().manual_seed(0)
        >>> Gaussian()(x, 0.1, generator=generator).shape
        torch.Size([2, 3])
        >>> Gaussian()(x, 0.0, generator=generator) is x
        True
    """

    severities: ClassVar[tuple[float, ...]] = ()
    additive: ClassVar[bool] = False
    max_level: ClassVar[float] = math.inf

    def __call__(self, x: Tensor, level: float | Tensor, *, generator: torch.Generator) -> Tensor:
        r"""Perturbs ``x`` of shape :math:`(B, *)`.

        Args:
            x: A floating-point tensor.
            level: The amount, a number or a tensor of shape :math:`(B,)` with a level for each sample. Row ``i`` of
                ``noise(x, levels)`` equals row ``i`` of ``noise(x, levels[i])`` from the same state of the generator.
            generator: The source of randomness, on the device of ``x``.
        """
        # bfloat16 has 256 numbers in [0.5, 1): too few to draw from
        dtype = torch.promote_types(x.dtype, torch.float32)
        if isinstance(level, Tensor):
            level = column(level.to(dtype), x)
        elif check_level(level, self.max_level) == 0:
            return x
        # contiguous: the draw of an element must not depend on the memory format
        y = self.perturb(x.to(dtype).contiguous(), level, generator).to(x.dtype)
        return y if x.is_contiguous() else torch.empty_like(x).copy_(y)

    @abstractmethod
    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator) -> Tensor:
        """Returns a perturbed copy of ``x``, which is contiguous and at least in float32 here.

        Args:
            x: The tensor, which may be the caller's own: it must not be written to.
            level: A positive number, or a tensor that broadcasts against ``x`` and may hold zeros.
            generator: The only source of randomness.
        """


def check_level(level: float, max_level: float = math.inf) -> float:
    """Returns the level as a float, or raises an error where it is no number, negative, not finite or above the largest."""
    if isinstance(level, str | bytes | bool) or not hasattr(level, "__float__"):
        raise TypeError(f"a level must be a number, got {level!r}")
    level = float(level)
    if not (0 <= level <= max_level and math.isfinite(level)):
        wanted = "finite and not negative" if max_level == math.inf else f"in [0, {max_level:g}]"
        raise ValueError(f"a level must be {wanted}, got {level}")
    return level


def column(values: Tensor, x: Tensor) -> Tensor:
    """Returns the values of the samples, of shape (B,), in the shape that broadcasts against ``x``."""
    return values.view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Gaussian(Noise):
    r"""Adds independent Gaussian noise to each element.

    .. math:: y = x + \sigma \epsilon, \quad \epsilon \sim \mathcal{N}(0, I)

    The mean is preserved and the variance is :math:`\sigma^2`. The level is the standard deviation :math:`\sigma \geq 0` in the
    units of the data; ImageNet-C uses 0.08 to 0.38 on pixels in [0, 1], and training with 0.5 there gave the best robustness of
    the second paper. Nothing is clipped here: a clipped Gaussian has another mean and variance.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261

        A Simple Way to Make Neural Networks Robust Against Diverse Image Corruptions (Rusak et al., 2020),
        https://arxiv.org/abs/2001.06057

    Example:
        >>> x = torch.zeros(100_000)
        >>> y = Gaussian()(x, 0.5, generator=torch.Generator().manual_seed(0))
        >>> round(y.std().item(), 2)
        0.5
    """

    severities: ClassVar[tuple[float, ...]] = (0.08, 0.12, 0.18, 0.26, 0.38)
    additive: ClassVar[bool] = True

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator) -> Tensor:
        return torch.empty_like(x).normal_(generator=generator).mul_(level).add_(x)


@dataclass(frozen=True)
class Uniform(Noise):
    r"""Adds independent uniform noise to each element.

    .. math:: y = x + a u, \quad u \sim \mathcal{U}(-1, 1)

    The mean is preserved, the variance is :math:`a^2 / 3` and no element moves by more than :math:`a`. The level is the
    half-width :math:`a \geq 0` in the units of the data; :math:`a = \sqrt{3} \sigma` matches the variance of
    :class:`Gaussian`, and so do the severities.

    Example:
        >>> y = Uniform()(torch.zeros(1000), 0.5, generator=torch.Generator().manual_seed(0))
        >>> bool((y.abs() <= 0.5).all())
        True
    """

    severities: ClassVar[tuple[float, ...]] = (0.14, 0.21, 0.31, 0.45, 0.66)
    additive: ClassVar[bool] = True

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator) -> Tensor:
        return torch.empty_like(x).uniform_(-1, 1, generator=generator).mul_(level).add_(x)


@dataclass(frozen=True)
class Speckle(Noise):
    r"""Scales each element by an independent Gaussian factor.

    .. math:: y = x \, (1 + \sigma \epsilon), \quad \epsilon \sim \mathcal{N}(0, I)

    The mean is preserved and the variance is :math:`\sigma^2 x^2`, so zeros stay zero. The level is the relative standard
    deviation :math:`\sigma \geq 0`; ImageNet-C uses 0.15 to 0.6.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261

    Example:
        >>> Speckle()(torch.zeros(3), 0.5, generator=torch.Generator())
        tensor([0., 0., 0.])
    """

    severities: ClassVar[tuple[float, ...]] = (0.15, 0.2, 0.35, 0.45, 0.6)

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator) -> Tensor:
        return torch.empty_like(x).normal_(generator=generator).mul_(level).add_(1).mul_(x)


@dataclass(frozen=True)
class Impulse(Noise):
    r"""Sets a share of the elements to the lowest or the highest value: salt and pepper.

    .. math:: y = \begin{cases} \text{low} & u < p / 2 \\ \text{high} & u \geq 1 - p / 2 \\ x & \text{else} \end{cases}
        \quad u \sim \mathcal{U}(0, 1)

    The mean is :math:`(1 - p) x + p \, (\text{low} + \text{high}) / 2`. The level is the share :math:`p \in [0, 1]` of the
    elements; ImageNet-C uses 0.03 to 0.27.

    Args:
        low: The value of pepper; left out, the smallest of the sample, which suits normalised data.
        high: The value of salt; left out, the largest of the sample.

    Raises:
        ValueError: The level is above 1, or ``low`` or ``high`` is left out and a sample is a single number.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261

    Example:
        >>> x = torch.full((1000,), 0.5)
        >>> y = Impulse(low=0.0, high=1.0)(x, 0.2, generator=torch.Generator().manual_seed(0))
        >>> y.unique()
        tensor([0.0000, 0.5000, 1.0000])
    """

    low: float | None = None
    high: float | None = None

    severities: ClassVar[tuple[float, ...]] = (0.03, 0.06, 0.09, 0.17, 0.27)
    max_level: ClassVar[float] = 1.0

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator) -> Tensor:
        u = torch.empty_like(x).uniform_(generator=generator)
        low = _sample_extreme(x, torch.amin) if self.low is None else self.low
        high = _sample_extreme(x, torch.amax) if self.high is None else self.high
        return torch.where(u < level / 2, low, x).where(u < 1 - level / 2, high)


def _sample_extreme(x: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    if x.ndim < 2:
        raise ValueError(f"a sample of one number has no range, got shape {tuple(x.shape)}; give low and high")
    return column(reduce(x.flatten(1), 1), x)
