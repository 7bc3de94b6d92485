"""Levels that tune themselves: what is observed in a validation, and the rules that move a level by it.

A rule is a value. It says how a level moves, and holds nothing: the callback whose level it moves keeps the state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple, get_args

from torchmetrics import Metric

from lightning_noise._checks import check_level
from lightning_noise.batch import Selector
from lightning_noise.evaluation.old_tasks import Task
from lightning_noise.schedules import Level

__all__ = ["AdaptiveLevel", "AnyLevel", "Decision", "Governor", "Observation", "Rule", "SignedGap", "State"]

State = dict[str, Any]  # of primitives, among them the "level"


class Observation(NamedTuple):
    """What a validation showed of a model at the level in force.

    Attributes:
        clean: The metric without noise.
        boundary: The metric under the perturbation at the level; not a number where there is none, as in targets.
        standard_error: Of the difference between ``clean`` and the best of it so far, paired where both are of the same
            samples; infinite where it is not known.
        signed_gap: Mean confidence minus accuracy without noise; not a number where there is no confidence.
        n: The number of samples.
        signed_gap_error: The standard error of ``signed_gap``.
    """

    clean: float
    boundary: float
    standard_error: float
    signed_gap: float
    n: int
    signed_gap_error: float = 0.0


class Decision(NamedTuple):
    """What a rule saw in a validation and did.

    Attributes:
        step: The place on the x axis of the logs.
        level: The level in force.
        clean: The metric without noise.
        boundary: The metric under the perturbation at the level.
        reason: What was done.
        next_level: The level from then on.
    """

    step: int
    level: float
    clean: float
    boundary: float
    reason: str
    next_level: float


class Rule(ABC):
    """How a level moves from one validation to the next; a subclass is a frozen dataclass.

    Attributes:
        reasons: All that ``update`` can say it did, in words of the past tense; a log has the index.
        needs_boundary: Whether it reads the metric under noise, which noise in targets, mixtures and gradients have not.
    """

    reasons: ClassVar[tuple[str, ...]]
    needs_boundary: ClassVar[bool] = True

    @abstractmethod
    def init(self, level: float) -> State:
        """Returns the state before the first validation, whose ``"level"`` this is."""

    @abstractmethod
    def update(self, state: State, observation: Observation) -> tuple[State, str]:
        """Returns the state after a validation, as a new dictionary, and the reason: what was done, one of ``reasons``."""

    def check(self, metric: Task | Metric) -> None:  # noqa: B027  # most read any
        """Raises a ValueError where the rule cannot read the metric."""

    def skill(self, metric: float) -> float:
        """Returns what is the larger the better: the metric itself, unless the rule knows more."""
        return metric

    def describe(self, observation: Observation) -> str:
        """Returns in words what the rule saw in a validation."""
        return f"{observation.clean:.3g} without noise"


@dataclass(frozen=True)
class Governor(Rule):
    r"""Raises the level while the model bears the noise that it is trained with, and lowers it where that takes its skill.

    .. math:: s(M) = \frac{M - M_\text{chance}}{M_\text{best} - M_\text{chance}}, \quad
        r = \frac{s(M_\text{boundary})}{s(M_\text{clean})}

    The skill :math:`s` of a metric is 0 at chance and 1 at best, whether it is to be maximised or minimised, and the retention
    :math:`r` is the share of the clean skill that is left under the perturbation at the level in force. It asks for no second
    run to compare with. "Raise the noise while the clean metric is healthy" does not work instead: metrics improve as training
    goes on, which hides the harm of the noise. In each validation the first of these that holds is done:

    ==============  ===========================================================================================
    ``panicked``    a metric is not finite: two shrinks
    ``waited``      one of the first ``warmup`` validations: nothing
    ``retreated``   the clean skill is below ``min_skill``, so that retention says nothing: two shrinks
    ``rested``      one of ``cooldown`` validations after a change: nothing
    ``guarded``     the average of the clean skill is below its best by more than ``tolerance`` and chance: a shrink
    ``shrank``      the average of :math:`r` is below ``shrink_below``: the level times ``factor``
    ``grew``        the average of :math:`r` is above ``grow_above``: the level plus ``step``
    ``held``        else nothing
    ==============  ===========================================================================================

    The averages are exponential, that of the retention from the last change of the level on. The best is the highest average so
    far, and chance is ``z`` standard errors of the difference, of the same samples; where a metric of one's own leaves the
    error unknown, nothing is guarded. When the guard has brought the level down to less than a ``step`` and the skill is still
    behind, it is not the noise that takes it, and the best is forgotten. All counts are of validations in which the level could
    move, so in a run of few epochs validate more often, as ``val_check_interval`` does.

    The thresholds are a preference and no optimum: 0.90 and 0.95 were safe for noise in inputs and weights, and 0.85 and 0.90
    give up more clean skill for more robustness. Start at 0: a level that is too high comes down, but weights that are noisy
    from the start may learn nothing in the meantime. Use a balanced accuracy where classes are rare, and report what was
    reached on test data, as validation data have chosen the level.

    Args:
        chance: The metric of a guess, 1/K for the accuracy of K classes, or the variance of the target for a squared error.
        best: The best that the metric can be: 1 for an accuracy, 0 for an error.
        shrink_below: The retention below which the level shrinks.
        grow_above: The retention above which it grows.
        step: What a growth adds, in units of the level; the default suits the standard deviation of inputs in [0, 1] and of
            weights relative to theirs. It should be a fraction of the level that is expected.
        factor: What a shrink multiplies by.
        lo: The lowest level.
        hi: The highest.
        average: The weight of the past in the averages.
        warmup: For how many validations the level stays.
        cooldown: For how many validations it stays after each change.
        min_skill: The clean skill below which the level only falls.
        tolerance: How far the clean skill may be below its best.
        z: How many standard errors may be chance.

    Raises:
        ValueError: An argument is out of its range.

    References:
        Solving Rubik's Cube with a Robot Hand (OpenAI et al., 2019), https://arxiv.org/abs/1910.07113, for performance at the
        boundary of what is trained with

        Training Generative Adversarial Networks with Limited Data (Karras et al., 2020), https://arxiv.org/abs/2006.06676

    Example:
        >>> governor = Governor(chance=0.1, warmup=0)
        >>> state = governor.init(0.3)
        >>> observation = Observation(clean=0.9, boundary=0.88, standard_error=0.01, signed_gap=0.02, n=500)
        >>> state, reason = governor.update(state, observation)
        >>> reason, round(state["level"], 2), governor.describe(observation)
        ('grew', 0.45, '98 % of the clean skill left at the boundary')
    """

    reasons: ClassVar[tuple[str, ...]] = ("held", "grew", "shrank", "guarded", "retreated", "panicked", "waited", "rested")

    chance: float
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
        ranges = {
            "two finite numbers as chance and best": math.isfinite(self.best - self.chance) and self.best != self.chance,
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
            return self._moved(state, state["level"] * self.factor**2), "panicked"
        state, skill = self._averaged(state, observation), self.skill(observation.clean)
        if state["validations"] <= self.warmup:
            return state, "waited"
        if skill < self.min_skill:
            return self._moved(state, state["level"] * self.factor**2), "retreated"
        if state["resting"] > 0:
            return state | {"resting": state["resting"] - 1}, "rested"
        if state["best_skill"] - self._mean(state, "skill") > self._band(observation.standard_error):
            return self._guarded(state), "guarded"
        if (left := self._mean(state, "retention")) < self.shrink_below:
            return self._moved(state, state["level"] * self.factor), "shrank"
        if left > self.grow_above and state["level"] < self.hi:
            return self._moved(state, state["level"] + self.step), "grew"
        return state, "held"

    def check(self, metric: Task | Metric) -> None:
        # else the level would move the wrong way
        if isinstance(metric, Metric):
            return
        if metric == "regression" and not self.best < self.chance:
            raise ValueError(f"a squared error is to be small: give best=0 and the variance as chance, got {self}")
        if metric != "regression" and not 0 <= self.chance < self.best <= 1:
            raise ValueError(f"an accuracy needs 0 <= chance < best <= 1, as 1/K of K classes and 1, got {self}")

    def skill(self, metric: float) -> float:
        return (metric - self.chance) / (self.best - self.chance)

    def describe(self, observation: Observation) -> str:
        if not math.isfinite(observation.clean + observation.boundary):
            return "a metric that is not a number"
        if self.skill(observation.clean) <= 0:
            return f"no skill above chance, {observation.clean:.3g}"
        return f"{100 * self._retention(observation):.0f} % of the clean skill left at the boundary"

    def _guarded(self, state: State) -> State:
        state = self._moved(state, state["level"] * self.factor)
        return state | {"best_skill": -math.inf} if state["level"] < self.step else state

    def _retention(self, observation: Observation) -> float:
        return self.skill(observation.boundary) / self.skill(observation.clean)

    def _averaged(self, state: State, observation: Observation) -> State:
        """The state with one more validation in its averages."""
        skill = self.skill(observation.clean)
        state = self._added(state | {"validations": state["validations"] + 1}, "skill", skill)
        if state["n_skill"] > 1:  # the first is an average of nothing
            state["best_skill"] = max(state["best_skill"], self._mean(state, "skill"))
        if skill < self.min_skill:
            return state  # of so little skill a share means nothing
        return self._added(state, "retention", self._retention(observation))

    def _added(self, state: State, name: str, value: float) -> State:
        total = self.average * state[name] + (1 - self.average) * value
        return state | {name: total, f"n_{name}": state[f"n_{name}"] + 1}

    def _mean(self, state: State, name: str) -> float:
        return state[name] / (1 - self.average ** state[f"n_{name}"])

    def _band(self, standard_error: float) -> float:
        """How far the average of the skill may be below its best; an average scatters less than a validation."""
        if self.z == 0:
            return self.tolerance  # also where the error is not known
        error = standard_error / abs(self.best - self.chance) * math.sqrt((1 - self.average) / (1 + self.average))
        return self.tolerance + self.z * error

    def _moved(self, state: State, level: float) -> State:
        level = min(max(level, self.lo), self.hi)
        return state | {"level": level, "resting": self.cooldown, "retention": 0.0, "n_retention": 0}


@dataclass(frozen=True)
class SignedGap(Rule):
    r"""Raises the level while the model is more confident than it is right, and lowers it where it is less.

    .. math:: \epsilon \leftarrow \text{clip}(\epsilon + \delta \, \text{sign}(g), 0, \epsilon_\text{max}), \quad
        g = \overline{\text{confidence}} - \text{accuracy}

    It is for label smoothing, whose right amount is that at which the gap :math:`g` on clean held-out data is 0; a constant
    that is too high makes a model doubt what it knows. The gap is averaged exponentially, and nothing is done where it is
    within ``z`` of its standard errors, as chance alone would show. The three things that it can have done are ``raised``,
    ``lowered`` and ``held``; a gap that is not a number is left out.

    Args:
        step: What the level moves by in a validation, :math:`\delta`.
        hi: The highest level, :math:`\epsilon_\text{max}`.
        average: The weight of the past in the average.
        z: How many standard errors may be chance.

    Raises:
        ValueError: An argument is out of its range.

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
    needs_boundary: ClassVar[bool] = False

    _: KW_ONLY
    step: float = 0.01
    hi: float = 0.3
    average: float = 0.5
    z: float = 1.0

    def __post_init__(self):
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
        moved = "held" if level == state["level"] else "raised" if gap > 0 else "lowered"
        return state | {"level": level}, moved

    def check(self, metric: Task | Metric) -> None:
        if isinstance(metric, Metric) or metric == "regression":
            raise ValueError("SignedGap reads confidences: metric must be 'multiclass', 'binary' or 'multilabel'")

    def describe(self, observation: Observation) -> str:
        return f"confidence minus accuracy {observation.signed_gap:+.3f}"


@dataclass(frozen=True)
class AdaptiveLevel:
    r"""A level that a rule moves after each validation, wherever a callback takes a level.

    The callback whose level it is looks at the model in each validation of a fit, before the validation step: once without
    noise, and, where the rule needs it, once under its own perturbation at the level in force, with the same draws in each
    validation; of weights there is one for each batch, because a single one would say more of itself than of the level.
    ``per_sample`` applies there, so that the level settles higher than where all samples get the whole, but no sample is left
    out by a ``probability``. This costs two forward passes of each batch. The sanity check tries both and moves nothing.
    Several in one trainer move in turn, in the order of the trainer, one in each validation, and each is looked at with the
    others off. All processes decide alike. As with monitors, what the forward pass itself changes in the module in evaluation
    is not undone.

    The state is in the checkpoints: a run that is resumed moves as if it had not ended, unless it was saved between the last
    batch of an epoch and its validation, as by ``ModelCheckpoint(every_n_train_steps=…)``: Lightning leaves that validation out
    when it resumes. Only a fit takes the state from a checkpoint. A callback that is used in another fit goes on from where it
    was, so give a new model a new one.

    ===========================  =============================================================================
    key                          what
    ===========================  =============================================================================
    ``adaptive/<name>/level``    the level from now on, after each validation in which it could move
    ``adaptive/<name>/reason``   the index of what was done in ``rule.reasons``, which a text says in words
    ===========================  =============================================================================

    The loggers also get a figure of level, clean metric and metric at the boundary over time, and at the end of a fit what was
    done is printed in words, which are ``callback.adaptive.summary()`` too.

    Args:
        rule: A rule, such as :class:`Governor` for noise in inputs, weights and activations, or :class:`SignedGap` for soft
            labels.
        start: The level before the first move.
        metric: What the rule reads: ``"multiclass"``, ``"binary"`` and ``"multilabel"`` are the accuracy of such predictions
            as :class:`~lightning_noise.RobustnessMonitor` describes them, ``"regression"`` is the mean squared error. Or a
            torchmetrics ``Metric`` of one number, such as a balanced accuracy, of which the standard error is not known.
        inputs: Which leaf of the batch the module predicts from; left out, as in :class:`~lightning_noise.InputNoise`.
        target: Which leaf holds the target; left out, the second element of a sequence.
        predict: A callable from module and batch to predictions; left out, ``module(input)``.
        max_batches: How many batches of each process to look at in a validation; left out, all of the first loader.

    Raises:
        TypeError: The rule is none.
        ValueError: A level or number is out of range, or the metric has no confidence, which :class:`SignedGap` needs.

    Example:
        >>> from lightning_noise import InputNoise, noise
        >>> callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Governor(chance=0.1)))
        >>> callback.adaptive.summary()
        'input: no validation yet, the level is 0'
    """

    rule: Rule
    start: float = 0.0
    _: KW_ONLY
    metric: Task | Metric = "multiclass"
    inputs: Selector | None = None
    target: int | str | None = None
    predict: Callable[[Any, Any], Any] | None = None
    max_batches: int | None = None

    def __post_init__(self):
        if not isinstance(self.rule, Rule):
            raise TypeError(f"rule must be a Rule, such as Governor(chance=0.1), got {self.rule!r}")
        check_level(self.start)
        self.rule.init(self.start)  # refuses what is out of its range
        if not isinstance(self.metric, Metric) and self.metric not in get_args(Task):
            raise ValueError(f"metric must be one of {list(get_args(Task))} or a Metric of torchmetrics, got {self.metric!r}")
        self.rule.check(self.metric)
        if self.max_batches is not None and self.max_batches < 1:
            raise ValueError(f"max_batches must be at least 1, got {self.max_batches}")


AnyLevel = Level | AdaptiveLevel
