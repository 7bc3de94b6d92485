"""Schedules as values: the level of a noise at each moment of a run.

A schedule is a pure function of the progress of the run. So it needs no state, survives a resume, and can be plotted before
training. Wherever a level is accepted, a number, a schedule or any callable with this signature is accepted. Values are named
``start`` and ``end``. Times are named ``begin``, ``until`` and ``every``, and are in the ``unit``. Times that are negative, not
in order or, in fractions, above 1 are a ValueError. A schedule in fractions needs a run whose end is known when it starts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, overload

from lightning_noise._checks import check_counts, check_numbers, is_number, plain
from lightning_noise._usage import UNKNOWN_END, Value, nearest, typed, with_types

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

    The fraction is the largest of the known shares of ``max_steps``, ``max_time`` and ``max_epochs``. The share of
    ``max_epochs`` is known if the training loader has a length, or else from the second epoch on. The share of ``max_time`` is
    in thousandths.

    Attributes:
        step: The number of optimizer steps taken. In manual optimization, which may have several optimizers, the number of
            batches.
        epoch: The epoch, counted from 0.
        fraction: The share of the run that is over, in [0, 1], or ``None`` if the end of the run is unknown.
    """

    step: int
    epoch: int
    fraction: float | None


@with_types
class Schedule(Value, ABC):
    """A level for each moment of a run. A subclass is a frozen dataclass that implements ``__call__``."""

    usage: ClassVar[str] = "InputNoise(noise.Gaussian(), {})"

    @abstractmethod
    def __call__(self, progress: Progress) -> float:
        """Returns the level at this moment."""

    def mean_dose(self, *, steps: int, epochs: int | None = None) -> float:
        r"""Returns the mean level :math:`\frac{1}{n} \sum_{t=0}^{n-1} s(t)` of a run of :math:`n` steps.

        Compare schedules of different shape at equal mean dose. A schedule in epochs needs the number of epochs.

        Example:
            >>> Linear(0.0, 1.0).mean_dose(steps=101)
            0.495...
        """
        return math.fsum(map(self, moments(steps, epochs))) / steps


_GOLDEN = (math.sqrt(5) - 1) / 2

Level = float | Schedule | Callable[[Progress], float]


def level_at(level: Level, progress: Progress) -> float:
    """Returns the number itself, or the value of the schedule at a moment."""
    return level(progress) if callable(level) else level


def moments(steps: int, epochs: int | None = None, most: int | None = None) -> Iterator[Progress]:
    """Returns the progress before each step of a run. The epoch is ``None`` if the number of epochs is.

    If there are more than ``most`` steps, the run is divided into ``most`` equal stretches. One step is taken from each, at
    another place in each stretch, so that the mean level of a periodic schedule stays the same.
    """
    check_counts(steps=steps, epochs=epochs, most=most)
    epoch: Any = (lambda step: None) if epochs is None else (lambda step: step * epochs // steps)
    taken = range(steps)
    if most is not None and steps > most:
        taken = [int(steps / most * (i + i * _GOLDEN % 1)) for i in range(most)]
    return (Progress(step, epoch(step), step / steps) for step in taken)


def _check_unit(unit: str, *units: str) -> None:
    if unit not in units:
        raise ValueError(
            f"unit must be one of {', '.join(map(repr, units))}, got {unit!r}; type unit={nearest(unit, units) or units[0]!r}"
        )


def _check_given(**values: Any) -> None:
    """Raises a TypeError if a value is not a number."""
    for name, value in values.items():
        if value is None:
            raise TypeError(f"{name} must be a number, got None")
    check_numbers(**values)


def _check_window(schedule: Any, begin: float, until: float, *others: float) -> None:
    unit = schedule.unit
    _check_unit(unit, "fraction", "epoch", "step")
    if unit == "fraction" and max(begin, until, *others) > 1:
        raise ValueError(
            f"times in fractions of the run must be at most 1, got {typed(schedule)}; type {typed(schedule, unit='epoch')} for "
            "epochs, or unit='step' for optimizer steps"
        )
    if not 0 <= begin < until:
        limits = "0 <= begin < until" + (" <= 1" if unit == "fraction" else "")
        raise ValueError(f"times must satisfy {limits} for unit={unit!r}, got begin={begin} and until={until}")


def _latest(unit: Unit) -> float:
    return 1.0 if unit == "fraction" else math.inf


def _check_levels(*levels: Level) -> None:
    for level in levels:
        if not (callable(level) or is_number(level)):
            raise TypeError(f"a level within a schedule must be a number, a schedule or a callable, got {level!r}")


def _time(schedule: Any, progress: Progress) -> float:
    """Returns the time in the unit of the schedule."""
    if (time := getattr(progress, schedule.unit)) is not None:
        return time
    if schedule.unit == "epoch":
        raise ValueError(f"{schedule} is in epochs, whose number must be given: type epochs=…")
    raise ValueError(
        f"a schedule in fractions needs a run with a known end, but {UNKNOWN_END}; or type the times in steps, such as "
        f"schedules.{_in_steps(schedule)}"
    )


def _in_steps(schedule: Any, steps: int = 1000) -> str:
    """Returns the line that makes a schedule in fractions one of a run of some steps."""
    values: dict[str, Any] = {field.name: getattr(schedule, field.name) for field in fields(schedule)} | {"unit": "step"}
    if isinstance(schedule, _Transition) and schedule.until is None:
        values["until"] = 1
    for name in {"begin", "until", "every", "timescale"} & values.keys():
        values[name] = values[name] and round(values[name] * steps)
    if "milestones" in values:
        values["milestones"] = [round(milestone * steps) for milestone in values["milestones"]]
    return f"{type(schedule).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


@dataclass(frozen=True)
class Constant(Schedule):
    """The same level throughout.

    Example:
        >>> Constant(0.3)(Progress(step=7, epoch=0, fraction=None))
        0.3
    """

    value: float

    def __post_init__(self):
        _check_given(value=self.value)

    def __call__(self, progress: Progress) -> float:
        return self.value


@dataclass(frozen=True)
class _Transition(Schedule):
    """A transition between two values, constant before ``begin`` and after ``until``."""

    start: float
    end: float
    _: KW_ONLY
    begin: float = 0.0
    until: float | None = None
    unit: Unit = "fraction"

    @classmethod
    def _advise(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        return super()._advise(args if len(args) != 1 or "end" in kwargs else (0.0, *args), kwargs)  # a rise from 0

    def __post_init__(self):
        _check_given(start=self.start, end=self.end, begin=self.begin)
        check_numbers(until=self.until)
        if self.until is None and self.unit in ("epoch", "step"):
            raise ValueError(f"until must be given for unit={self.unit!r}, got None; type {typed(self, until=10)}")
        _check_window(self, self.begin, 1.0 if self.until is None else self.until)

    def __call__(self, progress: Progress) -> float:
        until = 1.0 if self.until is None else self.until
        u = (_time(self, progress) - self.begin) / (until - self.begin)
        if u <= 0:
            return self.start
        return self.end if u >= 1 else self._value(u)

    @abstractmethod
    def _value(self, u: float) -> float:
        """Returns the level after the share u in (0, 1) of the transition."""


@dataclass(frozen=True)
class Linear(_Transition):
    r"""Goes from one value to another at constant speed.

    .. math:: s(t) = a + (b - a) \, u, \quad u = \min(\max((t - t_0) / (t_1 - t_0), 0), 1)

    Its mean over the window is :math:`(a + b) / 2`.

    Args:
        start: The value :math:`a` before ``begin``.
        end: The value :math:`b` from ``until`` on.
        begin: The time :math:`t_0`.
        until: The time :math:`t_1`. Default: the end of the run, if the unit is ``"fraction"``.
        unit: The unit of times: the ``"fraction"`` of the run, the ``"epoch"`` or the optimizer ``"step"``.

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

    Its mean over the window is :math:`(a + b) / 2`. The arguments are those of :class:`Linear`.

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
    r"""Goes from one positive value to another by a constant factor per time.

    .. math:: s(t) = a \, (b / a)^u, \quad u = \min(\max((t - t_0) / (t_1 - t_0), 0), 1)

    Its mean over the window is :math:`(b - a) / \ln(b / a)`. The arguments are those of :class:`Linear`.

    Example:
        >>> decay = Exponential(1.0, 0.25)
        >>> [decay(Progress(0, 0, fraction)) for fraction in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.25]
    """

    def __post_init__(self):
        super().__post_init__()
        if not (self.start > 0 and self.end > 0):
            raise ValueError(
                f"start and end must be positive, got {self.start} and {self.end}; for 0 type "
                f"schedules.Linear({self.start}, {self.end})"
            )

    def _value(self, u: float) -> float:
        return self.start ** (1 - u) * self.end**u  # their ratio may be too large for a float


@dataclass(frozen=True)
class InverseTime(Schedule):
    r"""Falls with a power of the time.

    .. math:: s(t) = \frac{a}{(1 + (t - t_0) / \tau)^\gamma}, \quad t \geq t_0

    With the defaults and :math:`a = \sqrt{\eta}`, the level is the standard deviation of annealed gradient noise, whose
    variance is :math:`\eta / (1 + t)^{0.55}` at optimizer step :math:`t`. The paper uses :math:`\eta` = 0.01, 0.3 or 1. The end
    of the run may be unknown, except in fractions.

    Args:
        start: The value :math:`a` before ``begin``.
        exponent: The power :math:`\gamma` of the amplitude, half the power of the variance.
        timescale: The time :math:`\tau` until :math:`1 + (t - t_0) / \tau` is 2.
        begin: The time :math:`t_0`.
        unit: The unit of times, as in :class:`Linear`.

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
        check_numbers(start=self.start, exponent=self.exponent, timescale=self.timescale, begin=self.begin)
        _check_window(self, self.begin, _latest(self.unit))
        if not (self.timescale > 0 and self.exponent > 0):
            raise ValueError(f"timescale and exponent must be positive, got {self.timescale} and {self.exponent}")

    def __call__(self, progress: Progress) -> float:
        time = max(_time(self, progress) - self.begin, 0.0)
        return self.start / (1 + time / self.timescale) ** self.exponent


@dataclass(frozen=True)
class Cyclic(Schedule):
    r"""Goes from one value to another and back in cycles, at constant speed.

    .. math:: s(t) = a + (b - a) (1 - |1 - 2 u|), \quad u = \frac{(t - t_0) \bmod k}{k}, \quad t \geq t_0

    Its mean over a cycle is :math:`(a + b) / 2`. With ``every=1.0`` the run is one rise and fall.

    Args:
        start: The value :math:`a` at both ends of a cycle, and before ``begin``.
        end: The value :math:`b` in the middle of a cycle.
        every: The length of a cycle, :math:`k`.
        begin: The time :math:`t_0`.
        unit: The unit of times, as in :class:`Linear`.

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
        check_numbers(start=self.start, end=self.end, every=self.every, begin=self.begin)
        _check_window(self, self.begin, _latest(self.unit), self.every)
        if not self.every > 0:
            raise ValueError(f"every must be positive, got {self.every}")

    def __call__(self, progress: Progress) -> float:
        time = max(_time(self, progress) - self.begin, 0.0)
        u = time % self.every / self.every
        return self.start + (self.end - self.start) * (1 - abs(1 - 2 * u))


@dataclass(frozen=True)
class Window(Schedule):
    r"""Switches a level on between two times.

    .. math:: s(t) = \begin{cases} v(t) & t_0 \leq t < t_1 \\ 0 & \text{else} \end{cases}

    For a constant :math:`v`, the mean over a run of length :math:`T` is :math:`v \, (t_1 - t_0) / T`. With ``until`` alone, the
    last part of the training is clean; with ``begin`` alone, the first part.

    Args:
        level: The level :math:`v` while on: a number, or a schedule with the times of the run.
        begin: The first time on, :math:`t_0`.
        until: The first time off, :math:`t_1`. Default: never.
        unit: The unit of times, as in :class:`Linear`.

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
        _check_levels(self.level)
        check_numbers(begin=self.begin, until=self.until)
        _check_window(self, self.begin, _latest(self.unit) if self.until is None else self.until)

    def __call__(self, progress: Progress) -> float:
        # called while off, too, so that a schedule that cannot work in this run fails at its start
        level, time = level_at(self.level, progress), _time(self, progress)
        return level if self.begin <= time and (self.until is None or time < self.until) else 0.0


@dataclass(frozen=True)
class Piecewise(Schedule):
    r"""Joins schedules one after another, each with its own clock.

    .. math:: s(t) = s_i(t - m_i), \quad m_i \leq t < m_{i + 1}, \quad m_0 = 0

    In epochs and steps, each schedule counts from its milestone, and the other units stay those of the run. In fractions, each
    piece is a run of its own: :math:`s_i((t - m_i) / (m_{i + 1} - m_i))`, where the last :math:`m` is 1. So
    ``Linear(0.0, 0.5)`` reaches 0.5 at the end of its piece.

    Args:
        levels: The levels in order, numbers or schedules.
        milestones: The times at which the second and each later level begins, :math:`0 < m_1 < m_2 < \dots`. In epochs and
            steps, they are whole numbers.
        unit: The unit of milestones.

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
            object.__setattr__(self, name, tuple(plain(getattr(self, name))))  # hashable, and not the caller's lists
        _check_levels(*self.levels)
        check_numbers(**{f"milestone {i}": milestone for i, milestone in enumerate(self.milestones)})
        if len(self.milestones) != len(self.levels) - 1:
            raise ValueError(
                f"there must be a milestone for each level but the first, got {len(self.milestones)} milestones for "
                f"{len(self.levels)} levels"
            )
        for begin, until in pairwise(self._edges):
            _check_window(self, begin, until)
        if self.unit != "fraction" and any(milestone % 1 for milestone in self.milestones):
            raise ValueError(f"milestones must be whole numbers for unit={self.unit!r}, got {self.milestones}")

    @property
    def _edges(self) -> tuple[float, ...]:
        return (0.0, *self.milestones, _latest(self.unit))

    def __call__(self, progress: Progress) -> float:
        time = _time(self, progress)
        # all are called, so that a schedule that cannot work in this run fails at its start
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

    For a constant :math:`v`, the mean is :math:`v \, l / k`: noise in every third epoch is a third of the dose.

    Args:
        level: The level :math:`v` while on, a number or a schedule.
        every: The period :math:`k`.
        length: The time on in each period, :math:`l`.
        begin: The first time on, :math:`t_0`.
        unit: The unit of times, ``"epoch"`` or ``"step"``.

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
        _check_levels(self.level)
        check_numbers(every=self.every, length=self.length, begin=self.begin)
        _check_window(self, self.begin, math.inf)
        if not 1 <= self.length <= self.every:
            raise ValueError(
                f"length must be in [1, every], got length={self.length} and every={self.every}; type "
                f"{typed(self, every=max(2, math.ceil(self.length)))}"
            )

    def __call__(self, progress: Progress) -> float:
        # called while off, too, so that a schedule that cannot work in this run fails at its start
        level = level_at(self.level, progress)
        time = _time(self, progress) - self.begin
        return level if time >= 0 and time % self.every < self.length else 0.0


@dataclass(frozen=True)
class Product(Schedule):
    r"""Multiplies levels, for example a schedule and a gate.

    .. math:: s(t) = \prod_i s_i(t)

    Example:
        >>> pulses = Product([Linear(0.0, 1.0), Every(1.0, every=2)])
        >>> pulses(Progress(step=50, epoch=2, fraction=0.5)), pulses(Progress(step=75, epoch=3, fraction=0.75))
        (0.5, 0.0)
    """

    factors: Sequence[Level]

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(plain(self.factors)))  # hashable, and not the caller's list
        _check_levels(*self.factors)
        if not self.factors:
            raise ValueError("factors must hold at least one level, got none")

    def __call__(self, progress: Progress) -> float:
        return math.prod(level_at(factor, progress) for factor in self.factors)


@dataclass(frozen=True)
class Amplitude(Schedule):
    r"""Turns a signal-to-noise ratio in decibels into a relative amplitude.

    .. math:: s(t) = 10^{-\text{SNR}(t) / 20}

    The amplitude is the level of :class:`~lightning_noise.noise.SNR`, and of additive noises with ``relative="std"``. At 20 dB
    the amplitude is 0.1. At 0 dB noise and signal are equally strong. An infinite ratio is no noise; to switch the noise off,
    wrap the amplitude: ``Window(Amplitude(20.0), until=0.8)``.

    Example:
        >>> Amplitude(Linear(40.0, 0.0))(Progress(step=50, epoch=0, fraction=0.5))
        0.1
    """

    snr_db: Level

    def __post_init__(self):
        _check_levels(self.snr_db)

    def __call__(self, progress: Progress) -> float:
        return from_snr_db(level_at(self.snr_db, progress))  # type: ignore[return-value]


@overload
def from_snr_db(snr_db: float) -> float: ...
@overload
def from_snr_db(snr_db: Schedule | Callable[[Progress], float]) -> Amplitude: ...
def from_snr_db(snr_db: Level) -> float | Amplitude:
    """Returns the amplitude of a signal-to-noise ratio in decibels, or the :class:`Amplitude` of a schedule.

    Example:
        >>> from_snr_db(20.0)
        0.1
    """
    return Amplitude(snr_db) if callable(snr_db) else 10 ** (-snr_db / 20)
