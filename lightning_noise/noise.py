r"""Noise as a value: a distribution around a tensor, whose amount is scheduled.

A noise maps a tensor :math:`x` and a level to a perturbed copy of :math:`x`. The level is always an amplitude: 0 is no noise,
and a higher level is more noise. The caller provides the randomness. So a noise has no state, compares by its fields, and can
be used in any place and in any order.
"""

from __future__ import annotations

import cmath
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_noise._checks import check_counts, check_finite, check_flags, check_level, is_number
from lightning_noise._tensor import (
    add_scaled,
    center_span,
    column,
    count_valid,
    draw_bits,
    index_valid,
    is_differentiated,
    span,
    validate_axis,
    validate_dim,
    zero_invalid_,
)
from lightning_noise._usage import Value, name_of, nearest, typed
from lightning_noise.batch import describe
from lightning_noise.masks import valid_positions
from lightning_noise.schedules import Schedule

__all__ = [
    "SNR",
    "ColoredNoise",
    "Drift",
    "DropConnect",
    "FeatureDropout",
    "Gaussian",
    "Impulse",
    "Masking",
    "Noise",
    "PatchGaussian",
    "Scaling",
    "Shot",
    "Speckle",
    "SwapNoise",
    "Uniform",
    "as_noise",
]

# a function from (x, level, *, generator) to a tensor; in a configuration file Callable[..., Tensor] would mean Tensor itself
NoiseFunction = Callable[..., Any]


class Noise(Value, ABC):
    r"""A random map of a tensor to a tensor of the same kind.

    The result has the shape, dtype, device and memory format of ``x``. A noise never writes to ``x``; at level 0 it returns
    ``x`` itself. Half precision is perturbed in float32 and rounded once, at the end. A level below 0 or above ``max_level`` is
    a ValueError, and so is a tensor with fewer axes than the noise needs.

    Invalid elements, such as padding, keep their bits, and valid elements do not depend on them. A mask says which elements
    are valid; NaN is always invalid. With a mask that is true everywhere, the result is that without a mask.

    Complex Gaussian draws are circular: real and imaginary part are independent, each with half of the variance.

    A subclass is a frozen dataclass that implements :meth:`perturb`. Any function with the signature of :meth:`__call__` is a
    noise, too; see :func:`as_noise`.

    Attributes:
        severities: Five levels at which the literature tests, for data in [0, 1].
        unit: What the level is, as the label of an axis.
        additive: Whether the level is in the units of the data, and so can be relative to their standard deviation.
        max_level: The largest level that has a meaning.
        requires_float: Whether the noise needs floating-point values. If not, it also takes integers, such as category codes.
        mixes_samples: Whether a sample receives values of other samples, so that its noise depends on its batch.
        independent_rows: Whether the noise of a row depends on its index and values alone, and not on those of other rows.
            Rows of held-out data are then drawn many at a time.
        elementwise: Whether each element is perturbed alone, so that the shape of ``x`` has no meaning.
        takes_complex: Whether the noise also takes complex values.
        keeps_invalid: Whether :meth:`perturb` itself keeps invalid elements and finds NaN, so that nobody has to put them back.
        takes_half: Whether :meth:`perturb` also takes half precision, and rounds once, at the end. A GPU then saves two copies.
        level_usage: What to type as the level, with ``{}`` in place of a number that a user would take for the level.
        is_known: Whether these attributes are known. A function may be additive and may have side effects.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> Gaussian()(x, 0.0, generator=torch.Generator()) is x
        True
    """

    severities: ClassVar[tuple[float, ...]] = ()
    unit: ClassVar[str] = "level"
    additive: ClassVar[bool] = False
    max_level: ClassVar[float] = math.inf
    requires_float: ClassVar[bool] = True
    mixes_samples: ClassVar[bool] = False
    independent_rows: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    takes_complex: ClassVar[bool] = False
    keeps_invalid: ClassVar[bool] = False
    takes_half: ClassVar[bool] = False
    is_known: ClassVar[bool] = True
    usage: ClassVar[str] = "InputNoise({}, 0.1)"
    level_usage: ClassVar[str] = "{}"

    @classmethod
    def _advise(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        parameters = signature(cls).parameters
        n = sum(parameter.kind is Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())
        own = {name: value for name, value in kwargs.items() if nearest(name, parameters)}
        levels = [*args[n:], *(value for name, value in kwargs.items() if name not in own)]  # a noise has none
        call = super()._advise(args[:n], own)
        return f"InputNoise({call}, {cls.level_usage.format(typed(levels[0]))})" if levels else call

    @property
    def title(self) -> str:
        """The name of the noise in messages."""
        return type(self).__name__

    def __call__(self, x: Tensor, level: float | Tensor, *, generator: torch.Generator, mask: Tensor | None = None) -> Tensor:
        r"""Perturbs the valid elements of ``x`` of shape :math:`(B, *)`.

        Args:
            x: A floating-point tensor, or an integer tensor if the noise does not require floats.
            level: A number, or a tensor of shape :math:`(B,)` with a level for each sample. Row ``i`` of ``noise(x, levels)``
                equals row ``i`` of ``noise(x, levels[i])`` from the same state of the generator. Exceptions are documented.
            generator: The source of randomness, on the device of ``x``.
            mask: A boolean tensor of the shape of ``x``, true at valid elements. Default: all elements that are not NaN.
        """
        self._check_arguments(x, mask)
        # bfloat16 has 256 numbers in [0.5, 1): too few to draw from
        dtype = torch.promote_types(x.dtype, torch.float32)
        if isinstance(level, Tensor):
            level = column(level.to(dtype.to_real()), x)
        elif check_level(level, self.max_level) == 0:
            return x
        if x.numel() == 0:  # the last batch of a rank may be empty
            return x
        # contiguous: the draw of an element must not depend on the memory format
        source = x.contiguous()
        mask = None if mask is None else mask.contiguous()
        keeps_invalid = self.keeps_invalid and not x.is_complex()  # 0 times infinity is NaN + NaN i
        mask = mask if keeps_invalid else _valid(source, mask)
        on_cpu, is_wide = x.device.type == "cpu", x.dtype == dtype
        as_is = is_wide or not self.requires_float or (self.takes_half and not on_cpu)  # on the CPU, mixed types are slow
        y = self.perturb(source if as_is else source.to(dtype), level, generator, mask)
        y = y if y.dtype == x.dtype else y.to(x.dtype)
        keeps_bits = keeps_invalid and is_wide and on_cpu  # a GPU and a conversion know one NaN
        if mask is not None and not keeps_bits:
            y = torch.where(mask, y, source)
        return y if x.is_contiguous() else torch.empty_like(x).copy_(y)

    @abstractmethod
    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        """Returns a perturbed copy of ``x``, which is contiguous and, if the noise requires floats, in at least float32.

        The level is a positive number, or a tensor that broadcasts against ``x`` and may hold zeros. The mask is a boolean
        tensor of the shape of ``x``, false at padding and NaN, or ``None`` if all elements are valid. What the noise takes from
        other elements, it takes from valid ones. The caller puts invalid elements back, so an elementwise noise needs no mask.
        """

    def _check_arguments(self, x: Tensor, mask: Tensor | None) -> None:
        if x.is_complex() and not self.takes_complex:
            raise TypeError(f"{self.title} needs real numbers, got {describe(x)}; type torch.view_as_real(x) or x.abs()")
        if self.requires_float and not (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"{self.title} needs floats, got {describe(x)}; type x.float()")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape):
            raise ValueError(
                f"mask must be a boolean tensor of shape {tuple(x.shape)}, got {describe(mask)}; type masks.align_mask(mask, x)"
            )


@dataclass(frozen=True, repr=False)
class _FunctionNoise(Noise):
    """A function as a noise; the function handles half precision itself."""

    function: NoiseFunction

    is_known: ClassVar[bool] = False

    @property
    def title(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, x: Tensor, level: float | Tensor, *, generator: torch.Generator, mask: Tensor | None = None) -> Tensor:
        y = self.function(x, level, generator=generator)
        mask = _valid(x, mask)
        return y if mask is None else torch.where(mask, y, x)

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        return self(x, level, generator=generator, mask=mask)

    def __repr__(self) -> str:
        return repr(self.function)


def as_noise(noise: Noise | NoiseFunction, user: str = "InputNoise({}, {})") -> Noise:
    """Returns a noise itself, or a function ``noise(x, level, *, generator)`` wrapped into a noise.

    Args:
        noise: A noise or a function.
        user: What to type if the argument is neither, with places for a noise and a level.

    Example:
        >>> def shift(x, level, *, generator):
        ...     return x + level
        >>> as_noise(shift)(torch.zeros(2), 0.5, generator=torch.Generator())
        tensor([0.5000, 0.5000])
    """
    if isinstance(noise, Noise):
        return noise
    if isinstance(noise, type | Schedule) or not callable(noise):
        raise TypeError(f"a noise must be a value such as noise.Gaussian(), got {noise!r}; type {_advise(noise, user)}")
    return _FunctionNoise(noise)


def _advise(value: Any, user: str) -> str:
    """Returns what to type if a value stands where a noise is expected."""
    if isinstance(value, list | tuple) and value:
        names = ["", *(f", name={str(i)!r}" for i in range(2, len(value) + 1))]
        return ", ".join(f"{_advise(each, user)[:-1]}{name})" for each, name in zip(value, names, strict=True))
    if isinstance(value, Noise):
        return user.format(typed(value), 0.1)
    if isinstance(value, type) and issubclass(value, Noise):
        return user.format(f"{name_of(value)}()", 0.1)
    if isinstance(value, str):
        return user.format(f"noise.{nearest(value, __all__) or 'Gaussian'}()", 0.1)
    is_level = is_number(value) or isinstance(value, Value)
    return user.format("noise.Gaussian()", typed(value) if is_level else 0.1)


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
        return add_scaled(x, _empty_like(x).normal_(generator=generator), level, mask)


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
        return add_scaled(x, _empty_like(x).uniform_(-1, 1, generator=generator), level, mask)


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
        return zero_invalid_(_empty_like(x).normal_(generator=generator), mask).mul_(level).add_(1).mul_(x)


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
        mask = _valid(x, mask)
        low, high = self.low, self.high
        if low is None or high is None:
            candidates = _fill_invalid(x, mask)
            low = column(candidates.amin(1), x) if low is None else low
            high = column(candidates.amax(1), x) if high is None else high
        low, high = (bound if isinstance(bound, Tensor) else _number(bound, x) for bound in (low, high))
        # the size of the integer says whether an element is hit, and its lowest bit chooses the value
        bits, last = draw_bits(x, generator), _last_bits(level)
        if not _is_fast_as_bits(x):
            hit = bits <= last if mask is None else (bits <= last).logical_and_(mask)
            return torch.where(hit, torch.where(bits.bitwise_and_(1).bool(), high, low), x)
        low, high = low.view(torch.int32), high.view(torch.int32)
        value = bits.bitwise_and(1).mul_(low ^ high).bitwise_xor_(low)
        hit = bits.le_(last) if mask is None else bits.le_(last).mul_(mask.view(torch.uint8))
        return value.bitwise_xor_(x.view(torch.int32)).mul_(hit).bitwise_xor_(x.view(torch.int32)).view(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Shot(Noise):
    r"""Replaces an intensity by a count of events: Poisson noise, as of photons.

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

    def __post_init__(self):
        check_finite(scale=self.scale)
        if self.scale <= 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        x = _valid_part(x, mask)
        smallest, largest = x.detach().aminmax()
        if smallest < 0:  # waits for the device, but torch.poisson of a negative mean is undefined there
            raise ValueError(
                f"Shot needs data that are not negative, got a minimum of {smallest.item():g}; normalize the data in the "
                "forward of the module instead"
            )
        gain = level / self.scale if isinstance(level, Tensor) else _number(level / self.scale, x)
        mean = x.detach() / gain
        # beyond 2^30, the noise is below 1/32768 of x and counts do not fit everywhere; a level of 0 has an infinite mean
        if largest / gain.amin() < 2.0**30 and not is_differentiated(x):
            return torch.poisson(mean, generator=generator).mul_(gain)
        countable = mean < 2.0**30
        counts = torch.poisson(torch.where(countable, mean, 0.0), generator=generator)
        return torch.where(countable, counts.mul_(gain), x)


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
        _check_axes(self, x, 1)
        mask = _valid(x, mask)
        noise = zero_invalid_(torch.empty_like(x).normal_(generator=generator), mask)
        flat, valid = x.flatten(1), None if mask is None else mask.flatten(1)
        signal = _valid_part(flat, valid)
        if self.center:
            mean = signal.sum(1, keepdim=True) / count_valid(valid, flat, -1)
            signal = _valid_part(flat - mean, valid)
        signal_norm, noise_norm = (torch.linalg.vector_norm(part, dim=1) for part in (signal, noise.flatten(1)))
        # a sample without valid elements has no noise to divide by
        gain = column(signal_norm / noise_norm.clamp_min(torch.finfo(noise_norm.dtype).tiny), x)
        return add_scaled(x, noise, gain * level, mask)


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
        _check_axes(self, x, -self.dim)
        mask = _valid(x, mask)
        valid, length = None if mask is None else mask.movedim(self.dim, -1).contiguous(), x.shape[self.dim]
        noise = zero_invalid_(self._draw(x, generator), valid)
        n = count_valid(valid, noise, -1)
        if mask is not None:  # a part of the series does not have mean 0
            mean = noise.sum(-1, keepdim=True) / n
            noise = zero_invalid_(noise.sub_(torch.where(n < length, mean, 0.0)), valid)
        norm = torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
        gain = n.sqrt() / norm.clamp_min_(torch.finfo(norm.dtype).tiny)  # a series of two may draw an exact 0
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
    r"""Adds a random walk along an axis, as of a drifting sensor.

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
        _check_axes(self, x, -self.dim)
        mask = _valid(x, mask)
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
        _check_axes(self, x, -self.dim)
        factor = torch.empty_like(x.narrow(self.dim, 0, 1), memory_format=torch.contiguous_format)
        y = factor.normal_(generator=generator).mul_(level).add_(1) * x
        return y if mask is None else torch.where(mask, y, x)


@dataclass(frozen=True)
class PatchGaussian(Noise):
    r"""Adds Gaussian noise within a random square of each image.

    .. math:: y = x + \sigma m \epsilon, \quad \epsilon \sim \mathcal{N}(0, I)

    The mask :math:`m` is 1 in a square that all channels share. The center is uniform over the pixels, and the square is cut
    off at the edges. A square of even size has its center between pixels, so it reaches all edges alike. Along an axis of
    :math:`n` pixels, a square of size :math:`s \leq n` covers a share of :math:`s / n - \lfloor s^2 / 4 \rfloor / n^2` on
    average. Images are the last two axes. With a mask, only rows and columns with valid pixels count.

    The paper reports the clean accuracy of cutout with the robustness of Gaussian noise. The level is the standard deviation
    :math:`\sigma \geq 0` in the units of the data, with the severities of :class:`Gaussian`.

    Args:
        size: The side of the square in pixels. The paper uses 25 on the 32 pixels of CIFAR-10 and up to 250 on the 224 pixels
            of ImageNet, so the square covers much of the image.

    References:
        Improving Robustness Without Sacrificing Accuracy with Patch Gaussian Augmentation (Lopes et al., 2019),
        https://arxiv.org/abs/1906.02611

    Example:
        >>> y = PatchGaussian(size=3)(torch.zeros(1, 1, 9, 9), 0.5, generator=torch.Generator().manual_seed(0))
        >>> int((y != 0).sum())
        9
    """

    size: int

    severities: ClassVar[tuple[float, ...]] = Gaussian.severities
    unit: ClassVar[str] = "standard deviation in the patch"
    independent_rows: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True

    def __post_init__(self):
        check_counts(size=self.size)

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        _check_axes(self, x, 2)
        real = x.dtype.to_real()
        centers = torch.empty(2, len(x), dtype=real, device=x.device).uniform_(generator=generator)
        height, width = (min(self.size, n) for n in x.shape[-2:])
        z = x.new_empty(*x.shape[:-2], height, width).normal_(generator=generator).mul_(level)
        # tiles of the square over the image: wherever the square lies, it holds each draw at most once
        repeats = (math.ceil(n / m) for n, m in zip(x.shape[-2:], (height, width), strict=True))
        z = z.repeat(*[1] * (x.ndim - 2), *repeats)[..., : x.shape[-2], : x.shape[-1]]
        square = torch.ones((), dtype=real, device=x.device)
        for dim, u in zip((-2, -1), centers, strict=True):
            n, index = index_valid(mask, x, dim)
            square = square * span(center_span(u, self.size, n), self.size, x, dim, index).to(real)
        return torch.addcmul(x, z, square.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class Masking(Noise):
    r"""Masks a random box of each sample: cutout, random erasing, SpecAugment.

    .. math:: y = \begin{cases} v & \text{in a box with } p^{1/k} \text{ of the length of each of } k \text{ axes} \\
        x & \text{else} \end{cases}

    The level is the share :math:`p \in [0, 1]` of the sample that is masked. Lengths are rounded up or down at random, so that
    the mean of the masked share is exactly :math:`p`. The box lies within the sample. The severities span the range of random
    erasing.

    With a mask, lengths and places count the positions of each axis that hold a valid element. So the mean share of the valid
    part is exactly :math:`p` if this part is a span or a box. Of another part, the box covers :math:`p` of the smallest grid of
    positions that holds the part.

    Args:
        dim: The axes of the box, counted from the end. Along all other axes the box spans the sample. ``(-2, -1)`` is a box of
            an image, ``(-1,)`` a span of a series or of the time of a spectrogram, ``(-2,)`` a band of frequencies.
        value: The value in the box, :math:`v`. The default 0 is the mean of normalized data.

    References:
        Improved Regularization of Convolutional Neural Networks with Cutout (DeVries and Taylor, 2017),
        https://arxiv.org/abs/1708.04552

        Random Erasing Data Augmentation (Zhong et al., 2017), https://arxiv.org/abs/1708.04896

        SpecAugment (Park et al., 2019), https://arxiv.org/abs/1904.08779

    Example:
        >>> Masking(dim=(-1,))(torch.ones(1, 2, 8), 0.5, generator=torch.Generator().manual_seed(0)).mean(-1)
        tensor([[0.5000, 0.5000]])
    """

    dim: Any = (-2, -1)  # int | Sequence[int]
    value: float = 0.0

    severities: ClassVar[tuple[float, ...]] = (0.02, 0.05, 0.1, 0.2, 0.33)
    unit: ClassVar[str] = "share masked"
    independent_rows: ClassVar[bool] = True
    max_level: ClassVar[float] = 1.0
    takes_complex: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "dim", validate_dim(self.dim))  # a tuple is hashable and not the caller's list

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        _check_axes(self, x, -min(self.dim))
        real = x.dtype.to_real()
        level = level if isinstance(level, Tensor) else torch.full((), level, dtype=real, device=x.device)
        share = level.flatten() ** (1 / len(self.dim))
        u = torch.empty(len(self.dim), 2, len(x), dtype=real, device=x.device).uniform_(generator=generator)
        box = torch.ones((), dtype=torch.bool, device=x.device)
        for dim, (rounding, place) in zip(self.dim, u, strict=True):
            n, index = index_valid(mask, x, dim)
            length = (share * n + rounding).floor_()
            box = box & span((place * (n + 1 - length)).floor_(), length, x, dim, index)
        return torch.where(box, self.value, x)


@dataclass(frozen=True, kw_only=True)
class FeatureDropout(Noise):
    r"""Sets elements to zero and scales up the others: dropout of inputs.

    .. math:: y = \frac{m}{1 - p} \, x, \quad m \sim \mathrm{Bernoulli}(1 - p)

    The mean is preserved and the variance is :math:`x^2 p / (1 - p)`, as with ``torch.nn.Dropout``. Without ``rescale`` the
    mean is :math:`(1 - p) x` and the variance :math:`p (1 - p) x^2`. The level is the share :math:`p \in [0, 1]` of elements.
    For tables 0.1 to 0.2 is usual; 0 is the mean of a normalized column.

    Args:
        rescale: Whether to divide by :math:`1 - p`, so that inputs have the same mean with and without noise. Give ``False``
            for missing values, as in a denoising autoencoder or to measure the cost of a lost feature.

    References:
        Dropout: A Simple Way to Prevent Neural Networks from Overfitting (Srivastava et al., 2014),
        https://jmlr.org/papers/v15/srivastava14a.html

        Extracting and Composing Robust Features with Denoising Autoencoders (Vincent et al., 2008),
        https://doi.org/10.1145/1390156.1390294

    Example:
        >>> FeatureDropout()(torch.ones(1000), 0.2, generator=torch.Generator().manual_seed(0)).unique()
        tensor([0.0000, 1.2500])
    """

    rescale: bool = True

    severities: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.3, 0.4, 0.5)
    unit: ClassVar[str] = "share of elements"
    elementwise: ClassVar[bool] = True
    independent_rows: ClassVar[bool] = True
    max_level: ClassVar[float] = 1.0
    takes_complex: ClassVar[bool] = True
    takes_half: ClassVar[bool] = True

    def __post_init__(self):
        check_flags(rescale=self.rescale)

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        bits, last = draw_bits(x, generator), _last_bits(level)
        if _is_fast_as_bits(x):
            y = torch.mul(x.view(torch.int32), bits.gt_(last), out=bits).view(x.dtype)
        else:
            y = torch.where(bits > last, x, 0.0)
        if not self.rescale:
            return y
        # a factor for each sample must round as that of all; at p = 1, an infinite factor would make the gradient NaN
        real = torch.promote_types(x.dtype, torch.float32).to_real()
        level = level if isinstance(level, Tensor) else torch.full([1] * x.ndim, level, dtype=real, device=x.device)
        return y.mul_((1 - level).clamp_min_(2**-24).reciprocal_())


@dataclass(frozen=True)
class DropConnect(Noise):
    r"""Sets weights to zero and scales up the others: :class:`FeatureDropout` of weights.

    The level is the share :math:`p \in [0, 1]` of weights. The paper uses 0.5 in fully connected layers.

    References:
        Regularization of Neural Networks using DropConnect (Wan et al., 2013),
        https://proceedings.mlr.press/v28/wan13.html
    """

    severities: ClassVar[tuple[float, ...]] = FeatureDropout.severities
    unit: ClassVar[str] = "share of weights"
    elementwise: ClassVar[bool] = True
    independent_rows: ClassVar[bool] = True
    max_level: ClassVar[float] = 1.0
    takes_complex: ClassVar[bool] = True
    takes_half: ClassVar[bool] = True

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        return FeatureDropout().perturb(x, level, generator, mask)


@dataclass(frozen=True)
class SwapNoise(Noise):
    r"""Replaces cells of a table by cells of other rows of the batch.

    .. math:: y_{ij} = \begin{cases} x_{kj} & u_{ij} < p, \; k \sim \mathcal{U}\{1, \dots, B\} \setminus \{i\} \\
        x_{ij} & \text{else} \end{cases}

    The column stays the same, so a cell of the result has exactly the distribution of its column. The noise suits categories
    as well as numbers, and keeps integers. A cell changes with probability :math:`p \, P(x_{ij} \neq x_{kj})`. A column is a
    position of the sample, so images and series can be swapped, too. A batch of one row does not change.

    The level is the share :math:`p \in [0, 1]` of cells. For denoising autoencoders of tables 0.15 is usual; VIME uses 0.3 and
    SCARF 0.6. The noise of a row depends on the other rows, so it cannot probe held-out data. Name the leaves to swap, because
    ``inputs="*"`` would also swap integer labels.

    References:
        VIME: Extending the Success of Self- and Semi-supervised Learning to Tabular Domain (Yoon et al., 2020),
        https://proceedings.neurips.cc/paper/2020/hash/7d97667a3e056acab9aaf653807b4a03-Abstract.html

        SCARF: Self-Supervised Contrastive Learning using Random Feature Corruption (Bahri et al., 2022),
        https://arxiv.org/abs/2106.15147

    Example:
        >>> codes = torch.tensor([[1, 10], [2, 20], [3, 30]])
        >>> y = SwapNoise()(codes, 1.0, generator=torch.Generator().manual_seed(0))
        >>> bool((y != codes).all()), bool((y[:, 1] >= 10).all())
        (True, True)
    """

    severities: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.15, 0.3, 0.6)
    unit: ClassVar[str] = "share of cells"
    max_level: ClassVar[float] = 1.0
    requires_float: ClassVar[bool] = False
    mixes_samples: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True
    keeps_invalid: ClassVar[bool] = True

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        n, size = len(x), x[0].numel()
        if n < 2:
            return x.clone()
        mask = _valid(x, mask)
        if mask is None:
            steps, source = _draw_steps(x, level, n - 1, generator), torch.cat([x, x])
            after = torch.arange(size, size + x.numel(), dtype=steps.dtype, device=x.device)  # the cells of the next row
            cells = after.add_(steps.view(-1), alpha=size)
        else:
            valid, source = mask.cumsum(0), x
            rows = _pass_valid(_draw_steps(x, level, valid[-1:] - 1, generator), valid, mask)
            cells = torch.arange(size, device=x.device).view(x.shape[1:]).add(rows, alpha=size).view(-1)
        return source.view(-1).index_select(0, cells).view(x.shape)  # takes a quarter of the time of a gather


def _valid(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """Returns the elements that the mask marks and that are not NaN, or ``None`` if all are valid."""
    # elsewhere the program would wait for the answer
    may_be_nan = (x.is_floating_point() or x.is_complex()) and (x.device.type != "cpu" or cmath.isnan(x.detach().sum().item()))
    return valid_positions(x, mask) if may_be_nan else mask


def _valid_part(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns ``x`` with zeros at invalid elements."""
    if mask is None:
        return x
    return torch.where(mask, x, 0.0) if x.requires_grad else zero_invalid_(x.clone(), mask)


def _empty_like(x: Tensor) -> Tensor:
    """Returns an empty tensor of the shape of ``x``, in at least float32."""
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def _last_bits(level: float | Tensor) -> int | Tensor:
    """Returns the integer that a share ``level`` of the draws of :func:`draw_bits` does not exceed; -1 for no draw."""
    return (level * 2**31).long().sub_(1).int() if isinstance(level, Tensor) else int(level * 2**31) - 1


def _is_fast_as_bits(x: Tensor) -> bool:
    """Returns whether to multiply the bits of ``x`` by 0 or 1, because ``torch.where`` takes ten times as long."""
    is_large = x.numel() > 2**13  # otherwise the number of calls counts
    return is_large and x.device.type == "cpu" and x.dtype == torch.float32 and not is_differentiated(x)


def _number(value: float, x: Tensor) -> Tensor:
    """Returns a number as a tensor of the dtype and device of ``x``, without waiting for the device."""
    return torch.full((), value, dtype=x.dtype, device=x.device)


def _draw_steps(x: Tensor, level: float | Tensor, others: int | Tensor, generator: torch.Generator) -> Tensor:
    """Returns how many rows each cell skips before it takes the value of the next row, in a circle of rows.

    A share ``level`` of the cells skips fewer rows than there are ``others``. The remaining cells skip all others, so the next
    row is their own.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    level = level.to(wide).clamp_min(2**-60) if isinstance(level, Tensor) else level
    others = others.to(wide) if isinstance(others, Tensor) else others
    # for u < p, u / p is uniform, and for u >= p, it is at least 1; with u = 0, a level of 0 would swap a cell
    u = draw_bits(x, generator).bitwise_or_(1).to(wide)
    steps = u.mul_(others / (level * 2**31)).clamp_max_(others)
    return steps.to(torch.int32 if 2 * x.numel() < 2**31 else torch.int64)


def _pass_valid(steps: Tensor, valid: Tensor, mask: Tensor) -> Tensor:
    """Returns the next row for a cell that skips valid rows in a circle of valid rows. An invalid cell gets its own row."""
    n, own = valid[-1:], column(torch.arange(len(mask), device=mask.device), mask)
    rank = torch.where(mask, valid - 1, n + own - valid)  # valid rows first
    order = torch.empty_like(rank).scatter_(0, rank, own.expand_as(rank))
    place = valid + steps
    place.sub_(n * (place >= n))
    return order.gather(0, torch.where(mask, place, rank))


def _check_axes(noise: Noise, x: Tensor, axes: int) -> None:
    if x.ndim - 1 < axes:
        raise ValueError(
            f"{type(noise).__name__} needs samples of at least {axes} {'axis' if axes == 1 else 'axes'}, "
            f"got a batch of shape {tuple(x.shape)}"
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
