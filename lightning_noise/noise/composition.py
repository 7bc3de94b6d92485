"""Noises made of other noises: several in a row, one of several, or one on another scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_noise._checks import check_finite, is_number, plain
from lightning_noise._tensor import column
from lightning_noise._usage import typed
from lightning_noise.noise.base import Noise, NoiseFunction, as_noise

__all__ = ["Compose", "OneOf", "Scaled", "parts_of"]

_OF_ALL = ("additive", "independent_rows", "elementwise", "takes_complex", "is_known")
_OF_ANY = ("requires_float", "mixes_samples", "cuts_gradient")
_IF_EQUAL = ("unit", "usage", "level_usage")


@dataclass(frozen=True)
class Compose(Noise):
    r"""Applies several noises in a row, all at one level.

    .. math:: y = n_k(\dots n_2(n_1(x, \lambda), \lambda) \dots, \lambda)

    The level is that of each noise. :class:`Scaled` brings noises with levels of different units to a common scale. Each noise
    has its own draw. A noise that mixes samples takes values that already hold the noise of the earlier noises. Each severity
    is the smallest of those of the noises, so that no noise exceeds its own.

    Args:
        noises: The noises in order. Functions are accepted.

    Example:
        >>> from lightning_noise.noise import Gaussian, Impulse, Shot
        >>> camera = Compose([Scaled(Shot(), 0.1), Gaussian(), Scaled(Impulse(low=0.0, high=1.0), 0.05)])
        >>> camera.max_level
        20.0
        >>> y = camera(torch.rand(2, 3, 8, 8), 0.2, generator=torch.Generator().manual_seed(0))
    """

    noises: Sequence[Noise | NoiseFunction]

    def __post_init__(self):
        _take(self, self.noises)

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        for noise in self.noises:
            x = _apply(noise, x, level, generator, mask)
        return x


@dataclass(frozen=True)
class OneOf(Noise):
    r"""Applies one of several noises to each sample, chosen at random.

    .. math:: y_b = n_{k_b}(x_b, \lambda), \quad P(k_b = k) = w_k

    The level is that of each noise, as in :class:`Compose`. A noise in weights takes each row of a weight for a sample. Every
    noise is drawn for every sample, and one is kept. So the noise of a sample does not depend on the choices for the others,
    and the time is that of all noises together.

    Args:
        noises: The noises. Functions are accepted.
        weights: A weight for each noise, in proportion to its probability. Default: all are equally probable.

    Example:
        >>> from lightning_noise.noise import Gaussian, Masking
        >>> either = OneOf([Gaussian(), Masking(dim=(-1,))], weights=[3, 1])
        >>> y = either(torch.ones(1000, 8), 0.5, generator=torch.Generator().manual_seed(0))
        >>> round((y == 0).any(1).float().mean().item(), 2)
        0.25
    """

    noises: Sequence[Noise | NoiseFunction]
    weights: Sequence[float] | None = None

    def __post_init__(self):
        _take(self, self.noises)
        vars(self)["elementwise"] = False  # samples have a meaning
        if self.weights is not None:
            if isinstance(self.weights, Mapping | Set):  # whose order may not be that of the noises
                found = [*self.weights.values()] if isinstance(self.weights, Mapping) else [1.0] * len(self.noises)
                raise TypeError(f"weights must be a list, in the order of the noises, got {self.weights}; type weights={found}")
            weights = list(plain(self.weights)) if isinstance(self.weights, Iterable) else []
            check_finite(**{f"weight {i}": weight for i, weight in enumerate(weights)})
            object.__setattr__(self, "weights", tuple(map(float, weights)) or self.weights)
            if len(weights) != len(self.noises) or min(weights) <= 0:
                raise ValueError(
                    f"weights must be a positive number for each of the {len(self.noises)} noises, got {self.weights}; "
                    f"type weights={[1.0] * len(self.noises)}"
                )

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        u = torch.empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32).to_real(), device=x.device)
        u = column(u.uniform_(generator=generator), x)
        weights = self.weights or [1.0] * len(self.noises)
        y = _apply(self.noises[0], x, level, generator, mask)
        for noise, begin in zip(self.noises[1:], accumulate(weights), strict=False):
            y = torch.where(u >= begin / sum(weights), _apply(noise, x, level, generator, mask), y)
        return y


@dataclass(frozen=True)
class Scaled(Noise):
    r"""Multiplies the level of a noise, so that one level drives several noises.

    .. math:: y = n(x, c \lambda)

    Args:
        noise: The noise, or a function.
        factor: The factor :math:`c > 0`.

    Example:
        >>> from lightning_noise.noise import Gaussian
        >>> x, generators = torch.rand(2, 8), [torch.Generator().manual_seed(0) for _ in range(2)]
        >>> one, two = Scaled(Gaussian(), 0.5)(x, 0.2, generator=generators[0]), Gaussian()(x, 0.1, generator=generators[1])
        >>> bool((one == two).all())
        True
    """

    noise: Noise | NoiseFunction
    factor: float

    def __post_init__(self):
        if not is_number(self.factor):
            raise TypeError(f"factor must be a number, got {self.factor!r}; type noise.Scaled(noise.Gaussian(), 0.5)")
        check_finite(factor=self.factor)
        if self.factor <= 0:
            raise ValueError(f"factor must be positive, got {self.factor}; type factor=1.0")
        object.__setattr__(self, "factor", float(self.factor))
        noise = as_noise(self.noise, f"noise.Scaled({{}}, {self.factor})")
        object.__setattr__(self, "noise", noise)
        _inherit(self, [noise])
        vars(self).update(
            severities=tuple(severity / self.factor for severity in noise.severities),
            max_level=noise.max_level / self.factor,
            unit=f"{noise.unit} / {self.factor:g}",
            level_usage=Noise.level_usage,  # decibels of this level are not those of the noise
        )

    @classmethod
    def _advise(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        is_factor = len(args) == 1 and is_number(args[0])
        return super()._advise(() if is_factor else args, {"factor": args[0]} if is_factor else kwargs)

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        largest: float = self.noise.max_level  # type: ignore[union-attr]  # beyond which rounding must not lead
        if isinstance(level, Tensor):
            amount = (level * self.factor).clamp_max(largest)
        else:  # a number is rounded as the level of a sample is
            real = np.float64 if x.dtype in (torch.float64, torch.complex128) else np.float32
            amount = min(float(real(level) * real(self.factor)), largest)
        return _apply(self.noise, x, amount, generator, mask)


def parts_of(noise: Noise) -> list[Noise]:
    """Returns the noises that a noise is composed of, or the noise itself."""
    inner: Any = noise.noises if isinstance(noise, Compose | OneOf) else [noise.noise] if isinstance(noise, Scaled) else []
    return [part for each in inner for part in parts_of(each)] or [noise]


def _take(value: Compose | OneOf, noises: Any) -> None:
    """Stores the noises as a tuple, and the attributes that follow from them."""
    user = f"noise.{type(value).__name__}([{{}}])"
    if not isinstance(noises, Sequence) or isinstance(noises, str) or not noises:
        given = [typed(each) for each in vars(value).values() if isinstance(each, Noise)] or ["noise.Gaussian()"]
        raise TypeError(f"noises must be a list of noises, got {noises!r}; type {user.format(', '.join(given))}")
    object.__setattr__(value, "noises", tuple(as_noise(noise, user) for noise in noises))  # hashable, not the caller's list
    _inherit(value, value.noises)


def _inherit(value: Noise, noises: Sequence[Any]) -> None:
    """Sets the attributes of a noise as those of its parts allow."""
    severities = [noise.severities for noise in noises if noise.severities]
    texts = {name: {getattr(noise, name) for noise in noises} for name in _IF_EQUAL}
    vars(value).update(
        severities=tuple(map(min, zip(*severities, strict=False))),
        max_level=min(noise.max_level for noise in noises),
        **{name: all(getattr(noise, name) for noise in noises) for name in _OF_ALL},
        **{name: any(getattr(noise, name) for noise in noises) for name in _OF_ANY},
        **{name: found.pop() if len(found) == 1 else getattr(Noise, name) for name, found in texts.items()},
    )


def _apply(noise: Any, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
    return noise(x, level.flatten() if isinstance(level, Tensor) else level, generator=generator, mask=mask)
