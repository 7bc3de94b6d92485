"""Noises along an axis or at a level of the signal: of series, audio and sensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_noise._checks import check_finite, check_flags
from lightning_noise._tensor import (
    add_scaled,
    column,
    count_valid,
    over_norm,
    row_norms,
    valid_part,
    validate_axis,
    zero_invalid_,
)
from lightning_noise.noise.base import Noise, check_axes, find_valid
from lightning_noise.noise.elementwise import Gaussian

__all__ = ["SNR", "ColoredNoise", "Drift", "Scaling", "add_at_ratio"]


@dataclass(frozen=True, kw_only=True)
class SNR(Noise):
    r"""Adds Gaussian noise to each sample at an exact signal-to-noise ratio.

    .. math:: y = x + a \frac{\lVert x \rVert}{\lVert \epsilon \rVert} \epsilon, \quad \epsilon \sim \mathcal{N}(0, I)

    Each draw is normalized, so :math:`10 \log_{10} \lVert x \rVert^2 / \lVert y - x \rVert^2` is exactly
    :math:`-20 \log_{10} a` for each sample. A silent sample stays silent. The level is the relative amplitude
    :math:`a \geq 0`: give ``schedules.from_snr_db(20)`` for 20 decibels. The severities are those of Aurora-2: 20, 15, 10, 5
    and 0 decibels.

    Args:
        center: Whether the signal is measured around the mean of each sample. Use this for images, where the mean is most of
            the power.

    References:
        The Aurora Experimental Framework (Hirsch and Pearce, 2000), https://www.isca-archive.org/asr_2000/hirsch00_asr.html

    Example:
        >>> x = torch.rand(4, 16_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> y = SNR()(x, 0.1, generator=torch.Generator().manual_seed(1))
        >>> 20 * torch.log10(x.norm(dim=1) / (y - x).norm(dim=1))
        tensor([20.0000, 20.0000, 20.0000, 20.0000], dtype=torch.float64)
    """

    center: bool = False

    severities: ClassVar[tuple[float, ...]] = tuple(10 ** (-snr_db / 20) for snr_db in (20, 15, 10, 5, 0))
    unit: ClassVar[str] = "noise-to-signal amplitude"
    level_usage: ClassVar[str] = "schedules.from_snr_db({})"
    independent_rows: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True
    keeps_invalid: ClassVar[bool] = True

    def __post_init__(self):
        check_flags(center=self.center)

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        check_axes(self, x, 1)
        mask = find_valid(x, mask)
        return add_at_ratio(x, torch.empty_like(x).normal_(generator=generator), level, mask, self.center)


@dataclass(frozen=True, kw_only=True)
class ColoredNoise(Noise):
    r"""Adds noise with a power-law spectrum along an axis.

    .. math:: y = x + \sigma \frac{n}{\sqrt{\overline{n^2}}}, \quad
        \hat{n}_f \sim f^{-\beta / 2} \, \mathcal{N}_{\mathbb{C}}(0, 1), \quad \hat{n}_0 = 0

    The noise of each series has mean 0 and a root mean square of exactly :math:`\sigma \geq 0`. The level is :math:`\sigma` in
    the units of the data; the severities are those of :class:`Gaussian`. The power spectrum falls by :math:`3.01 \beta`
    decibels per octave: :math:`\beta` = 0 is white, 1 pink (flicker of electronics, background in audio), 2 brown (a drift), -1
    blue, and -2 violet. For a signal-to-noise ratio, use ``relative="std"`` with ``schedules.from_snr_db``.

    With a mask, mean and root mean square are those of the noise at valid elements. A short series gets a stretch of the noise
    of the whole axis, which may have a trend, and time goes on in gaps. A series with one valid element does not change.

    Args:
        exponent: The slope :math:`\beta`.
        dim: The axis of time, counted from the end: -1 for :math:`(B, C, T)` and -2 for :math:`(B, T, C)`.

    References:
        On Generating Power Law Noise (Timmer and König, 1995), https://ui.adsabs.harvard.edu/abs/1995A%26A...300..707T

    Example:
        >>> y = ColoredNoise(exponent=1.0)(torch.zeros(2, 1000), 0.5, generator=torch.Generator().manual_seed(0))
        >>> y.square().mean(1).sqrt()
        tensor([0.5000, 0.5000])
    """

    exponent: float = 1.0
    dim: int = -1

    severities: ClassVar[tuple[float, ...]] = Gaussian.severities
    unit: ClassVar[str] = "root mean square"
    independent_rows: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True
    keeps_invalid: ClassVar[bool] = True

    def __post_init__(self):
        check_finite(exponent=self.exponent)
        object.__setattr__(self, "dim", validate_axis(self.dim))

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        check_axes(self, x, -self.dim)
        mask = find_valid(x, mask)
        valid, length = None if mask is None else mask.movedim(self.dim, -1).contiguous(), x.shape[self.dim]
        noise = zero_invalid_(self._draw(x, generator), valid)
        n = count_valid(valid, noise, -1)
        if mask is not None:  # a part of the series does not have mean 0
            mean = noise.sum(-1, keepdim=True) / n
            noise = zero_invalid_(noise.sub_(torch.where(n < length, mean, 0.0)), valid)
        norm = torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
        gain = over_norm(n.sqrt(), norm)  # one valid element has no noise, and a series of two may draw an exact 0
        noise, gain = noise.movedim(-1, self.dim).contiguous(), gain.movedim(-1, self.dim)
        return add_scaled(x, noise, gain * level, mask)

    def _draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns noise with the spectrum and mean 0, at any amplitude, for ``x`` with the axis of time at the end."""
        n = x.shape[self.dim]
        if n < 2:
            raise ValueError(
                f"ColoredNoise needs at least two elements along axis {self.dim}, got shape {tuple(x.shape)}; type dim=-2 for "
                "series of shape (B, T, C), or dim=-1 for (B, C, T)"
            )
        half, real = n // 2 + 1, x.dtype.to_real()
        shape = [*[2] * x.is_complex(), *x.movedim(self.dim, -1).shape[:-1], half]
        z = torch.empty([*shape, 2], dtype=real, device=x.device).normal_(generator=generator)
        frequency = torch.arange(half, dtype=real, device=x.device)
        strongest = 1 if self.exponent > 0 else half - 1  # amplitudes are relative to the strongest, so they cannot overflow
        amplitude = frequency.div_(strongest) ** (-self.exponent / 2)
        amplitude[0] = 0
        if n % 2 == 0:
            amplitude[-1] *= math.sqrt(2)  # the highest frequency is real: one number carries the power of two
        noise = torch.fft.irfft(torch.view_as_complex(z).mul_(amplitude), n)
        return torch.complex(noise[0], noise[1]) if x.is_complex() else noise


@dataclass(frozen=True, kw_only=True)
class Drift(Noise):
    r"""Adds a random walk along an axis, like that of a drifting sensor.

    .. math:: y_t = x_t + \frac{\sigma}{\sqrt{T}} \sum_{s=1}^{t} \epsilon_s, \quad \epsilon_s \sim \mathcal{N}(0, 1)

    The mean is preserved and the variance is :math:`\sigma^2 t / T`. The level is the standard deviation
    :math:`\sigma \geq 0` at the end of the series, in the units of the data. At the same level, the noise of a series has half
    the power of :class:`Gaussian`, so the severities are :math:`\sqrt{2}` times as high. :class:`ColoredNoise` with exponent 2
    is a walk that returns to its start.

    With a mask, :math:`t` and :math:`T` count valid elements, so the walk stands still in gaps.

    Args:
        dim: The axis of time, counted from the end: -1 for :math:`(B, C, T)` and -2 for :math:`(B, T, C)`.

    References:
        An Introduction to Inertial Navigation (Woodman, 2007), https://doi.org/10.48456/tr-696

    Example:
        >>> y = Drift()(torch.zeros(100_000, 4), 0.5, generator=torch.Generator().manual_seed(0))
        >>> y.std(0).round(decimals=2)
        tensor([0.2500, 0.3500, 0.4300, 0.5000])
    """

    dim: int = -1

    severities: ClassVar[tuple[float, ...]] = (0.11, 0.17, 0.25, 0.37, 0.54)
    unit: ClassVar[str] = "standard deviation at the end"
    independent_rows: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True
    keeps_invalid: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "dim", validate_axis(self.dim))

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        check_axes(self, x, -self.dim)
        mask = find_valid(x, mask)
        steps = zero_invalid_(torch.empty_like(x).normal_(generator=generator), mask)
        return add_scaled(x, steps.cumsum_(self.dim), level * count_valid(mask, x, self.dim).rsqrt_(), mask)


@dataclass(frozen=True, kw_only=True)
class Scaling(Noise):
    r"""Scales each series by a Gaussian factor, as sensors of different gain do.

    .. math:: y_t = x_t \, (1 + \sigma \epsilon), \quad \epsilon \sim \mathcal{N}(0, 1)

    Each channel of each sample has its own factor. Mean, variance and level are those of :class:`Speckle`. The paper uses 0.1,
    the first severity.

    Args:
        dim: The axis of time, counted from the end: -1 for :math:`(B, C, T)` and -2 for :math:`(B, T, C)`.

    References:
        Data Augmentation of Wearable Sensor Data for Parkinson's Disease Monitoring using Convolutional Neural Networks (Um et
        al., 2017), https://arxiv.org/abs/1706.00527

    Example:
        >>> y = Scaling()(torch.ones(2, 3), 0.1, generator=torch.Generator().manual_seed(0))
        >>> bool((y == y[:, :1]).all())
        True
    """

    dim: int = -1

    severities: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.3, 0.4, 0.5)
    unit: ClassVar[str] = "standard deviation of the factor"
    independent_rows: ClassVar[bool] = True
    keeps_invalid: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "dim", validate_axis(self.dim))

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        check_axes(self, x, -self.dim)
        factor = torch.empty_like(x.narrow(self.dim, 0, 1), memory_format=torch.contiguous_format)
        y = factor.normal_(generator=generator).mul_(level).add_(1) * x
        return y if mask is None else torch.where(mask, y, x)


def add_at_ratio(x: Tensor, noise: Tensor, ratio: float | Tensor, mask: Tensor | None, center: bool = False) -> Tensor:
    """Returns ``x`` plus noise whose norm is a ratio of the norm of each sample, in the memory of the noise.

    The norms are those of valid elements. With ``center``, the norm of a sample is that around its mean.
    """
    noise = zero_invalid_(noise, mask)
    flat, valid = x.flatten(1), None if mask is None else mask.flatten(1)
    signal = valid_part(flat, valid)
    if center:
        mean = signal.sum(1, keepdim=True) / count_valid(valid, flat, -1)
        signal = valid_part(flat - mean, valid)
    gain = column(over_norm(row_norms(signal), row_norms(noise.flatten(1))), x)  # silence is not amplified
    return add_scaled(x, noise, gain * ratio, mask)
