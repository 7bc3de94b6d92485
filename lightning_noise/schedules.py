"""Schedules as values: how much noise there is at each moment of a run.

A schedule is a pure function of the progress of the run and never of its own history, so it needs no state, survives a resume
and can be looked at before the training. Wherever a level is accepted, a number, a schedule or any callable of this form is.
Values are called ``start`` and ``end``; times are called ``begin``, ``until`` and ``every`` and are in the ``unit``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple, overload

__all__ = ["Constant", "Cosine", "Every", "Level", "Linear", "Product", "Progress", "Schedule", "from_snr_db"]

Unit = Literal["fraction", "epoch", "step"]


class Progress(NamedTuple):
    """A moment of a run.

    Attributes:
        step: Optimizer steps taken.
        epoch: The epoch, counted from 0.
        fraction: The share of the run that is over, in [0, 1]; ``None`` in a run without a known end.
    """

    step: int
    epoch: int
    fraction: float | None


class Schedule(ABC):
    """A level for each moment of a run; a subclass is a frozen dataclass that implements ``__call__``.

    Example:
        >>> Linear(0.0, 0.4)(Progress(step=50, epoch=5, fraction=0.5))
        0.2
    """

    @abstractmethod
    def __call__(self, progress: Progress) -> float:
        """Returns the level in force at this moment."""

    def mean_dose(self, *, steps: int, epochs: int = 1) -> float:
        r"""Returns the mean level :math:`\frac{1}{n} \sum_{t=0}^{n-1} s(t)` of a run of so many steps and epochs in all.

        Schedules of different shape are compared fairly at equal mean dose.

        Example:
            >>> Linear(0.0, 1.0).mean_dose(steps=101)
            0.495...
        """
        return math.fsum(map(self, moments(steps, epochs))) / steps


Level = float | Schedule | Callable[[Progress], float]


def level_at(level: Level, progress: Progress) -> float:
    """Returns the level in force: the number itself, or what the schedule says."""
    return level(progress) if callable(level) else level


def moments(steps: int, epochs: int = 1) -> Iterator[Progress]:
    """Yields the progress before each step of a run of so many steps and epochs in all."""
    return (Progress(step, step * epochs // steps, step / steps) for step in range(steps))


def _check_unit(unit: str, *units: str) -> None:
    if unit not in units:
        raise ValueError(f"unit must be one of {', '.join(map(repr, units))}, got {unit!r}")


def _time(progress: Progress, unit: Unit) -> float:
    time = getattr(progress, unit)
    if time is None:
        raise ValueError(
            "a schedule in fractions needs a run with a known end: set max_steps, or max_epochs, or say unit='step' or 'epoch'"
        )
    return time


@dataclass(frozen=True)
class Constant(Schedule):
    """The same level throughout.

    Example:
        >>> Constant(0.3)(Progress(step=7, epoch=0, fraction=None))
        0.3
    """

    value: float

    def __call__(self, progress: Progress) -> float:
        return self.value


@dataclass(frozen=True)
class _Transition(Schedule):
    """From one value to another between two times, constant outside."""

    start: float
    end: float
    _: KW_ONLY
    begin: float = 0.0
    until: float | None = None
    unit: Unit = "fraction"

    def __post_init__(self):
        _check_unit(self.unit, "fraction", "epoch", "step")
        if self.until is None and self.unit != "fraction":
            raise ValueError(f"until must be given where the unit is {self.unit!r}")
        if not 0 <= self.begin < self._until or (self.unit == "fraction" and self._until > 1):
            limits = "0 <= begin < until" + (" <= 1" if self.unit == "fraction" else "")
            raise ValueError(f"it must be {limits} where the unit is {self.unit!r}, got {self.begin} and {self._until}")

    @property
    def _until(self) -> float:
        return 1.0 if self.until is None else self.until

    def __call__(self, progress: Progress) -> float:
        u = (_time(progress, self.unit) - self.begin) / (self._until - self.begin)
        if u <= 0:
            return self.start
        return self.end if u >= 1 else self.start + (self.end - self.start) * self._share(u)

    @abstractmethod
    def _share(self, u: float) -> float:
        """The share of the way that is made at the time u in (0, 1)."""


@dataclass(frozen=True)
class Linear(_Transition):
    r"""Goes from one value to another at constant speed.

    .. math:: s(t) = a + (b - a) \, u, \quad u = \min(\max((t - t_0) / (t_1 - t_0), 0), 1)

    Its mean over the window is :math:`(a + b) / 2`.

    Args:
        start: The value :math:`a` up to ``begin``.
        end: The value :math:`b` from ``until`` on.
        begin: The time :math:`t_0`.
        until: The time :math:`t_1`; left out, the end of the run, where the unit is ``"fraction"``.
        unit: What times count: the ``"fraction"`` of the run, the ``"epoch"`` or the optimizer ``"step"``.

    Raises:
        ValueError: Times are not in order, or not in [0, 1] where the unit is ``"fraction"``; or, when called with that unit,
            the run has no known end.

    Example:
        >>> ramp = Linear(0.0, 0.5, begin=100, until=200, unit="step")
        >>> [ramp(Progress(step, 0, None)) for step in (0, 100, 150, 200, 300)]
        [0.0, 0.0, 0.25, 0.5, 0.5]
    """

    def _share(self, u: float) -> float:
        return u


@dataclass(frozen=True)
class Cosine(_Transition):
    r"""Goes from one value to another along half a cosine, slow at both ends.

    .. math:: s(t) = a + (b - a) \, \tfrac{1}{2} (1 - \cos \pi u), \quad u = \min(\max((t - t_0) / (t_1 - t_0), 0), 1)

    Its mean over the window is :math:`(a + b) / 2`, as with :class:`Linear`, whose arguments it has.

    References:
        SGDR: Stochastic Gradient Descent with Warm Restarts (Loshchilov and Hutter, 2017), https://arxiv.org/abs/1608.03983

    Example:
        >>> round(Cosine(0.0, 1.0)(Progress(step=25, epoch=0, fraction=0.25)), 4)
        0.1464
    """

    def _share(self, u: float) -> float:
        return (1 - math.cos(math.pi * u)) / 2


@dataclass(frozen=True)
class Every(Schedule):
    r"""Switches a level on at intervals.

    .. math:: s(t) = \begin{cases} v(t) & t \geq t_0 \text{ and } (t - t_0) \bmod k < l \\ 0 & \text{else} \end{cases}

    For a constant :math:`v` the mean is :math:`v \, l / k`, so a dose of every third epoch is a third of the dose of each.

    Args:
        level: The level :math:`v` while it is on, a number or a schedule.
        every: The period :math:`k`.
        length: How long it is on, :math:`l`.
        begin: The first time, :math:`t_0`.
        unit: What times count: the ``"epoch"`` or the optimizer ``"step"``.

    Example:
        >>> often = Every(0.3, every=3)
        >>> [often(Progress(0, epoch, None)) for epoch in range(6)]
        [0.3, 0.0, 0.0, 0.3, 0.0, 0.0]
    """

    level: Level
    _: KW_ONLY
    every: int
    length: int = 1
    begin: int = 0
    unit: Literal["epoch", "step"] = "epoch"

    def __post_init__(self):
        _check_unit(self.unit, "epoch", "step")
        if not 1 <= self.length <= self.every:
            raise ValueError(f"length must be in [1, every], got length={self.length} and every={self.every}")

    def __call__(self, progress: Progress) -> float:
        # asked for also while it is off, so that a schedule that cannot work in this run fails at its start
        level = level_at(self.level, progress)
        time = _time(progress, self.unit) - self.begin
        return level if time >= 0 and time % self.every < self.length else 0.0


@dataclass(frozen=True)
class Product(Schedule):
    r"""Multiplies levels: one gives the amount and the others gate or modulate it.

    .. math:: s(t) = \prod_i s_i(t)

    Example:
        >>> pulses = Product([Linear(0.0, 1.0), Every(1.0, every=2)])
        >>> pulses(Progress(step=50, epoch=2, fraction=0.5)), pulses(Progress(step=75, epoch=3, fraction=0.75))
        (0.5, 0.0)
    """

    factors: Sequence[Level]

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))  # hashable, and no longer the caller's list

    def __call__(self, progress: Progress) -> float:
        return math.prod(level_at(factor, progress) for factor in self.factors)


@dataclass(frozen=True)
class _Amplitude(Schedule):
    """The relative amplitude of a signal-to-noise ratio in decibels."""

    snr_db: Level

    def __call__(self, progress: Progress) -> float:
        return from_snr_db(level_at(self.snr_db, progress))  # type: ignore[return-value]


@overload
def from_snr_db(snr_db: float) -> float: ...
@overload
def from_snr_db(snr_db: Schedule | Callable[[Progress], float]) -> Schedule: ...
def from_snr_db(snr_db: Level) -> float | Schedule:
    r"""Turns a signal-to-noise ratio in decibels into a relative amplitude, a schedule into a schedule.

    .. math:: \sigma / \sigma_x = 10^{-\text{SNR} / 20}

    Use it with ``relative=True``, where the level is in units of the standard deviation of each sample.

    Example:
        >>> from_snr_db(20.0)
        0.1
        >>> from_snr_db(Linear(40.0, 0.0))(Progress(step=0, epoch=0, fraction=1.0))
        1.0
    """
    return _Amplitude(snr_db) if callable(snr_db) else 10 ** (-snr_db / 20)
