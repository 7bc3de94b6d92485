"""Rules of adaptive levels.

A rule says how a level moves after a validation. It is a value and holds no state: the callback that owns the level keeps the
state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

from lightning_noise._checks import check_numbers

__all__ = ["Decision", "Governor", "Observation", "Rule", "SignedGap", "State", "TaskFacts"]

State = dict[str, Any]  # of JSON primitives, among them the "level"


class TaskFacts(Protocol):
    """The facts that a rule reads of a task of :mod:`lightning_noise.tasks`.

    Attributes:
        has_classes: Whether predictions are classes, so that there are an accuracy and a confidence.
        knows_chance: Whether the task knows the metric of the best constant guess.
    """

    has_classes: ClassVar[bool]
    knows_chance: ClassVar[bool]

    @property
    def governed(self) -> str:
        """The name of the metric that is observed."""
        ...


class Observation(NamedTuple):
    """What a validation showed of a model at the current level.

    Attributes:
        clean: The metric without noise.
        boundary: The metric under the noise at the current level. NaN if the model cannot be evaluated under the noise.
        standard_error: The standard error of the difference between ``clean`` and the best ``clean`` so far, which is paired
            because both are of the same samples. Infinite if it is not known.
        signed_gap: Mean confidence minus accuracy without noise. NaN if there is no confidence.
        n: The number of samples.
        signed_gap_error: The standard error of ``signed_gap``.
        chance: The metric of the best constant guess. ``None`` if the task does not know it.
    """

    clean: float
    boundary: float
    standard_error: float
    signed_gap: float
    n: int
    signed_gap_error: float = 0.0
    chance: float | None = None


class Decision(NamedTuple):
    """What a rule observed in a validation, and what it did.

    Attributes:
        step: The step on the x axis of the logs.
        level: The level during the validation.
        clean: The metric without noise.
        boundary: The metric under the noise at the level.
        reason: What the rule did, one of ``Rule.reasons``.
        next_level: The level after the validation.
        followed: The number that the rule follows, or ``None`` if it is not finite.
    """

    step: int
    level: float
    clean: float
    boundary: float
    reason: str
    next_level: float
    followed: float | None = None


class Rule(ABC):
    """Moves a level from one validation to the next. A subclass is a frozen dataclass.

    Attributes:
        reasons: The words with which ``update`` says what it did.
        follows: The name of the number that the rule follows, which is also its log key.
        needs_boundary: Whether the rule reads the metric under noise, which target noise, gradient noise and mixing lack.
    """

    reasons: ClassVar[tuple[str, ...]]
    follows: ClassVar[str] = "clean"
    needs_boundary: ClassVar[bool] = True

    @abstractmethod
    def init(self, level: float) -> State:
        """Returns the state before the first validation. Its ``"level"`` is the level."""

    @abstractmethod
    def update(self, state: State, observation: Observation) -> tuple[State, str]:
        """Returns the state after a validation, as a new dictionary, and what was done, one of ``reasons``."""

    def check(self, task: TaskFacts) -> None:  # noqa: B027  # most rules suit every task
        """Raises a ValueError if the rule cannot follow the metric of the task."""

    @property
    def band(self) -> tuple[float, float] | None:
        """The values of the followed number between which the level stays, for figures, or ``None``."""
        return None

    def limit(self, max_level: float) -> Rule:
        """Returns the rule with no level above ``max_level``. Default: the rule itself."""
        return self

    def measure(self, observation: Observation) -> float:
        """Returns the number that the rule follows. Default: the attribute of the observation named by ``follows``."""
        return getattr(observation, self.follows)

    def describe(self, observation: Observation) -> str:
        """Returns a sentence, without its full stop, that says what was observed."""
        return f"{self.follows.replace('_', ' ')} is {self.measure(observation):.3g}"


@dataclass(frozen=True)
class Governor(Rule):
    r"""Raises the level while the model retains its skill under the noise, and lowers it otherwise.

    .. math:: s(M) = \frac{M - M_\text{chance}}{M_\text{best} - M_\text{chance}}, \quad
        r = \frac{s(M_\text{boundary})}{s(M_\text{clean})}

    The skill :math:`s` of a metric is 0 at chance and 1 at best, whether larger or smaller values are better. The retention
    :math:`r` is the share of the clean skill that is left under the noise at the current level. Retention needs no second run
    to compare with. Raising the noise while the clean metric is healthy does not work: metrics improve during training, which
    hides the harm of the noise.

    After each validation, the first condition that holds decides. A decrease multiplies the level by ``factor``:

    =======================  ===================================================================================
    ``non_finite``           a metric is not finite: two decreases
    ``warmup``               one of the first ``warmup`` validations: no change
    ``below_min_skill``      the clean skill is below ``min_skill``, so retention means nothing: two decreases
    ``cooldown``             one of the ``cooldown`` validations after a change: no change
    ``clean_skill_dropped``  the average clean skill is below its best by more than the tolerance: a decrease
    ``lowered``              the average of :math:`r` is below ``shrink_below``: a decrease
    ``raised``               the average of :math:`r` is above ``grow_above``: the level plus ``step``
    ``held``                 otherwise: no change
    =======================  ===================================================================================

    Averages are exponential. The average retention starts anew at each change of the level. The best clean skill is the highest
    average so far. The average may fall below the best by ``tolerance`` plus ``z`` standard errors of the paired difference. If
    the standard error is unknown, as for :class:`~lightning_noise.tasks.Custom`, only a ``z`` of 0 detects a drop. If such
    drops have brought the level below one ``step``, the noise is not their cause, and the best is forgotten. Counts are of
    validations in which the level can move. In a run of few epochs, validate more often (``val_check_interval``).

    The thresholds are a preference, not an optimum. In our experiments, 0.90 and 0.95 were safe for input and weight noise;
    0.85 and 0.90 trade clean skill for robustness. Start at level 0, because weights that are noisy from the start may learn
    nothing. Report final results on test data, because the validation data have chosen the level.

    If nearly all targets are of one class, few samples make the skill above chance. Then follow a metric in which all classes
    weigh alike, such as a balanced accuracy, by ``tasks.Custom``.

    Args:
        chance: The metric of the best constant guess. Default: what the task says, the share of the most frequent class
            among the held-out targets, and 0 for the :math:`R^2` of a regression. ``tasks.Custom`` needs it.
        best: The best value of the metric: 1 for an accuracy, 0 for an error.
        shrink_below: The retention below which the level is lowered.
        grow_above: The retention above which the level is raised.
        step: The increase of the level. The default suits inputs in [0, 1], and weights with ``relative="std"``. Choose a
            fraction of the level that you expect.
        factor: The factor of a decrease.
        lo: The lowest level.
        hi: The highest level.
        average: The weight of the past in the averages.
        warmup: The number of validations before the level first moves.
        cooldown: The number of validations without a change after each change.
        min_skill: The clean skill below which the level only falls.
        tolerance: The drop of the clean skill below its best that is accepted.
        z: The number of standard errors that count as chance.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Solving Rubik's Cube with a Robot Hand (OpenAI et al., 2019), https://arxiv.org/abs/1910.07113, for performance at the
        boundary of the training distribution

        Training Generative Adversarial Networks with Limited Data (Karras et al., 2020), https://arxiv.org/abs/2006.06676

    Example:
        >>> governor = Governor(chance=0.1, warmup=0)
        >>> state = governor.init(0.3)
        >>> observation = Observation(clean=0.9, boundary=0.88, standard_error=0.01, signed_gap=0.02, n=500)
        >>> state, reason = governor.update(state, observation)
        >>> reason, round(state["level"], 2), governor.describe(observation)
        ('raised', 0.45, '98 % of the clean skill is retained')
    """

    reasons: ClassVar[tuple[str, ...]] = (
        "held",
        "raised",
        "lowered",
        "clean_skill_dropped",
        "below_min_skill",
        "non_finite",
        "warmup",
        "cooldown",
    )
    follows: ClassVar[str] = "retention"

    chance: float | None = None
    best: float = 1.0
    _: KW_ONLY
    shrink_below: float = 0.90
    grow_above: float = 0.95
    step: float = 0.15
    factor: float = 0.8
    lo: float = 0.0
    hi: float = math.inf
    average: float = 0.6
    warmup: int = 3
    cooldown: int = 0
    min_skill: float = 0.3
    tolerance: float = 0.01
    z: float = 1.64

    def __post_init__(self):
        check_numbers(**asdict(self))
        scale = self.best if self.chance is None else self.best - self.chance
        ranges = {
            "two different finite numbers as chance and best": math.isfinite(scale) and self.chance != self.best,
            "0 <= shrink_below <= grow_above": 0 <= self.shrink_below <= self.grow_above,
            "0 < step and 0 <= factor < 1": self.step > 0 and 0 <= self.factor < 1,
            "0 <= lo <= hi": 0 <= self.lo <= self.hi,
            "0 <= average < 1 and 0 < min_skill < 1": 0 <= self.average < 1 and 0 < self.min_skill < 1,
            "no negative warmup, cooldown, tolerance or z": min(self.warmup, self.cooldown, self.tolerance, self.z) >= 0,
        }
        for wanted, holds in ranges.items():
            if not holds:
                raise ValueError(f"a Governor needs {wanted}, got {self}")

    def init(self, level: float) -> State:
        if not self.lo <= level <= self.hi:
            raise ValueError(f"the level must start in [{self.lo:g}, {self.hi:g}], got start={level:g}")
        averages = {"skill": 0.0, "n_skill": 0, "retention": 0.0, "n_retention": 0}
        return {"level": level, "validations": 0, "best_skill": -math.inf, "resting": 0, **averages}

    def update(self, state: State, observation: Observation) -> tuple[State, str]:
        if not (math.isfinite(observation.clean) and math.isfinite(observation.boundary)):
            return self._move(state, state["level"] * self.factor**2), "non_finite"
        state, skill = self._average(state, observation), self._skill(observation.clean, observation)
        if state["validations"] <= self.warmup:
            return state, "warmup"
        if skill < self.min_skill:
            return self._move(state, state["level"] * self.factor**2), "below_min_skill"
        if state["resting"] > 0:
            return state | {"resting": state["resting"] - 1}, "cooldown"
        if state["best_skill"] - self._mean(state, "skill") > self._accepted_drop(observation):
            state = self._move(state, state["level"] * self.factor)
            return state | {"best_skill": -math.inf} if state["level"] < self.step else state, "clean_skill_dropped"
        if (retention := self._mean(state, "retention")) < self.shrink_below:
            return self._move(state, state["level"] * self.factor), "lowered"
        if retention > self.grow_above and state["level"] < self.hi:
            return self._move(state, state["level"] + self.step), "raised"
        return state, "held"

    def check(self, task: TaskFacts) -> None:
        if self.chance is None and not task.knows_chance:
            raise ValueError(f"the metric {task.governed!r} of a constant guess is not known: give Governor(chance=…, best=…)")
        if self.chance is None:
            return
        # otherwise the level would move the wrong way
        if task.has_classes and not 0 <= self.chance < self.best <= 1:
            raise ValueError(f"an accuracy needs 0 <= chance < best <= 1, such as 0.5 and 1, got {self}")
        if task.governed == "r2" and not self.chance < self.best <= 1:
            raise ValueError(
                f"the R2 of a regression needs chance < best <= 1, such as 0 and 1, got {self}; for an error give "
                "tasks.Custom(MeanSquaredError()), the variance of the target as chance, and best=0"
            )

    @property
    def band(self) -> tuple[float, float]:
        return self.shrink_below, self.grow_above

    def limit(self, max_level: float) -> Governor:
        return replace(self, hi=min(self.hi, max_level))

    def measure(self, observation: Observation) -> float:
        clean = self._skill(observation.clean, observation)
        return self._skill(observation.boundary, observation) / clean if clean > 0 else math.nan

    def describe(self, observation: Observation) -> str:
        if not math.isfinite(observation.clean + observation.boundary):
            return "a metric is not finite"
        if (skill := self._skill(observation.clean, observation)) < self.min_skill:
            how, chance = "little" if skill > 0 else "no", self._chance(observation)
            return f"the clean metric of {observation.clean:.3g} is {how} better than {chance:.3g}, that of a constant guess"
        return f"{100 * self.measure(observation):.0f} % of the clean skill is retained"

    def _chance(self, observation: Observation) -> float:
        if self.chance is not None:
            return self.chance
        if observation.chance is None:
            raise ValueError("the metric of a constant guess is not known: give Governor(chance=…)")
        return observation.chance

    def _skill(self, metric: float, observation: Observation) -> float:
        chance = self._chance(observation)
        if self.chance is None and chance >= self.best:  # all targets are of one class, or the best is a goal below it
            return 0.0
        return (metric - chance) / (self.best - chance)

    def _average(self, state: State, observation: Observation) -> State:
        """Adds a validation to the averages."""
        skill = self._skill(observation.clean, observation)
        state = self._add(state | {"validations": state["validations"] + 1}, "skill", skill)
        if state["n_skill"] > 1:  # the first value is no average
            state["best_skill"] = max(state["best_skill"], self._mean(state, "skill"))
        # a share of almost no skill means nothing
        return state if skill < self.min_skill else self._add(state, "retention", self.measure(observation))

    def _add(self, state: State, name: str, value: float) -> State:
        total = self.average * state[name] + (1 - self.average) * value
        return state | {name: total, f"n_{name}": state[f"n_{name}"] + 1}

    def _mean(self, state: State, name: str) -> float:
        return state[name] / (1 - self.average ** state[f"n_{name}"])

    def _accepted_drop(self, observation: Observation) -> float:
        """Returns how far the average skill may be below its best. An average scatters less than a single validation."""
        if self.z == 0:
            return self.tolerance  # even if the standard error is infinite
        error = observation.standard_error / abs(self.best - self._chance(observation))
        return self.tolerance + self.z * error * math.sqrt((1 - self.average) / (1 + self.average))

    def _move(self, state: State, level: float) -> State:
        level = min(max(level, self.lo), self.hi)
        return state | {"level": level, "resting": self.cooldown, "retention": 0.0, "n_retention": 0}


@dataclass(frozen=True)
class SignedGap(Rule):
    r"""Raises the level while the model is over-confident, and lowers it while the model is under-confident.

    .. math:: \epsilon \leftarrow \text{clip}(\epsilon + \delta \, \text{sign}(g), 0, \epsilon_\text{max}), \quad
        g = \overline{\text{confidence}} - \text{accuracy}

    This is a rule for label smoothing. The right amount is the one at which the gap :math:`g` on clean held-out data is 0; a
    constant that is too high makes the model under-confident. The gap is averaged exponentially. The level is held while the
    gap is within ``z`` of its standard errors, or is NaN. What the rule does is ``raised``, ``lowered`` or ``held``.

    Args:
        step: The change of the level per validation, :math:`\delta`.
        hi: The highest level, :math:`\epsilon_\text{max}`.
        average: The weight of the past in the average.
        z: The number of standard errors that count as chance.

    Raises:
        ValueError: If an argument is out of range.

    References:
        On Calibration of Modern Neural Networks (Guo et al., 2017), https://arxiv.org/abs/1706.04599, for the gap

    Example:
        >>> rule = SignedGap()
        >>> over_confident = Observation(clean=0.9, boundary=math.nan, standard_error=0.01, signed_gap=0.05, n=500)
        >>> state, reason = rule.update(rule.init(0.0), over_confident)
        >>> reason, state["level"]
        ('raised', 0.01)
    """

    reasons: ClassVar[tuple[str, ...]] = ("held", "raised", "lowered")
    follows: ClassVar[str] = "signed_gap"
    needs_boundary: ClassVar[bool] = False

    _: KW_ONLY
    step: float = 0.01
    hi: float = 0.3
    average: float = 0.5
    z: float = 1.0

    def __post_init__(self):
        check_numbers(**asdict(self))
        if not (self.step > 0 and self.hi > 0 and 0 <= self.average < 1 and self.z >= 0):
            raise ValueError(f"a SignedGap needs 0 < step, 0 < hi, 0 <= average < 1 and 0 <= z, got {self}")

    def init(self, level: float) -> State:
        if not 0 <= level <= self.hi:
            raise ValueError(f"the level must start in [0, {self.hi:g}], got start={level:g}")
        return {"level": level, "gap": 0.0, "n_gap": 0}

    def update(self, state: State, observation: Observation) -> tuple[State, str]:
        if not math.isfinite(observation.signed_gap):
            return dict(state), "held"
        total = self.average * state["gap"] + (1 - self.average) * observation.signed_gap
        state = state | {"gap": total, "n_gap": state["n_gap"] + 1}
        gap = total / (1 - self.average ** state["n_gap"])
        if abs(gap) <= self.z * observation.signed_gap_error:
            return state, "held"
        level = min(max(state["level"] + math.copysign(self.step, gap), 0.0), self.hi)
        reason = "held" if level == state["level"] else "raised" if gap > 0 else "lowered"
        return state | {"level": level}, reason

    def check(self, task: TaskFacts) -> None:
        if not task.has_classes:
            raise ValueError(
                "SignedGap follows the confidence of a classifier: give task=tasks.Multiclass(), tasks.Binary() or "
                "tasks.Multilabel()"
            )

    @property
    def band(self) -> tuple[float, float]:
        return 0.0, 0.0

    def limit(self, max_level: float) -> SignedGap:
        return replace(self, hi=min(self.hi, max_level))

    def describe(self, observation: Observation) -> str:
        return f"confidence minus accuracy is {observation.signed_gap:+.3f}"
