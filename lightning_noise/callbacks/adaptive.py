"""Adaptive levels, and the driver that moves the level of a noise callback."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure

from lightning_noise import plots
from lightning_noise._checks import check_counts, check_level, is_number
from lightning_noise._usage import Value
from lightning_noise._version import __version__
from lightning_noise.batch import Selector
from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.evaluation.engine import Pass
from lightning_noise.evaluation.predictor import Predictor
from lightning_noise.evaluation.results import Results
from lightning_noise.loop import loggers
from lightning_noise.loop.dispatch import Perturbing, perturbing
from lightning_noise.loop.internals import validate_within_fit, validates_after
from lightning_noise.loop.monitored import noise_key
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.loop.terminal import say
from lightning_noise.loop.trial import held_out_batches
from lightning_noise.metrics.statistics import jackknife_error
from lightning_noise.rng import Key
from lightning_noise.rules import Decision, Governor, Observation, Rule
from lightning_noise.schedules import Level
from lightning_noise.tasks import Multiclass, Task, check_task

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Adaptation", "AdaptiveLevel", "AnyLevel"]


@dataclass(frozen=True)
class AdaptiveLevel(Value):
    r"""A level that a rule moves after each validation. It is accepted wherever a callback takes a level.

    In each validation of a fit, before the validation step, the callback evaluates the model without noise and, if the rule
    needs it, under its own noise at the current level. This costs two forward passes per batch. The draws are the same in each
    validation. Noise in weights, which all samples share, is redrawn for each batch of each validation. ``per_sample`` applies,
    so the level settles higher than if every sample got the whole level. ``probability`` does not: every sample gets noise.

    The sanity check tries both evaluations and moves nothing. The adaptive levels of one trainer move in turn, one per
    validation; each is evaluated without the noise of the others. All ranks decide alike. What a forward
    pass changes in the module is undone, as by a :class:`~lightning_noise.RobustnessMonitor`.

    Checkpoints hold the state. A resumed run moves the level as the uninterrupted run would. Lightning leaves out a validation
    if the checkpoint was saved right before it, as ``ModelCheckpoint(every_n_train_steps=…)`` may do. With an adaptive level,
    that validation runs at the start of the resumed training. Only a fit loads the state. In another fit, a callback continues
    from its current level, so give a new model a new callback.

    ================================  ================================================================
    key                               value
    ================================  ================================================================
    ``train_noise/<name>/level``      the level, also from each validation on
    ``train_noise/<name>/retention``  what the rule follows; with :class:`~lightning_noise.rules.SignedGap`,
                                      ``train_noise/<name>/signed_gap``
    ``train_noise/<name>/moves``      at the end of a fit, a figure and a table of all decisions
    ================================  ================================================================

    At the end of a fit, a summary is printed; ``callback.adaptive.summary()`` returns it.

    Args:
        rule: :class:`~lightning_noise.rules.Governor` for noise in inputs, weights and activations, or
            :class:`~lightning_noise.rules.SignedGap` for soft labels.
        start: The level before the first move.
        task: What the outputs of the module mean. Classifiers are governed by their accuracy and a regression by its
            :math:`R^2`. For another metric give ``tasks.Custom(metric)``; its standard error is not known.
        inputs: Which leaf of the batch is the input. Default: as the callback says, or else as in
            :class:`~lightning_noise.InputNoise`.
        target: Which leaf is the target. Default: as the callback says, or else as in :class:`~lightning_noise.LabelSmoothing`.
        predict: A callable from module and batch to the output. Default: as in
            :class:`~lightning_noise.RobustnessMonitor`.
        max_batches: How many batches each rank evaluates per validation. Default: all batches of the first loader.

    Raises:
        TypeError: If ``rule`` is not a rule, or ``task`` is not a task.
        ValueError: If a level or number is out of range, or the rule cannot follow the metric of the task.

    Example:
        >>> from lightning_noise import InputNoise, noise
        >>> callback = InputNoise(noise.Gaussian(), AdaptiveLevel())
        >>> callback.adaptive.summary()
        'input: no validation yet; level 0.'
    """

    usage: ClassVar[str] = "InputNoise(noise.Gaussian(), {})"

    rule: Rule = Governor()
    start: float = 0.0
    _: KW_ONLY
    task: Task = Multiclass()
    inputs: Selector | None = None
    target: int | str | None = None
    predict: Callable[[Any, Any], Any] | None = None
    max_batches: int | None = None

    def __post_init__(self):
        if not isinstance(self.rule, Rule):
            is_share = is_number(self.rule) and 0.5 < self.rule < 1  # of the skill that is kept
            start = f"start={self.rule}" if is_number(self.rule) else ""
            start = f"rules.Governor(retain={self.rule})" if is_share else start
            raise TypeError(f"rule must be a rule such as rules.Governor(), got {self.rule!r}; type AdaptiveLevel({start})")
        check_task(self.task)
        check_level(self.start)
        check_counts(max_batches=self.max_batches)
        self.rule.check(self.task)
        self.rule.init(self.start)  # raises an error if the level is out of the range of the rule


Row = TypeVar("Row", Decision, Observation)
AnyLevel = Level | AdaptiveLevel | Rule


class Adaptation:
    """Moves the level of a noise callback by a rule.

    Args:
        setting: The adaptive level.
        callback: The noise callback.

    Attributes:
        history: The decisions, one per validation.
    """

    def __init__(self, setting: AdaptiveLevel, callback: Perturbing):
        rule, name = setting.rule, callback.name
        if rule.needs_boundary and not callback.can_probe:
            raise ValueError(
                f"{type(rule).__name__} must evaluate the model under the noise of {name!r}, which is not possible for label "
                "noise, gradient noise and mixing; give a schedule or, for soft labels, AdaptiveLevel(SignedGap())"
            )
        if rule.needs_boundary and callback.mixes_samples:
            raise ValueError(f"the noise of {name!r} mixes samples, so it depends on the batch; give it a schedule")
        check_level(setting.start, callback.max_level)
        self.setting = setting
        self.callback = callback
        self.name = name
        self.history: list[Decision] = []
        self._rule = rule.limit(callback.max_level, usual=max(callback.usual_limit, setting.start))
        self._state = self._rule.init(setting.start)
        self._fitting = True  # a test of a checkpoint must not reset the level
        self._last: Observation | None = None
        self._best: list[float] | None = None  # the best clean metric, and the same without each group of samples
        self._validations = 0  # including those in which another level moved
        self._due: int | None = None  # the epoch of the validation that is due after the last batch
        self._sits_out = False  # of a validation that runs again for other levels alone
        self._pass: Any = None  # over the data of this validation, if the level moves in it
        self._results: Results | None = None
        self._outcome = ""  # to be printed at the end of the run

    @property
    def level(self) -> float:
        """The current level."""
        return self._state["level"]

    def summary(self) -> str:
        """Returns a sentence on the decisions and the level."""
        level = f"{self.level:.3g}"
        if not self.history or self._last is None:
            return f"{self.name}: no validation yet; level {level}."
        counts = Counter(decision.reason for decision in self.history)
        done = ", ".join(f"{reason} {_times(n)}" for reason, n in counts.items())
        first, last = f"{self.history[0].level:.3g}", f"{self.history[-1].level:.3g}"
        where = "this level" if last == level else f"level {last}"
        return f"{self.name}: {done}; level {first} to {level}; {self._rule.describe(self._last)} at {where}."

    def table(self) -> str:
        """Returns the decisions as a Markdown table, in which equal decisions in a row are one row."""
        rows = ["| steps | decision | level | without noise | under noise |", "|---|---|---|---|---|"]
        for reason, group in groupby(self.history, key=lambda decision: decision.reason):
            decisions = list(group)
            first, last = decisions[0], decisions[-1]
            steps = _span(first.step, last.step)
            level = _span(f"{first.level:.3g}", f"{last.next_level:.3g}")
            metrics = f"{last.clean:.3g} | {last.boundary:.3g}"
            rows.append(f"| {steps} | {reason}, {_times(len(decisions))} | {level} | {metrics} |")
        return "\n".join(rows)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state in primitives."""
        return {
            "kind": self._kind,
            "state": dict(self._state),
            "last": self._last and tuple(self._last),
            "best": self._best,
            "validations": self._validations,
            "due": self._due,
            "history": [tuple(decision) for decision in self.history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a fit from a saved state."""
        if self._fitting:
            self.continue_from(state_dict)

    def continue_from(self, state_dict: dict[str, Any]) -> None:
        """Continues from a state, or, if the rule or the task has changed, from its level.

        Raises:
            ValueError: The state cannot be read, and nothing of it was taken over.
        """
        try:
            found, kind = self._read(state_dict), str(state_dict["kind"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"the checkpoint has no state of the level of {self.name!r} that lightning_noise {__version__} can read: "
                f"{what}. To keep the weights and begin with a new level, type "
                "trainer.fit(type(model).load_from_checkpoint(path)), without ckpt_path"
            ) from error
        if kind != self._kind:
            rank_zero_warn(
                f"the level of {self.name!r} in the checkpoint was moved by {kind}, and is now moved by "
                f"{self._kind}: the level continues, with a new state"
            )
        vars(self).update(found)

    def _read(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Returns the attributes that a saved state gives."""
        fresh = self._rule.init(check_level(saved["state"]["level"]))
        last, best, due = saved["last"], saved["best"], saved["due"]
        found = {
            "history": [_checked(Decision(*decision)) for decision in saved["history"]],
            "_validations": int(saved["validations"]),
            "_due": None if due is None else int(due),
        }
        if saved["kind"] != self._kind:  # a callback that is used again may hold the last and best of another rule
            return found | {"_state": fresh, "_last": None, "_best": None}
        for name, value in fresh.items():
            if is_number(value) and not is_number(saved["state"][name]):
                raise TypeError(f"{name} is {saved['state'][name]!r}")
        return found | {
            "_state": dict(saved["state"]),
            "_last": None if last is None else _checked(Observation(*last)),
            "_best": None if best is None else list(map(float, best)),
        }

    @property
    def _kind(self) -> str:
        """The rule and the task to which a state belongs."""
        return f"{type(self._rule).__name__} for {self.setting.task.name}"

    # --- the loop

    def prepare(self, stage: str, *, seed: int, inputs: Selector | None = None, target: Selector | None = None) -> None:
        """Prepares a run with the seed, inputs and target of the callback."""
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        setting, self._due = self.setting, None  # a fit that failed may have left one
        self._measured = Results(setting.task, only_governed=True)  # the same in each validation
        self._is_tried = False
        self._seed = seed
        self._predictor = Predictor(
            setting.task,
            inputs=inputs if setting.inputs is None else setting.inputs,
            target=_single(target) if setting.target is None else setting.target,
            predict=setting.predict,
        )

    def describe_cost(self) -> str:
        """Returns what the level costs in each validation in which it may move."""
        n, max_batches = 1 + self._rule.needs_boundary, self.setting.max_batches
        cost = f"AdaptiveLevel of {self.name!r}: {n} forward pass{'es' * (n > 1)} of"
        if max_batches is None:
            return f"{cost} each validation batch; bound the cost with AdaptiveLevel(max_batches=…)"
        return f"{cost} each of the first {max_batches} validation batches"

    @property
    def followed_key(self) -> str:
        """The key of what the rule follows."""
        return noise_key(self.name, self._rule.follows)

    def try_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tries the evaluation before the first training step, if no sanity check did."""
        if not self._is_tried:
            with held_out_batches(trainer, 0) as batches:
                for batch in batches:
                    self.observe(trainer, pl_module, batch, 0, 0)

    def resume(self, trainer: Trainer) -> None:
        """Runs the validation that was due when the checkpoint was saved. Lightning skips it."""
        if self._due is not None:
            rank_zero_info(
                f"the checkpoint was saved before a validation, which the level of {self.name!r} needs and which runs now"
            )
            drivers = _drivers(trainer)
            try:
                for driver in drivers:
                    driver._sits_out = driver._due is None
                validate_within_fit(trainer, self._due)
            finally:
                for driver in drivers:
                    driver._sits_out = False

    def end_batch(self, trainer: Trainer) -> None:
        """Notes whether a validation is due after this batch, for a checkpoint that is saved before the validation."""
        self._due = trainer.current_epoch if validates_after(trainer) else None

    def begin(self, trainer: Trainer) -> None:
        """Begins a validation."""
        self._results = None
        if self._is_its_turn(trainer):
            self._results = self._measured
            self._results.reset()
            self._pass = Pass(self._predictor, max_batches=self.setting.max_batches)

    def observe(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Evaluates the model on a batch of a validation. In the sanity check, only tries the evaluation."""
        context = Context(trainer, pl_module, is_probe=True)
        if trainer.sanity_checking:
            self._is_tried = True
            perturb = partial(self._perturb, self.level or 0.01, batch_idx)  # at level 0 no error could show
            try:
                list(Pass(self._predictor).read(context, batch, batch_idx, dataloader_idx, perturb))
            except ValueError as error:
                raise ValueError(
                    f"{error}. An adaptive level has its own task, target and predict: AdaptiveLevel(task=…)"
                ) from None
        elif self._results is not None:
            perturb = partial(self._perturb, self.level, batch_idx)
            self._results.update(self._pass.read(context, batch, batch_idx, dataloader_idx, perturb))

    def decide(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Moves the level at the end of a validation."""
        if self._sits_out:
            return
        new = {"_validations": self._validations + 1, "_due": None, "_results": None}
        if self._results is None:
            vars(self).update(new)
            return
        observation, best = self._summarize(trainer, self._results, self._pass)
        observation = trainer.strategy.broadcast(observation)
        followed = self._rule.measure(observation)
        state, reason = self._rule.update(self._state, observation)
        level = check_level(state["level"], self.callback.max_level)  # a rule of the user may return any level
        known = followed if math.isfinite(followed) else None
        decision = Decision(step, self.level, observation.clean, observation.boundary, reason, level, known)
        # at once, so that an interrupt leaves a state that can be resumed
        vars(self).update(new, _state=state, _last=observation, _best=best, history=[*self.history, decision])
        # the value is that of all ranks already
        pl_module.log(self.followed_key, followed, sync_dist=True, rank_zero_only=True)

    def conclude(self, trainer: Trainer, step: int) -> None:
        """Logs all decisions at the end of a fit."""
        self._outcome = self.summary()
        if self.history:
            key = noise_key(self.name, "moves")
            loggers.log_text(trainer, key, f"{self.summary()}\n\n{self.table()}", step)
            loggers.log_figure(trainer, key, self.figure, step)

    def figure(self) -> Figure:
        """Returns a figure of the level and what the rule followed; see :func:`~lightning_noise.plots.adaptation`."""
        return plots.adaptation(self.history, self._rule)

    def release(self, trainer: Trainer) -> None:
        """Prints the summary, and lets go of the last validation with its copies of what the module held."""
        if self._outcome:
            say(trainer, self._outcome)
        self._outcome, self._pass, self._results = "", None, None

    def _is_its_turn(self, trainer: Trainer) -> bool:
        drivers = _drivers(trainer)
        # the count of the first driver, because a driver that the checkpoint does not know has counted fewer validations
        first = next(driver for driver in drivers if not driver._sits_out)
        is_next = first._validations % len(drivers) == drivers.index(self)
        return _counts(trainer) and not self._sits_out and is_next

    def _perturb(
        self, level: float, batch_idx: int, context: Context, batch: Any, positions: range
    ) -> Iterator[tuple[Condition, Perturbation]]:
        """Yields the perturbation at the level, if the rule needs it. At level 0, the boundary equals the clean metric."""
        if level > 0 and self._rule.needs_boundary:
            key = Key((self._seed, self.name, "boundary"), positions=positions)
            if self.callback.one_draw_per_batch:
                key = key / len(self.history) / batch_idx  # otherwise the level would hinge on a few draws
            yield _BOUNDARY, self.callback.perturbation(context, batch, level, key)

    def _summarize(self, trainer: Trainer, results: Results, read: Pass) -> tuple[Observation, list[float] | None]:
        """Returns the observation, and the best clean metric with it."""
        results.gather(trainer, f"AdaptiveLevel of {self.name!r}", read)
        task, metrics, sizes = self.setting.task, results.metrics, results.sizes
        values = metrics[CLEAN].estimates()
        clean = values[task.governed].tolist()
        gap = values["signed_gap"].tolist() if "signed_gap" in values else [math.nan] * len(clean)
        if not self._rule.needs_boundary:
            boundary = [math.nan] * len(clean)
        elif self.level == 0:
            boundary = clean
        else:
            boundary = metrics[_BOUNDARY].estimates()[task.governed].tolist()
        best = clean if self._best is None else self._best
        error, boundary_error = (
            _standard_error([one - two for one, two in zip(clean, other, strict=True)], sizes) for other in (best, boundary)
        )
        score, best_score = (task.score({task.governed: metric[0]}) for metric in (clean, best))
        is_best = math.isfinite(clean[0]) and (self._best is None or score > best_score)
        chance = task.chance({metric: value[0].item() for metric, value in values.items()})
        observation = Observation(
            clean[0], boundary[0], error, gap[0], sum(sizes), _standard_error(gap, sizes), chance, boundary_error
        )
        return observation, clean if is_best else self._best


_BOUNDARY = Condition("boundary")


def _standard_error(estimates: list[float], sizes: list[int]) -> float:
    """Returns the standard error of a value from its values without each group; infinity if it is not known."""
    error = jackknife_error(estimates[0], estimates[1:], sizes) if len(estimates) > 1 else math.nan
    return math.inf if math.isnan(error) else error


def _checked(row: Row) -> Row:
    """Returns a row of a saved state, or raises a TypeError if a value of the row has another type."""
    for name, value in row._asdict().items():
        may_be_none = value is None and name in ("followed", "chance")
        if not (isinstance(value, str) if name == "reason" else is_number(value) or may_be_none):
            raise TypeError(f"{name} is {value!r}")
    return row


def _times(n: int) -> str:
    return "1 time" if n == 1 else f"{n} times"


def _span(first: object, last: object) -> str:
    return f"{first}" if first == last else f"{first} to {last}"


def _drivers(trainer: Trainer) -> list[Adaptation]:
    drivers = [getattr(callback, "adaptive", None) for callback in perturbing(trainer)]
    return [driver for driver in drivers if driver is not None]


def _counts(trainer: Trainer) -> bool:
    """Returns whether levels move in this validation."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _single(target: Any) -> int | str | None:
    """Returns the only target of a callback."""
    if not isinstance(target, list | tuple):
        return target
    if len(target) != 1:
        raise ValueError(
            f"an adaptive level needs one target, but the callback has {list(target)}: give AdaptiveLevel(target=…)"
        )
    return target[0]
