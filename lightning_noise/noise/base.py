"""The base class of the noises, and functions as noises."""

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

from lightning_noise._checks import check_level, is_callable_with, is_number, outline
from lightning_noise._tensor import column
from lightning_noise._usage import Value, match, name_of, nearest, typed, with_types, write_call
from lightning_noise.batch import describe
from lightning_noise.masks import valid_positions
from lightning_noise.schedules import Schedule

__all__ = ["Noise", "as_noise", "check_axes", "find_valid"]


# a function from (x, level, *, generator) to a tensor; in a configuration file Callable[..., Tensor] would mean Tensor itself
NoiseFunction = Callable[..., Any]


@with_types
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
        keeps_invalid: Whether :meth:`perturb` itself keeps invalid elements and finds NaN, so that the caller need not put them
            back.
        takes_half: Whether :meth:`perturb` also takes half precision, and rounds once, at the end. A GPU then saves two copies.
        cuts_gradient: Whether no gradient flows through the noise to ``x``.
        level_usage: What to type as the level, with ``{}`` in place of a number that a user would take for the level.
        is_known: Whether these attributes are known. A function may be additive and may have side effects.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> from lightning_noise.noise import Gaussian
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
    cuts_gradient: ClassVar[bool] = False
    is_known: ClassVar[bool] = True
    usage: ClassVar[str] = "InputNoise({}, 0.1)"
    level_usage: ClassVar[str] = "{}"

    @classmethod
    def _advise(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        parameters = signature(cls).parameters
        if "noises" in parameters and args and isinstance(args[0], Noise):  # in place of a list
            args = ([each for each in args if isinstance(each, Noise)],)
        n = sum(parameter.kind is Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())
        unknown = [name for name in kwargs if not (nearest(name, parameters) or match(cls, (), {name: None}))]
        others = [*args[n:], *(kwargs[name] for name in unknown)]
        levels = [value for value in others if is_number(value) or isinstance(value, Schedule)]  # a noise has none
        call = super()._advise(args[:n], kwargs)
        callback = cls.usage.partition("(")[0]
        return f"{callback}({call}, {cls.level_usage.format(typed(levels[0]))})" if levels else call

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
        mask = mask if keeps_invalid else find_valid(source, mask)
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

        The level is a positive number, or a tensor with a level for each sample, which may be 0. The tensor has the axes of
        ``x``, so that the two broadcast. The mask is a boolean tensor of the shape of ``x``, false at padding and NaN, or
        ``None`` if all elements are valid. What the noise takes from other elements, it takes from valid ones. The caller puts
        invalid elements back, so an elementwise noise needs no mask.
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
        mask = find_valid(x, mask)
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
    if not is_callable_with(noise, None, 0.0, generator=None):
        raise TypeError(
            f"a function that is a noise takes x, level and generator, got {outline(noise)}; type (x, level, *, generator), "
            "and draw from the generator"
        )
    return _FunctionNoise(noise)


def _advise(value: Any, user: str) -> str:
    """Returns what to type if a value stands where a noise is expected."""
    if isinstance(value, list | tuple) and value:
        names = ["", *(f", name={str(i)!r}" for i in range(2, len(value) + 1))]
        return ", ".join(f"{_advise(each, user)[:-1]}{name})" for each, name in zip(value, names, strict=True))
    if isinstance(value, Noise):
        return user.format(typed(value), 0.1)
    if isinstance(value, type) and issubclass(value, Noise):
        return user.format(write_call(value, {}), 0.1)
    if isinstance(value, str):
        kinds = {kind.__name__: kind for kind in Noise.__subclasses__() if name_of(kind) == f"noise.{kind.__name__}"}
        return user.format(write_call(kinds[nearest(value, kinds) or "Gaussian"], {}), 0.1)
    is_level = is_number(value) or isinstance(value, Value)
    return user.format("noise.Gaussian()", typed(value) if is_level else 0.1)


def find_valid(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """Returns the elements that the mask marks and that are not NaN, or ``None`` if all are valid."""
    # elsewhere the program would wait for the answer
    may_be_nan = (x.is_floating_point() or x.is_complex()) and (x.device.type != "cpu" or cmath.isnan(x.detach().sum().item()))
    return valid_positions(x, mask) if may_be_nan else mask


def check_axes(noise: Noise, x: Tensor, axes: int) -> None:
    """Raises a ValueError if the samples of a batch have too few axes."""
    if x.ndim - 1 < axes:
        raise ValueError(
            f"{type(noise).__name__} needs samples of at least {axes} {'axis' if axes == 1 else 'axes'}, "
            f"got a batch of shape {tuple(x.shape)}"
        )
