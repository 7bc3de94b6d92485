"""Noises that perturb each element alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_noise._checks import check_finite
from lightning_noise._tensor import (
    add_scaled,
    column,
    is_differentiated,
    is_fast_as_bits,
    number_like,
    valid_part,
    zero_invalid_,
)
from lightning_noise.noise.base import Noise, find_valid
from lightning_noise.noise.draws import draw_bits, draw_normal, draw_uniform, fuse, is_fused, last_bits

__all__ = ["Gaussian", "Impulse", "Rician", "Shot", "Speckle", "Uniform"]


@dataclass(frozen=True)
class Gaussian(Noise):
    r"""Adds independent Gaussian noise to each element.

    .. math:: y = x + \sigma \epsilon, \quad \epsilon \sim \mathcal{N}(0, I)

    The mean is preserved and the variance is :math:`\sigma^2`. The level is the standard deviation :math:`\sigma \geq 0` in the
    units of the data. On pixels in [0, 1], ImageNet-C uses 0.08 to 0.38; training with 0.5 gave the best robustness in the
    second paper. The result is not clipped, because clipping changes the mean and the variance.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261

        A Simple Way to Make Neural Networks Robust Against Diverse Image Corruptions (Rusak et al., 2020),
        https://arxiv.org/abs/2001.06057

    Example:
        >>> y = Gaussian()(torch.zeros(100_000), 0.5, generator=torch.Generator().manual_seed(0))
        >>> round(y.std().item(), 2)
        0.5
    """

    severities: ClassVar[tuple[float, ...]] = (0.08, 0.12, 0.18, 0.26, 0.38)
    unit: ClassVar[str] = "standard deviation"
    elementwise: ClassVar[bool] = True
    independent_rows: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    keeps_invalid: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True
    takes_half: ClassVar[bool] = True

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        if is_fused(x, level):
            return fuse("normal", "add", x, generator, mask, level)
        return add_scaled(x, draw_normal(x, generator), level, mask)


@dataclass(frozen=True)
class Uniform(Noise):
    r"""Adds independent uniform noise to each element.

    .. math:: y = x + a u, \quad u \sim \mathcal{U}(-1, 1)

    The mean is preserved, the variance is :math:`a^2 / 3`, and no element moves by more than :math:`a`. The level is the
    half-width :math:`a \geq 0` in the units of the data. At :math:`a = \sqrt{3} \sigma` the variance is that of
    :class:`Gaussian`, as for the severities.

    Example:
        >>> y = Uniform()(torch.zeros(1000), 0.5, generator=torch.Generator().manual_seed(0))
        >>> bool((y.abs() <= 0.5).all())
        True
    """

    severities: ClassVar[tuple[float, ...]] = (0.14, 0.21, 0.31, 0.45, 0.66)
    unit: ClassVar[str] = "half-width"
    elementwise: ClassVar[bool] = True
    independent_rows: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    keeps_invalid: ClassVar[bool] = True
    takes_half: ClassVar[bool] = True

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        if is_fused(x, level):
            return fuse("uniform", "add", x, generator, mask, level)
        return add_scaled(x, draw_uniform(x, generator), level, mask)


@dataclass(frozen=True)
class Speckle(Noise):
    r"""Scales each element by an independent Gaussian factor.

    .. math:: y = x \, (1 + \sigma \epsilon), \quad \epsilon \sim \mathcal{N}(0, I)

    The mean is preserved and the variance is :math:`\sigma^2 x^2`, so zeros stay zero. The level is the relative standard
    deviation :math:`\sigma \geq 0`. ImageNet-C uses 0.15 to 0.6.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261

    Example:
        >>> Speckle()(torch.zeros(3), 0.5, generator=torch.Generator())
        tensor([0., 0., 0.])
    """

    severities: ClassVar[tuple[float, ...]] = (0.15, 0.2, 0.35, 0.45, 0.6)
    unit: ClassVar[str] = "relative standard deviation"
    elementwise: ClassVar[bool] = True
    independent_rows: ClassVar[bool] = True
    keeps_invalid: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True
    takes_half: ClassVar[bool] = True

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        if is_fused(x, level):
            return fuse("normal", "scale", x, generator, mask, level)
        return zero_invalid_(draw_normal(x, generator), mask).mul_(level).add_(1).mul_(x)


@dataclass(frozen=True, kw_only=True)
class Impulse(Noise):
    r"""Sets elements to the lowest or highest value: salt-and-pepper noise.

    .. math:: y = \begin{cases} \text{low or high, each with probability } 1/2 & u < p \\ x & \text{else} \end{cases}
        \quad u \sim \mathcal{U}(0, 1)

    The mean is :math:`(1 - p) x + p \, (\text{low} + \text{high}) / 2`. The level is the share :math:`p \in [0, 1]` of
    elements. ImageNet-C uses 0.03 to 0.27.

    Args:
        low: The value of pepper. Default: the smallest value of the sample, which suits normalized data.
        high: The value of salt. Default: the largest value of the sample.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261

    Example:
        >>> x = torch.full((1000,), 0.5)
        >>> Impulse(low=0.0, high=1.0)(x, 0.2, generator=torch.Generator().manual_seed(0)).unique()
        tensor([0.0000, 0.5000, 1.0000])
    """

    low: float | None = None
    high: float | None = None

    severities: ClassVar[tuple[float, ...]] = (0.03, 0.06, 0.09, 0.17, 0.27)
    unit: ClassVar[str] = "share of elements"
    independent_rows: ClassVar[bool] = True
    max_level: ClassVar[float] = 1.0
    keeps_invalid: ClassVar[bool] = True
    takes_half: ClassVar[bool] = True

    def __post_init__(self):
        check_finite(low=self.low, high=self.high)
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low must not be above high, got low={self.low} and high={self.high}")

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        low, high, is_kernel = self.low, self.high, is_fused(x, level)
        if not is_kernel or low is None or high is None:  # the kernel itself finds NaN
            mask = find_valid(x, mask)
        if low is None or high is None:
            candidates = _fill_invalid(x, mask)
            low = column(candidates.amin(1), x) if low is None else low
            high = column(candidates.amax(1), x) if high is None else high
        # the size of the integer says whether an element is hit, and its lowest bit chooses the value
        if is_kernel:
            return fuse("bits", "replace", x, generator, mask, last_bits(level), low, high)
        low, high = (bound if isinstance(bound, Tensor) else number_like(bound, x) for bound in (low, high))
        bits, last = draw_bits(x, generator), last_bits(level)
        if not is_fast_as_bits(x):
            hit = bits <= last if mask is None else (bits <= last).logical_and_(mask)
            return torch.where(hit, torch.where(bits.bitwise_and_(1).bool(), high, low), x)
        low, high = low.view(torch.int32), high.view(torch.int32)
        value = bits.bitwise_and(1).mul_(low ^ high).bitwise_xor_(low)
        hit = bits.le_(last) if mask is None else bits.le_(last).mul_(mask.view(torch.uint8))
        return value.bitwise_xor_(x.view(torch.int32)).mul_(hit).bitwise_xor_(x.view(torch.int32)).view(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Shot(Noise):
    r"""Replaces an intensity by a count of events: Poisson noise, like that of photons.

    .. math:: y = \frac{\lambda}{s} k, \quad k \sim \mathrm{Poisson}\left(\frac{s x}{\lambda}\right)

    The mean is preserved and the variance is :math:`\lambda x / s`, so zeros stay zero. With a scale of 1, the level
    :math:`\lambda \geq 0` is the inverse of the number of events at :math:`x = 1`. ImageNet-C uses 1/60 to 1/3 on pixels in
    [0, 1].

    Negative data are a ValueError. A Poisson draw consumes a number of random numbers that depends on its mean. So with a level
    for each sample, a sample has the same distribution as alone but not the same draw.

    Args:
        scale: Events per unit of the data at level 1, :math:`s`. Use 1 for data in [0, 1] and for counts, which level 1 draws
            anew, and 1/255 for pixels up to 255.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261

    Example:
        >>> x = torch.full((100_000,), 0.5)
        >>> y = Shot()(x, 1 / 5, generator=torch.Generator().manual_seed(0))
        >>> round(y.mean().item(), 2), round(y.var().item(), 2)
        (0.5, 0.1)
    """

    scale: float = 1.0

    severities: ClassVar[tuple[float, ...]] = (1 / 60, 1 / 25, 1 / 12, 1 / 5, 1 / 3)
    unit: ClassVar[str] = "1 / events at value 1"
    elementwise: ClassVar[bool] = True
    cuts_gradient: ClassVar[bool] = True

    def __post_init__(self):
        check_finite(scale=self.scale)
        if self.scale <= 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        x = valid_part(x, mask)
        smallest, largest = x.detach().aminmax()
        _check_not_negative(self, smallest)
        gain = level / self.scale if isinstance(level, Tensor) else number_like(level / self.scale, x)
        mean = x.detach() / gain
        # beyond 2^30, the noise is below 1/32768 of x and counts do not fit everywhere; a level of 0 has an infinite mean
        if largest / gain.amin() < 2.0**30 and not is_differentiated(x):
            return torch.poisson(mean, generator=generator).mul_(gain)
        countable = mean < 2.0**30
        counts = torch.poisson(torch.where(countable, mean, 0.0), generator=generator)
        return torch.where(countable, counts.mul_(gain), x)


@dataclass(frozen=True)
class Rician(Noise):
    r"""Takes the magnitude of a signal with Gaussian noise in two channels, as magnetic resonance images do.

    .. math:: y = \sqrt{(x + \sigma \epsilon_1)^2 + (\sigma \epsilon_2)^2}, \quad \epsilon_1, \epsilon_2 \sim \mathcal{N}(0, I)

    The result is positive. The mean of :math:`y^2` is :math:`x^2 + 2 \sigma^2`. So noise brightens the dark background, whose
    mean becomes :math:`\sigma \sqrt{\pi / 2}`. In bright parts, the noise is about that of :class:`Gaussian`. The level is the
    standard deviation :math:`\sigma \geq 0` of each channel, in the units of the data. Denoising is usually tested with 1 to 9
    percent of the brightest tissue. Negative data are a ValueError.

    References:
        The Rician Distribution of Noisy MRI Data (Gudbjartsson and Patz, 1995), https://doi.org/10.1002/mrm.1910340618

        Design and Construction of a Realistic Digital Brain Phantom (Collins et al., 1998), https://doi.org/10.1109/42.712135

    Example:
        >>> y = Rician()(torch.zeros(100_000), 0.1, generator=torch.Generator().manual_seed(0))
        >>> round(y.square().mean().item(), 3)
        0.02
    """

    severities: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.05, 0.07, 0.09)
    unit: ClassVar[str] = "standard deviation of each channel"
    elementwise: ClassVar[bool] = True
    independent_rows: ClassVar[bool] = True

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        _check_not_negative(self, valid_part(x, mask).detach().amin())
        real, imaginary = (torch.empty_like(x).normal_(generator=generator).mul_(level) for _ in range(2))
        if isinstance(level, Tensor):  # at level 0, the magnitude of 0 has no gradient
            imaginary = torch.where(level > 0, imaginary, 1.0)
        y = torch.hypot(real.add_(x), imaginary, out=None if is_differentiated(x) else real)
        return torch.where(level > 0, y, x) if isinstance(level, Tensor) else y


def _check_not_negative(noise: Noise, smallest: Tensor) -> None:
    """Raises a ValueError if data are negative. Waits for the device, but the result would be silently wrong."""
    if smallest < 0:
        raise ValueError(
            f"{noise.title} needs data that are not negative, got a minimum of {smallest.item():g}; for normalized data type "
            "mean=… and std=… as in the normalization, or normalize in the forward of the module"
        )


def _fill_invalid(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the elements of each sample, with the first valid one instead of each invalid one."""
    if x.ndim < 2:
        raise ValueError(
            f"Impulse needs samples of several numbers to find low and high, got shape {tuple(x.shape)}; give low and high"
        )
    x = x.flatten(1)
    if mask is None:
        return x
    mask = mask.flatten(1)
    return torch.where(mask, x, x.gather(1, mask.view(torch.uint8).argmax(1, keepdim=True)))
