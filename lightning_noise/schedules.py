"""Schedules as values: how much noise there is at each moment of a run.

A schedule is a pure function of the progress of the run and never of its own history, so it needs no state, survives a resume
and can be looked at before the training. Wherever a level is accepted, a number, a schedule or any callable of this form is.
Values are called ``start`` and ``end``; times are called ``begin``, ``until`` and ``every`` and are in the ``unit``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, overload

__all__ = [
    "Amplitude",
    "Constant",
    "Cosine",
    "Cyclic",
    "Every",
    "Exponential",
    "InverseTime",
    "Level",
    "Linear",
    "Piecewise",
    "Product",
    "Progress",
    "Schedule",
    "Window",
    "from_snr_db",
]

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
    if callable(level):
        return level(progress)
    if not hasattr(level, "__float__"):
        raise TypeError(f"a level within a schedule must be a number, a schedule or a callable, got {level!r}")
    return level


def moments(steps: int, epochs: int = 1) -> Iterator[Progress]:
    """Yields the progress before each step of a run of so many steps and epochs in all."""
    return (Progress(step, step * epochs // steps, step / steps) for step in range(steps))


def _check_unit(unit: str, *units: str) -> None:
    if unit not in units:
        raise ValueError(f"unit must be one of {', '.join(map(repr, units))}, got {unit!r}")


def _check_window(begin: float, until: float, unit: Unit) -> None:
    _check_unit(unit, "fraction", "epoch", "step")
    if not 0 <= begin < until or (unit == "fraction" and until > 1):
        limits = "0 <= begin < until" + (" <= 1" if unit == "fraction" else "")
        raise ValueError(f"it must be {limits} where the unit is {unit!r}, got {begin} and {until}")


def _latest(unit: Unit) -> float:
    """The end of a run, as far as the unit tells."""
    return 1.0 if unit == "fraction" else math.inf


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
        if self.until is None and self.unit in ("epoch", "step"):
            raise ValueError(f"until must be given where the unit is {self.unit!r}")
        _check_window(self.begin, self._until, self.unit)

    @property
    def _until(self) -> float:
        return 1.0 if self.until is None else self.until

    def __call__(self, progress: Progress) -> float:
        u = (_time(progress, self.unit) - self.begin) / (self._until - self.begin)
        if u <= 0:
            return self.start
        return self.end if u >= 1 else self._value(u)

    @abstractmethod
    def _value(self, u: float) -> float:
        """The level when the share u in (0, 1) of the time is over."""


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

    def _value(self, u: float) -> float:
        return self.start + (self.end - self.start) * u


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

    def _value(self, u: float) -> float:
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * u)) / 2


@dataclass(frozen=True)
class Exponential(_Transition):
    r"""Goes from one value to another by the same factor in equal times.

    .. math:: s(t) = a \, (b / a)^u, \quad u = \min(\max((t - t_0) / (t_1 - t_0), 0), 1)

    Its mean over the window is :math:`(b - a) / \ln(b / a)`. The arguments are those of :class:`Linear`.

    Raises:
        ValueError: As with :class:`Linear`, or a value is not positive.

    Example:
        >>> decay = Exponential(1.0, 0.25)
        >>> [decay(Progress(0, 0, fraction)) for fraction in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.25]
    """

    def __post_init__(self):
        super().__post_init__()
        if not (self.start > 0 and self.end > 0):
            raise ValueError(f"start and end must be positive, got {self.start} and {self.end}; Linear goes to 0")

    def _value(self, u: float) -> float:
        return self.start ** (1 - u) * self.end**u  # their ratio may be too large for a float


@dataclass(frozen=True)
class InverseTime(Schedule):
    r"""Falls with a power of the time, ever more slowly.

    .. math:: s(t) = \frac{a}{(1 + (t - t_0) / \tau)^\gamma}, \quad t \geq t_0

    With the defaults it is the standard deviation of annealed gradient noise, whose variance :math:`\eta / (1 + t)^{0.55}`
    falls with the optimizer step, for :math:`a = \sqrt{\eta}`; the source takes :math:`\eta` = 0.01, 0.3 or 1. It needs no end
    of the run.

    Args:
        start: The value :math:`a` up to ``begin``.
        exponent: The power :math:`\gamma` of the amplitude, half that of the variance.
        timescale: The time :math:`\tau` in which :math:`1 + (t - t_0) / \tau` doubles for the first time.
        begin: The time :math:`t_0`.
        unit: What times count: the ``"fraction"`` of the run, the ``"epoch"`` or the optimizer ``"step"``.

    Raises:
        ValueError: ``begin`` is negative, or ``timescale`` or ``exponent`` not positive.

    References:
        Adding Gradient Noise Improves Learning for Very Deep Networks (Neelakantan et al., 2015),
        https://arxiv.org/abs/1511.06807

    Example:
        >>> annealed = InverseTime(1.0)
        >>> [round(annealed(Progress(step, 0, None)), 3) for step in (0, 1, 100, 10_000)]
        [1.0, 0.826, 0.281, 0.079]
    """

    start: float
    _: KW_ONLY
    exponent: float = 0.275
    timescale: float = 1.0
    begin: float = 0.0
    unit: Unit = "step"

    def __post_init__(self):
        _check_window(self.begin, _latest(self.unit), self.unit)
        if not (self.timescale > 0 and self.exponent > 0):
            raise ValueError(f"timescale and exponent must be positive, got {self.timescale} and {self.exponent}")

    def __call__(self, progress: Progress) -> float:
        time = max(_time(progress, self.unit) - self.begin, 0.0)
        return self.start / (1 + time / self.timescale) ** self.exponent


@dataclass(frozen=True)
class Cyclic(Schedule):
    r"""Goes from one value to another and back, again and again, at constant speed.

    .. math:: s(t) = a + (b - a) (1 - |1 - 2 u|), \quad u = \frac{(t - t_0) \bmod k}{k}, \quad t \geq t_0

    Its mean over a cycle is :math:`(a + b) / 2`. A cycle as long as the run, ``every=1.0``, is one rise and fall.

    Args:
        start: The value :math:`a` at both ends of a cycle, and up to ``begin``.
        end: The value :math:`b` in the middle of a cycle.
        every: The length of a cycle, :math:`k`.
        begin: The time :math:`t_0`.
        unit: What times count: the ``"fraction"`` of the run, the ``"epoch"`` or the optimizer ``"step"``.

    Raises:
        ValueError: ``begin`` is negative or ``every`` not positive.

    References:
        Cyclical Learning Rates for Training Neural Networks (Smith, 2017), https://arxiv.org/abs/1506.01186

    Example:
        >>> wave = Cyclic(0.0, 0.4, every=4, unit="epoch")
        >>> [wave(Progress(0, epoch, None)) for epoch in range(6)]
        [0.0, 0.2, 0.4, 0.2, 0.0, 0.2]
    """

    start: float
    end: float
    _: KW_ONLY
    every: float
    begin: float = 0.0
    unit: Unit = "fraction"

    def __post_init__(self):
        _check_window(self.begin, _latest(self.unit), self.unit)
        if not self.every > 0:
            raise ValueError(f"every must be positive, got {self.every}")

    def __call__(self, progress: Progress) -> float:
        time = max(_time(progress, self.unit) - self.begin, 0.0)
        u = time % self.every / self.every
        return self.start + (self.end - self.start) * (1 - abs(1 - 2 * u))


@dataclass(frozen=True)
class Window(Schedule):
    r"""Switches a level on between two times.

    .. math:: s(t) = \begin{cases} v(t) & t_0 \leq t < t_1 \\ 0 & \text{else} \end{cases}

    For a constant :math:`v` the mean over a run of length :math:`T` is :math:`v \, (t_1 - t_0) / T`. With ``until`` alone the
    last part of the training is clean, with ``begin`` alone the first is.

    Args:
        level: The level :math:`v` while it is on, a number or a schedule, whose times are those of the run.
        begin: The first time, :math:`t_0`.
        until: The time from which it is off, :math:`t_1`; left out, it stays on.
        unit: What times count: the ``"fraction"`` of the run, the ``"epoch"`` or the optimizer ``"step"``.

    Raises:
        ValueError: Times are not in order, or not in [0, 1] where the unit is ``"fraction"``.

    Example:
        >>> middle = Window(0.3, begin=2, until=4, unit="epoch")
        >>> [middle(Progress(0, epoch, None)) for epoch in range(6)]
        [0.0, 0.0, 0.3, 0.3, 0.0, 0.0]
    """

    level: Level
    _: KW_ONLY
    begin: float = 0.0
    until: float | None = None
    unit: Unit = "fraction"

    def __post_init__(self):
        _check_window(self.begin, _latest(self.unit) if self.until is None else self.until, self.unit)

    def __call__(self, progress: Progress) -> float:
        # asked for also while it is off, so that a schedule that cannot work in this run fails at its start
        level, time = level_at(self.level, progress), _time(progress, self.unit)
        return level if self.begin <= time and (self.until is None or time < self.until) else 0.0


@dataclass(frozen=True)
class Piecewise(Schedule):
    r"""Strings schedules together, each with a clock of its own.

    .. math:: s(t) = s_i(t - m_i), \quad m_i \leq t < m_{i + 1}, \quad m_0 = 0

    In epochs and steps each schedule counts from where it takes over, and the other units stay those of the run. In fractions
    each takes its piece for a run of its own, :math:`s_i((t - m_i) / (m_{i + 1} - m_i))` with a last :math:`m` of 1, so that
    ``Linear(0.0, 0.5)`` is at 0.5 where its piece ends.

    Args:
        levels: The levels one after another, numbers or schedules.
        milestones: When the second and each further one takes over, :math:`m_1 < m_2 < \dots`.
        unit: What milestones count: the ``"fraction"`` of the run, the ``"epoch"`` or the optimizer ``"step"``.

    Raises:
        ValueError: There is not one milestone fewer than levels, or milestones do not rise, are not positive, or not below 1
            where the unit is ``"fraction"`` and whole where it is not.

    Example:
        >>> rise, fall = Linear(0.0, 0.4, until=2, unit="epoch"), Exponential(0.4, 0.1, until=2, unit="epoch")
        >>> plan = Piecewise([rise, 0.4, fall], milestones=[2, 4], unit="epoch")
        >>> [plan(Progress(0, epoch, None)) for epoch in range(8)]
        [0.0, 0.2, 0.4, 0.4, 0.4, 0.2, 0.1, 0.1]
    """

    levels: Sequence[Level]
    milestones: Sequence[float]
    _: KW_ONLY
    unit: Unit = "fraction"

    def __post_init__(self):
        for name in ("levels", "milestones"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # hashable, and no longer the caller's lists
        if len(self.milestones) != len(self.levels) - 1:
            raise ValueError(
                f"there must be one milestone fewer than levels, got {len(self.milestones)} for {len(self.levels)} levels"
            )
        for begin, until in pairwise(self._edges):
            _check_window(begin, until, self.unit)
        if self.unit != "fraction" and any(milestone % 1 for milestone in self.milestones):
            raise ValueError(f"milestones must be whole where the unit is {self.unit!r}, got {self.milestones}")

    @property
    def _edges(self) -> tuple[float, ...]:
        return (0.0, *self.milestones, _latest(self.unit))

    def __call__(self, progress: Progress) -> float:
        time = _time(progress, self.unit)
        # all are asked, so that a schedule that cannot work in this run fails at its start
        levels = [
            level_at(level, progress._replace(**{self.unit: self._local(time, *edges)}))
            for level, edges in zip(self.levels, pairwise(self._edges), strict=True)
        ]
        return levels[bisect_right(self.milestones, time)]

    def _local(self, time: float, begin: float, until: float) -> float:
        if self.unit == "fraction":
            return min(max((time - begin) / (until - begin), 0.0), 1.0)
        return max(int(time - begin), 0)


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
        if not self.factors:
            raise ValueError("there must be at least one factor")

    def __call__(self, progress: Progress) -> float:
        return math.prod(level_at(factor, progress) for factor in self.factors)


@dataclass(frozen=True)
class Amplitude(Schedule):
    r"""The relative amplitude of a signal-to-noise ratio in decibels, which may itself be a schedule.

    .. math:: s(t) = 10^{-\text{SNR}(t) / 20}

    At 20 dB the amplitude is 0.1, at 0 dB noise and signal are equally strong, and an infinite ratio is no noise. It is the
    level of :class:`~lightning_noise.noise.SNR`, and with ``relative="std"`` of noises that are additive. A ratio of 0 is much
    noise and not none, so what switches off goes around it: ``Window(Amplitude(20.0), until=0.8)``.

    Args:
        snr_db: The ratio in decibels, a number or a schedule.

    Example:
        >>> Amplitude(snr_db=20.0)(Progress(step=0, epoch=0, fraction=None))
        0.1
        >>> Amplitude(Linear(40.0, 0.0))(Progress(step=50, epoch=0, fraction=0.5))
        0.1
    """

    snr_db: Level

    def __call__(self, progress: Progress) -> float:
        return from_snr_db(level_at(self.snr_db, progress))  # type: ignore[return-value]


@overload
def from_snr_db(snr_db: float) -> float: ...
@overload
def from_snr_db(snr_db: Schedule | Callable[[Progress], float]) -> Amplitude: ...
def from_snr_db(snr_db: Level) -> float | Amplitude:
    r"""Turns a signal-to-noise ratio in decibels into a relative amplitude, a schedule into an :class:`Amplitude`.

    .. math:: \sigma / \sigma_x = 10^{-\text{SNR} / 20}

    It is the level of :class:`~lightning_noise.noise.SNR`, and with ``relative="std"`` of noises that are additive.

    Example:
        >>> from_snr_db(20.0)
        0.1
        >>> from_snr_db(Linear(40.0, 0.0))(Progress(step=0, epoch=0, fraction=1.0))
        1.0
    """
    return Amplitude(snr_db) if callable(snr_db) else 10 ** (-snr_db / 20)
