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
from lightning_noise._usage import with_types

__all__ = ["Decision", "Governor", "Observation", "Rule", "SignedGap", "State", "TaskFacts"]

State = dict[str, Any]  # of JSON primitives, among them the "level"

_DROPS = 5  # what a drop of the clean skill weighs beside skill that is lost under the noise
_MOST_LOST = 10.0  # an R² has no lower bound, and the averages would keep a huge loss for dozens of validations


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
        boundary_error: The standard error of the paired difference between ``clean`` and ``boundary``. Infinite if it is not
            known.
    """

    clean: float
    boundary: float
    standard_error: float
    signed_gap: float
    n: int
    signed_gap_error: float = 0.0
    chance: float | None = None
    boundary_error: float = 0.0


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


@with_types
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
    def aim(self) -> float | None:
        """The value of the followed number at which the level settles, for figures, or ``None``."""
        return None

    def limit(self, max_level: float, usual: float = math.inf) -> Rule:
        """Returns the rule with no level above ``max_level``, nor, by default, above ``usual``. Default: the rule itself."""
        return self

    def measure(self, observation: Observation) -> float:
        """Returns the number that the rule follows. Default: the attribute of the observation named by ``follows``."""
        return getattr(observation, self.follows)

    def describe(self, observation: Observation) -> str:
        """Returns a sentence, without its full stop, that says what was observed."""
        return f"{self.follows.replace('_', ' ')} is {self.measure(observation):.3g}"


@dataclass(frozen=True)
class Governor(Rule):
    r"""Moves the level to where the model retains a given share of its skill under the noise.

    .. math:: s(M) = \frac{M - M_\text{chance}}{M_\text{best} - M_\text{chance}}, \quad
        r = \frac{s(M_\text{boundary})}{s(M_\text{clean})}

    The skill :math:`s` of a metric is 0 at chance and 1 at best, whether larger or smaller values are better. The retention
    :math:`r` is the share of the clean skill that is left under the noise at the current level. Retention needs no second run
    to compare with. Raising the noise while the clean metric is healthy does not work: metrics improve during training, which
    hides the harm of the noise.

    The lost share :math:`1 - r` grows roughly with the square of the level :math:`\lambda`. So the rule can tell at which level
    the share ``retain`` is left, and moves there:

    .. math:: \lambda \leftarrow \sqrt{\frac{\overline{\lambda^2}}{\ell} \, (1 - \text{retain})}, \quad
        \ell^2 = \overline{1 - r}^2 + \overline{\text{SE}(r)}^2

    The averages over the validations are exponential. A lost share counts as 10 at most, and a negative average as 0. Its
    standard error adds to it, so the level stays lower if the validation set is too small to tell. A validation raises the
    level by no more than the level itself or one ``step``, whichever is larger, and by no more than ten steps. It lowers the
    level by no more than half. What the rule did is one of these:

    ===================  =================================================================================
    ``non_finite``       a metric is not finite: half the level
    ``warmup``           one of the first ``warmup`` validations: no change
    ``below_min_skill``  the clean skill is below ``min_skill``, so retention means nothing: half the level
    ``raised``           more skill than ``retain`` is left
    ``lowered``          less skill is left
    ``held``             the level is at ``lo`` or ``hi``
    ===================  =================================================================================

    Clean skill that the model had and lost counts five times as much as skill that is lost under the noise. Only the part of
    the drop beyond ``z`` standard errors counts. The error is that of the paired difference to the best validation, so a small
    validation set seldom shows a drop. If the level is below one ``step``, the noise is not the cause of a drop, and the best
    is forgotten. The errors of :class:`~lightning_noise.tasks.Custom` are not known: no drop counts, and no error adds to what
    is lost.

    A smaller ``retain`` trades clean skill for robustness. Start at level 0, because weights that are noisy from the start may
    learn nothing. Only validations count in which the level can move: in a run of few epochs, validate more often
    (``val_check_interval``). Report final results on test data, because the validation data chose the level.

    If nearly all targets are of one class, few samples make the skill above chance. Then follow a metric in which all classes
    weigh alike, such as a balanced accuracy, by ``tasks.Custom``.

    Args:
        chance: The metric of the best constant guess. Default: what the task says, the share of the most frequent class
            among the held-out targets, and 0 for the :math:`R^2` of a regression. ``tasks.Custom`` needs it.
        best: The best value of the metric: 1 for an accuracy, 0 for an error.
        retain: The share of the clean skill that is to be left under the noise.
        step: The first level above 0, a fraction of the level that you expect. The default suits inputs in [0, 1], and weights
            with ``relative="std"``.
        lo: The lowest level.
        hi: The highest level. Default: 1 for noise in weights with ``relative``, otherwise the highest level of the noise.
        average: The weight of the past in the averages.
        warmup: The number of validations before the level first moves.
        min_skill: The clean skill below which the level only falls.
        z: The number of standard errors of the clean skill that count as chance.

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
        ('raised', 0.6, '98 % of the clean skill is retained')
    """

    reasons: ClassVar[tuple[str, ...]] = ("held", "raised", "lowered", "below_min_skill", "non_finite", "warmup")
    follows: ClassVar[str] = "retention"

    chance: float | None = None
    best: float = 1.0
    _: KW_ONLY
    retain: float = 0.9
    step: float = 0.15
    lo: float = 0.0
    hi: float = math.inf
    average: float = 0.6
    warmup: int = 3
    min_skill: float = 0.3
    z: float = 2.0

    def __post_init__(self):
        check_numbers(**asdict(self))
        scale = self.best if self.chance is None else self.best - self.chance
        ranges = {
            "two different finite numbers as chance and best": math.isfinite(scale) and self.chance != self.best,
            "0 <= retain < 1": 0 <= self.retain < 1,
            "0 < step < inf": 0 < self.step < math.inf,
            "0 <= lo <= hi": 0 <= self.lo <= self.hi,
            "0 <= average < 1 and 0 < min_skill < 1": 0 <= self.average < 1 and 0 < self.min_skill < 1,
            "no negative warmup or z": self.warmup >= 0 and self.z >= 0,
        }
        for wanted, holds in ranges.items():
            if not holds:
                raise ValueError(f"a Governor needs {wanted}, got {self}")

    def init(self, level: float) -> State:
        if not self.lo <= level <= self.hi:
            raise ValueError(f"the level must start in [{self.lo:g}, {self.hi:g}], got start={level:g}")
        return {"level": level, "validations": 0, "best_skill": 0.0, "lost": 0.0, "error": 0.0, "squared_level": 0.0}

    def update(self, state: State, observation: Observation) -> tuple[State, str]:
        if not (math.isfinite(observation.clean) and math.isfinite(observation.boundary)):
            return self._move(state, state["level"] / 2), "non_finite"
        state, skill = state | {"validations": state["validations"] + 1}, self._skill(observation.clean, observation)
        state["best_skill"] = skill if state["level"] < self.step else max(state["best_skill"], skill)
        if state["validations"] <= self.warmup:
            return state, "warmup"
        if skill < self.min_skill:
            return self._move(state, state["level"] / 2), "below_min_skill"
        after = self._move(state := self._average(state, observation), self._next_level(state))
        change = after["level"] - state["level"]
        return after, "raised" if change > 0 else "lowered" if change < 0 else "held"

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
    def aim(self) -> float:
        return self.retain

    def limit(self, max_level: float, usual: float = math.inf) -> Governor:
        return replace(self, hi=min(usual if self.hi == math.inf else self.hi, max_level))

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
        lost, error = self._lost(state, observation)
        seen = {"lost": lost, "error": error, "squared_level": state["level"] ** 2}
        return state | {name: self.average * state[name] + (1 - self.average) * value for name, value in seen.items()}

    def _lost(self, state: State, observation: Observation) -> tuple[float, float]:
        """Returns the share of the clean skill that is lost, under the noise or before, and its standard error."""
        clean, boundary = (self._skill(metric, observation) for metric in (observation.clean, observation.boundary))
        scale = abs(self.best - self._chance(observation))
        drop = max(0.0, state["best_skill"] - clean - self.z * observation.standard_error / scale)
        error = observation.boundary_error / scale if math.isfinite(observation.boundary_error) else 0.0
        return min(1 - (boundary - _DROPS * drop) / clean, _MOST_LOST), error / clean

    def _next_level(self, state: State) -> float:
        """Returns the level at which ``retain`` is left, if what is lost grows with the square of the level."""
        level, lost = state["level"], math.hypot(max(0.0, state["lost"]), state["error"])
        highest = level + min(max(level, self.step), 10 * self.step)
        if level == 0 or lost == 0:
            return highest
        return min(max(math.sqrt((1 - self.retain) * state["squared_level"] / lost), level / 2), highest)

    def _move(self, state: State, level: float) -> State:
        return state | {"level": min(max(level, self.lo), self.hi)}


@dataclass(frozen=True)
class SignedGap(Rule):
    r"""Raises the level while the model is over-confident, and lowers it while the model is under-confident.

    .. math:: \epsilon \leftarrow \text{clip}(\epsilon \pm \delta, 0, \epsilon_\text{max}), \quad
        g = \overline{\text{confidence}} - \text{accuracy}

    This is a rule for label smoothing. The right amount is the one at which the gap :math:`g` on clean held-out data is 0; a
    constant that is too high makes the model under-confident. The gap is averaged exponentially. The level rises only if the
    gap is above ``z`` of its standard errors, so that a well calibrated model stays as it is. It falls as soon as the gap is
    negative. What the rule does is ``raised``, ``lowered`` or ``held``.

    Args:
        step: The change of the level per validation, :math:`\delta`.
        hi: The highest level, :math:`\epsilon_\text{max}`.
        average: The weight of the past in the average.
        z: The number of standard errors of a positive gap that count as chance.

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
    z: float = 2.0

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
        # unlike smoothing, its absence needs no evidence
        change = -self.step if gap < 0 else self.step if gap > self.z * observation.signed_gap_error else 0.0
        level = min(max(state["level"] + change, 0.0), self.hi)
        reason = "held" if level == state["level"] else "raised" if change > 0 else "lowered"
        return state | {"level": level}, reason

    def check(self, task: TaskFacts) -> None:
        if not task.has_classes:
            raise ValueError(
                "SignedGap follows the confidence of a classifier: give task=tasks.Multiclass(), tasks.Binary() or "
                "tasks.Multilabel()"
            )

    @property
    def aim(self) -> float:
        return 0.0

    def limit(self, max_level: float, usual: float = math.inf) -> SignedGap:
        return replace(self, hi=min(self.hi, max_level))

    def describe(self, observation: Observation) -> str:
        return f"confidence minus accuracy is {observation.signed_gap:+.3f}"
