"""Noises of sensors that sample a signal: a coarse converter and an unsteady clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_noise._tensor import column, is_differentiated, number_like, validate_axis
from lightning_noise.noise.base import Noise, check_axes

__all__ = ["Jitter", "Quantization"]


@dataclass(frozen=True)
class Quantization(Noise):
    r"""Rounds to steps, as a sensor of few bits does.

    .. math:: y = \Delta \left\lfloor \frac{x}{\Delta} + u \right\rceil - \Delta u, \quad u \sim \mathcal{U}(0, 1)

    Each sample has its own :math:`u`, because the zero of a converter is not known. So a sample has values on one grid, and
    the error of an element is uniform in :math:`[-\Delta / 2, \Delta / 2]`. The mean is preserved and the variance is
    :math:`\Delta^2 / 12`. The level is the step :math:`\Delta \geq 0` in the units of the data. The severities are those of 5
    bits to 1 bit for data in [0, 1]. The gradient is that of the identity.

    References:
        Spectra of Quantized Signals (Bennett, 1948), https://doi.org/10.1002/j.1538-7305.1948.tb01340.x

        Quantization (Gray and Neuhoff, 1998), https://doi.org/10.1109/18.720541

    Example:
        >>> y = Quantization()(torch.linspace(0, 1, 1000)[None], 0.5, generator=torch.Generator().manual_seed(0))
        >>> len(y.unique())
        3
    """

    severities: ClassVar[tuple[float, ...]] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    unit: ClassVar[str] = "step"
    independent_rows: ClassVar[bool] = True

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        level = level if isinstance(level, Tensor) else number_like(level, x)
        u = column(torch.empty(len(x), dtype=x.dtype, device=x.device).uniform_(generator=generator), x)
        y = (x.detach() / level).add_(u).round_().sub_(u).mul_(level)
        # a step of 0, or of 0 beside x, changes nothing; the sum is cheaper, but the program would wait for a GPU
        if x.device.type != "cpu" or not math.isfinite(y.sum().item()):
            y = torch.where(y.abs() < math.inf, y, x.detach())
        return y + (x - x.detach()) if is_differentiated(x) else y


@dataclass(frozen=True, kw_only=True)
class Jitter(Noise):
    r"""Reads a series at the wrong times, as an unsteady clock does.

    .. math:: y_t = x(t + \delta_t), \quad \delta_t \sim \mathcal{N}(0, \sigma^2)

    Between samples, the series is linear. Before the first sample and after the last, it is constant. All channels of a sample
    share the times. A slope :math:`s` turns the jitter into noise with the standard deviation :math:`s \sigma`, and a constant
    series does not change. The level is the standard deviation :math:`\sigma \geq 0` of a time, in sampling intervals.

    With a mask, times count valid elements, so the clock stands still in gaps.

    Args:
        dim: The axis of time, counted from the end: -1 for :math:`(B, C, T)` and -2 for :math:`(B, T, C)`.

    References:
        Smart Devices are Different: Assessing and Mitigating Mobile Sensing Heterogeneities for Activity Recognition (Stisen et
        al., 2015), https://doi.org/10.1145/2809695.2809718

    Example:
        >>> ramp = torch.arange(100.0).expand(1000, 100)
        >>> y = Jitter()(ramp, 0.5, generator=torch.Generator().manual_seed(0))
        >>> round((y - ramp)[:, 50].std().item(), 1)
        0.5
    """

    dim: int = -1

    severities: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.5, 1.0, 2.0)
    unit: ClassVar[str] = "standard deviation in sampling intervals"
    independent_rows: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "dim", validate_axis(self.dim))

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        check_axes(self, x, -self.dim)
        shape = [len(x), *[1] * (x.ndim - 1)]
        shape[self.dim] = n = x.shape[self.dim]
        delay = torch.empty(shape, dtype=x.dtype.to_real(), device=x.device).normal_(generator=generator).mul_(level)
        whole = delay.floor()
        if mask is None:
            along = [1] * x.ndim
            along[self.dim] = n
            place, last, series = torch.arange(n, device=x.device).view(along), n - 1, x
        else:  # valid elements first, in order; the others are beyond the last, where no time leads
            place = mask.view(torch.uint8).cumsum(self.dim).sub_(1)
            last = place.narrow(self.dim, n - 1, 1).clamp_min(0)
            series = torch.zeros_like(x).scatter(self.dim, place.where(mask, n - 1), x)
        left = place + whole.long()
        before, after = (series.gather(self.dim, _limit(index, last).expand_as(x)) for index in (left, left + 1))
        return after.sub_(before).mul_(delay.sub_(whole)).add_(before)


def _limit(index: Tensor, last: int | Tensor) -> Tensor:
    return index.clamp_min(0).clamp_max(last) if isinstance(last, int) else torch.minimum(index.clamp_min(0), last)
