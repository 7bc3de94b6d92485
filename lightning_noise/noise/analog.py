"""A model of the devices that hold weights as analog quantities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_noise._checks import check_finite
from lightning_noise._tensor import column, number_like, valid_part
from lightning_noise.noise.base import Noise

__all__ = ["AnalogWeights"]

# of the published fit: seconds from programming to the first reading, seconds of a reading, and microsiemens
_T_0, _T_READ, _G_MAX = 20.0, 250e-9, 25.0


@dataclass(frozen=True, kw_only=True)
class AnalogWeights(Noise):
    r"""Stores weights in phase-change memory: programming noise, drift and read noise.

    .. math:: G_p = G + \lambda \sigma_p(G) \epsilon_1, \quad G_d = G_p \left(\frac{t}{t_0}\right)^{-\lambda \nu}, \quad
        G_r = G_d \left(1 + \lambda Q(G_p) \sqrt{\ln \frac{t + t_r}{2 t_r}} \, \epsilon_2\right)

    A weight is the difference of two conductances :math:`G`, one for positive and one for negative weights, which are not
    negative. The largest weight of each row has the largest conductance: 25 microsiemens, or :math:`g = G / 25 = 1`. The
    constants are those of measured devices, as the AIHWKIT simulates them:

    .. math:: \sigma_p = 0.26348 + 1.965 g - 1.1731 g^2, \quad Q = \min(0.0088 \, g^{-0.65}, 0.2), \quad
        \nu = |\mu_\nu + \sigma_\nu \epsilon_3|

    with :math:`\mu_\nu = 0.0244 - 0.0155 \ln g` in [0.049, 0.1] and :math:`\sigma_\nu = -0.0059 - 0.0125 \ln g` in
    [0.008, 0.045]. Times are :math:`t_0` = 20 s and :math:`t_r` = 250 ns, and :math:`t = t_0 +` ``time``.

    The level :math:`\lambda \geq 0` is a multiple of the published noise: at 1, the weights are those of the devices. Drift
    shrinks all weights by a similar factor, and nothing compensates for it here. The gradient is that of the identity.
    The noise is made for :class:`~lightning_noise.WeightNoise`.

    Args:
        time: The seconds between the first reading of the devices and the use of the weights.

    References:
        Accurate Deep Neural Network Inference Using Computational Phase-Change Memory (Joshi et al., 2020),
        https://arxiv.org/abs/1906.03138

        Phase-Change Memory Models for Deep Learning Training and Inference (Nandakumar et al., 2019),
        https://doi.org/10.1109/ICECS46596.2019.8964852

        A Flexible and Fast PyTorch Toolkit for Simulating Training and Inference on Analog Crossbar Arrays (Rasch et al.,
        2021), https://arxiv.org/abs/2104.02184

    Example:
        >>> w, day = torch.ones(1, 10_000), 24 * 60 * 60
        >>> y = [AnalogWeights(time=time)(w, 1.0, generator=torch.Generator().manual_seed(0)) for time in (0, day)]
        >>> [round(each.mean().item(), 1) for each in y]
        [1.0, 0.7]
    """

    time: float = 0.0

    severities: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.5, 2.0, 3.0)
    unit: ClassVar[str] = "multiple of the published noise"
    usage: ClassVar[str] = "WeightNoise({}, 1.0)"
    independent_rows: ClassVar[bool] = True

    def __post_init__(self):
        check_finite(time=self.time)
        if self.time < 0:
            raise ValueError(f"time must not be negative, got {self.time}; type time=0.0")

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        level = level if isinstance(level, Tensor) else number_like(level, x)
        w = valid_part(x.detach(), mask)
        largest = column(w.view(len(w), -1).abs().amax(1), w)
        target = torch.stack([w, -w]).clamp_min_(0).div_(largest.clamp_min(torch.finfo(w.dtype).tiny))
        z = torch.empty(3 if self.time else 2, *target.shape, dtype=w.dtype, device=w.device).normal_(generator=generator)
        programmed = z[0].mul_(_programming_noise(target)).mul_(level).add_(target).clamp_min_(0)
        kept = z[1].mul_(_read_noise(programmed, self.time + _T_0)).mul_(level).add_(1).clamp_min_(0)
        if self.time:
            kept.mul_(_drift_exponent(target, z[2]).mul_(-math.log1p(self.time / _T_0) * level).exp_())
        positive, negative = programmed.mul_(kept).sub_(target)
        return torch.addcmul(x, positive.sub_(negative), largest)


def _programming_noise(g: Tensor) -> Tensor:
    """Returns the standard deviation of a programmed conductance. Conductances are shares of the largest."""
    return g.mul(-1.1731).add_(1.9650).mul_(g).add_(0.26348).div_(_G_MAX)


def _drift_exponent(g: Tensor, z: Tensor) -> Tensor:
    log = g.clamp_min(1e-7).log_()
    mean = log.mul(-0.0155).add_(0.0244).clamp_(0.049, 0.1)
    std = log.mul_(-0.0125).sub_(0.0059).clamp_(0.008, 0.045)
    return std.mul_(z).add_(mean).abs_()


def _read_noise(g: Tensor, seconds: float) -> Tensor:
    """Returns the relative standard deviation of a conductance that is read some time after programming."""
    q = g.pow(0.65).clamp_min_(1e-3).reciprocal_().mul_(0.0088).clamp_max_(0.2)
    return q.mul_(math.sqrt(math.log((seconds + _T_READ) / (2 * _T_READ))))
