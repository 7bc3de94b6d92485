"""What drives an adaptive level: it looks at the model in each validation, and keeps what the rule has decided."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_noise import plots
from lightning_noise._checks import check_level
from lightning_noise.evaluation.old_predictor import Predictor
from lightning_noise.evaluation.old_tasks import Task
from lightning_noise.evaluation.positions import N_GROUPS, SamplePositions, check_validation, groups_of, seen_by_all
from lightning_noise.loop import loggers
from lightning_noise.loop.dispatch import perturbing
from lightning_noise.loop.perturbation import Context
from lightning_noise.metrics.calibration import CalibrationBins
from lightning_noise.metrics.scores import MeanSquaredError
from lightning_noise.metrics.statistics import jackknife_error
from lightning_noise.rng import Key
from lightning_noise.rules import AdaptiveLevel, Decision, Governor, Observation, Rule, SignedGap

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from lightning_noise.callbacks.base import NoiseCallback

__all__ = ["Adaptation"]


class Adaptation:
    """Moves the level of a callback by its rule, after each validation of a fit in which it is its turn.

    Args:
        callback: The callback whose level it is.
        setting: The adaptive level.

    Attributes:
        history: What was seen and done, validation by validation.
    """

    def __init__(self, callback: NoiseCallback, setting: AdaptiveLevel):
        if setting.rule.needs_boundary and not callback.can_probe:
            raise ValueError(
                f"{type(setting.rule).__name__} asks what noise does to held-out data, but {type(callback).__name__} mixes "
                "samples, or changes labels or gradients; give it a schedule, or for soft labels AdaptiveLevel(SignedGap())"
            )
        self.setting = setting
        self.history: list[Decision] = []
        self._callback = callback
        self._rule = _up_to(setting.rule, callback.max_level)
        self._state = self._rule.init(setting.start)
        self._fitting = True  # else a checkpoint, of which only the weights are wanted, would set the level back
        self._seen: Observation | None = None  # the last
        self._best: list[float] | None = None  # the best clean metric, and that without each group of samples in turn
        self._validations = 0  # also those in which another level moved
        self._pass: _Pass | None = None

    @property
    def level(self) -> float:
        """The level in force."""
        return self._state["level"]

    def summary(self) -> str:
        """Returns in words what was done."""
        name, level = self._callback.name, f"{self.level:.3g}"
        if not self.history or self._seen is None:
            return f"{name}: no validation yet, the level is {level}"
        counts = Counter(decision.reason for decision in self.history)
        done = ", ".join(f"{reason} {n} {'time' if n == 1 else 'times'}" for reason, n in counts.items())
        last = f"{self.history[-1].level:.3g}"
        seen = self._rule.describe(self._seen) + ("" if last == level else f", when it was {last}")
        return f"{name}: {done}; from {self.history[0].level:.3g} to {level}: {seen}"

    def state_dict(self) -> dict[str, Any]:
        """Returns the state in primitives."""
        return {
            "setting": self._kind,
            "state": dict(self._state),
            "seen": self._seen and tuple(self._seen),
            "best": self._best,
            "validations": self._validations,
            "history": [tuple(decision) for decision in self.history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state; of that of another rule or metric, from its level."""
        if not self._fitting:
            return
        self.history = [Decision(*decision) for decision in state_dict["history"]]
        self._validations = state_dict["validations"]
        if state_dict["setting"] != self._kind:
            rank_zero_warn(
                f"the level of {self._callback.name!r} in the checkpoint is one of {state_dict['setting']}, and now it is one "
                f"of {self._kind}: it goes on from there with a new state"
            )
            self._state = self._rule.init(state_dict["state"]["level"])
            return
        self._state = dict(state_dict["state"])
        self._seen = state_dict["seen"] and Observation(*state_dict["seen"])
        self._best = state_dict["best"]

    @property
    def _kind(self) -> str:
        """What a state is of: the kind of the rule and of the metric."""
        metric = self.setting.metric
        return f"{type(self._rule).__name__} and {type(metric).__name__ if isinstance(metric, Metric) else metric}"

    def prepare(self, stage: str) -> None:
        """Takes note of what the trainer is about to do."""
        self._fitting = stage == "fit"

    # --- the loop

    def check_run(self, trainer: Trainer) -> None:
        """Raises a ValueError where it could not move."""
        check_validation(trainer, "AdaptiveLevel", 1)
        if self._rule.needs_boundary and getattr(getattr(self._callback, "noise", None), "mixes_samples", False):
            raise ValueError(
                f"the noise of {self._callback.name!r} mixes rows, so what it does depends on the batch; give it a schedule"
            )

    def begin(self, trainer: Trainer) -> None:
        """Begins a validation."""
        self._pass = _Pass(self.setting.metric) if self._is_its_turn(trainer) else None

    def observe(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Looks at the model with a batch of a validation; in the sanity check, whether it can."""
        if dataloader_idx == 0 and batch_idx < (self.setting.max_batches or math.inf):
            if trainer.sanity_checking:
                self._try(trainer, pl_module, batch)
            elif self._pass is not None:
                self._look(trainer, pl_module, batch, batch_idx, self._pass)

    def decide(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Moves the level at the end of a validation."""
        self._validations += _counts(trainer)
        if self._pass is None:
            return
        looked = seen_by_all(trainer, self._pass if self._pass.metrics else None, f"AdaptiveLevel of {self._callback.name!r}")
        observation = trainer.strategy.broadcast(self._observed(trainer, looked))
        level, rule = self.level, self._rule
        self._state, reason = rule.update(self._state, observation)
        check_level(self.level, self._callback.max_level)  # a rule of one's own may move it anywhere
        self._seen, self._pass = observation, None
        self.history.append(Decision(step, level, observation.clean, observation.boundary, reason, self.level))
        logged = {"level": self.level, "reason": float(rule.reasons.index(reason))}
        prefix = f"adaptive/{self._callback.name}"
        # the values are those of all processes already
        pl_module.log_dict({f"{prefix}/{key}": value for key, value in logged.items()}, sync_dist=True, rank_zero_only=True)
        loggers.log_text(trainer, f"{prefix}/reason", f"{reason}: {rule.describe(observation)}", step)

    def conclude(self, trainer: Trainer, step: int) -> None:
        """Says at the end of a fit what was done."""
        rank_zero_info(self.summary())
        loggers.log_text(trainer, f"adaptive/{self._callback.name}/summary", self.summary(), step)
        if self.history and loggers.takes_figures(trainer):
            loggers.log_figure(trainer, f"adaptive/{self._callback.name}/moves", plots.adaptation(self.history), step)

    def _is_its_turn(self, trainer: Trainer) -> bool:
        moving: list[Any] = [callback for callback in perturbing(trainer) if getattr(callback, "adaptive", None) is not None]
        # by the count of one of them, as those that a checkpoint does not know have one of their own
        return _counts(trainer) and moving[0].adaptive._validations % len(moving) == moving.index(self._callback)

    @property
    def _predictor(self) -> Predictor:
        # not made earlier, because the callback has its inputs and targets only after it has made this
        setting = self.setting
        return Predictor(
            getattr(self._callback, "inputs", None) if setting.inputs is None else setting.inputs,
            _single(getattr(self._callback, "target", None)) if setting.target is None else setting.target,
            setting.predict,
            setting.metric,
        )

    def _try(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        predictor = self._predictor
        paths, target = predictor.locate(batch, noisy_inputs=False)
        level = self.level or 0.01  # at 0 nothing is done that could go wrong
        for perturbation in self._perturbations(trainer, pl_module, batch, level, 0, range(len(target))).values():
            _, preds, _ = predictor.read(trainer, pl_module, perturbation, paths, target)
            predictor.check(target, preds)

    def _look(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, looked: _Pass) -> None:
        predictor = self._predictor
        paths, target = predictor.locate(batch, noisy_inputs=False)
        positions, counted = looked.sample_positions.take(trainer, 0, batch_idx, rows=len(target))
        groups = groups_of(positions, target.device)[:counted]
        perturbations = self._perturbations(trainer, pl_module, batch, self.level, batch_idx, positions)
        for name, perturbation in perturbations.items():
            _, preds, labels = predictor.read(trainer, pl_module, perturbation, paths, target)
            if name == "clean":
                predictor.check(target, preds)
            looked.add(name, preds[:counted], labels[:counted], groups)

    def _perturbations(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, level: float, batch_idx: int, positions: range
    ) -> dict[str, AbstractContextManager[Any]]:
        """What the batch is seen through: nothing and, where the rule needs it and there is any, the noise at the level."""
        perturbations: dict[str, AbstractContextManager[Any]] = {"clean": nullcontext(batch)}
        if self._rule.needs_boundary and level > 0:
            key = Key((self._callback._seed, self._callback.name, "boundary"), positions=positions)
            if self._callback.one_draw_per_batch:
                key = key / batch_idx  # a single draw would say more of itself than of the level
            perturbations["boundary"] = self._callback.perturbation(
                Context(trainer, pl_module, is_probe=True), batch, level, key
            )
        return perturbations

    def _observed(self, trainer: Trainer, looked: _Pass) -> Observation:
        sizes = trainer.strategy.reduce(looked.sizes.clone(), reduce_op="sum").tolist()  # it writes to what it is given
        estimates = looked.estimates("clean")
        clean = [found[looked.key] for found in estimates]
        gap = [found.get("signed_gap", math.nan) for found in estimates]
        boundary = looked.estimates("boundary")[0][looked.key] if "boundary" in looked.metrics else math.nan
        if self._rule.needs_boundary and self.level == 0:
            boundary = clean[0]
        error = _error([now - best for now, best in zip(clean, self._best or clean, strict=True)], sizes)
        self._keep_best(clean)
        return Observation(clean[0], boundary, error, gap[0], sum(sizes), _error(gap, sizes))

    def _keep_best(self, clean: list[float]) -> None:
        skill = self._rule.skill
        if math.isfinite(clean[0]) and (self._best is None or skill(clean[0]) > skill(self._best[0])):
            self._best = clean


class _Pass:
    """What is measured in a validation: the metric without noise and at the boundary."""

    def __init__(self, metric: Task | Metric):
        self.key = "metric" if isinstance(metric, Metric) else "mse" if metric == "regression" else "accuracy"
        self.metrics: dict[str, Metric] = {}
        self.sample_positions = SamplePositions()
        self.sizes = torch.zeros(N_GROUPS, dtype=torch.long)  # of the groups of samples
        self._metric = metric
        self._is_own = isinstance(metric, Metric)  # which knows of no groups

    def add(self, name: str, preds: Tensor, target: Tensor, groups: Tensor) -> None:
        """Adds predictions of samples of these groups."""
        if name not in self.metrics:
            self.metrics[name] = self._made().to(preds.device)
        if name == "clean":
            self.sizes = self.sizes.to(groups.device).index_add_(0, groups, torch.ones_like(groups))
        metric = self.metrics[name]
        if len(target):  # the last batch of a process may be all padding
            metric.update(preds, target) if self._is_own else metric.update(preds, target, groups)

    def estimates(self, name: str) -> list[dict[str, float]]:
        """Returns the values of all samples, and those without each group in turn where groups are kept apart."""
        metric: Any = self.metrics[name]
        if self._is_own:
            return [{self.key: float(metric.compute())}]
        values, without = metric.estimates()
        return [values, *without]

    def _made(self) -> Metric:
        if isinstance(self._metric, Metric):
            return self._metric.clone()
        return MeanSquaredError(N_GROUPS) if self._metric == "regression" else CalibrationBins(n_groups=N_GROUPS)


def _error(estimates: list[float], sizes: list[int]) -> float:
    """The standard error of a value, infinite where it is not known, as of a metric of one's own."""
    error = jackknife_error(estimates[0], estimates[1:], sizes) if len(estimates) > 1 else math.nan
    return math.inf if math.isnan(error) else error


def _counts(trainer: Trainer) -> bool:
    """Whether levels move by this validation."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _up_to(rule: Rule, max_level: float) -> Rule:
    """The rule with its highest level, where it has one, not above the largest that has a meaning."""
    if isinstance(rule, Governor | SignedGap) and rule.hi > max_level:
        return replace(rule, hi=max_level)
    return rule


def _single(target: Any) -> int | str | None:
    """The target of the callback, where it has one."""
    if not isinstance(target, list | tuple):
        return target
    if len(target) != 1:
        raise ValueError(f"of the targets {list(target)} an adaptive level reads one: give AdaptiveLevel(…, target=…)")
    return target[0]
