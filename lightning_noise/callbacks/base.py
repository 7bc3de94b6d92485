"""Base classes of the noise callbacks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_noise import plots
from lightning_noise._checks import check_level, check_name
from lightning_noise._usage import UNKNOWN_END, Guided
from lightning_noise.batch import Selector
from lightning_noise.callbacks.adaptive import Adaptation, AdaptiveLevel, AnyLevel
from lightning_noise.evaluation.positions import data_share
from lightning_noise.labels import LabelNoise
from lightning_noise.loop import description, loggers
from lightning_noise.loop.dispatch import Perturbing, TrainingDispatcher, perturbing
from lightning_noise.loop.internals import Callback, class_of_callbacks, ends_batch, recomputes_statistics, should_log
from lightning_noise.loop.monitored import check_followed_keys, noise_key
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.loop.progress import KEY, Clock, check_held_out_data, check_validation, is_stopped, logging_step, run_seed
from lightning_noise.loop.returning import Returning
from lightning_noise.loop.terminal import say
from lightning_noise.losses.modes import LabelLoss
from lightning_noise.noise import Noise
from lightning_noise.noise.composition import parts_of
from lightning_noise.rng import Key
from lightning_noise.rules import Rule
from lightning_noise.schedules import Progress, Schedule

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Callback", "NoiseCallback", "TargetCallback", "Via", "check_parameters_are_whole"]

Via = Literal["loss", "batch", "sample"]

_UNITS: dict[str | None, str] = {  # of levels that are relative to the data
    "std": "in standard deviations",
    "max": "relative to the maximum",
    "filter": "relative to the norm of the filter",
}


class NoiseCallback(Guided, Callback, Perturbing, Returning):
    """Base of the callbacks that add noise in training.

    The level is set before each batch. The noise acts from the start of the training step to the end of the backward pass.
    It is removed even if the step raises an error. Validation, test and prediction never see the noise. Other callbacks see
    the clean batch.

    Args:
        level: The amount of noise: a number, a schedule, a callable from :class:`~lightning_noise.schedules.Progress` to a
            number, or an :class:`~lightning_noise.AdaptiveLevel`. A rule becomes an adaptive level. A callback that only
            monitors use needs no level: ``None``.
        noise: The noise, if the callback takes a noise.
        relative: What the level is relative to, if not to the data themselves.
        seed: The seed of the draws. Default: the seed of ``seed_everything``, or 0.
        name: The name in log keys and messages, unique in the trainer. The draws depend on the name, so two callbacks with the
            same seed draw independently.

    Attributes:
        adaptive: The driver of an adaptive level, or ``None``.
        place: What the noise is in.
        judged_by_epoch: Whether only an epoch in which nothing was changed is an error. Default: each step is judged, until the
            first step that changes something.
    """

    judged_by_epoch: ClassVar[bool] = False
    place: ClassVar[str] = "inputs"

    def __init__(
        self,
        level: AnyLevel | None,
        *,
        noise: Noise | LabelNoise | None = None,
        relative: str | None = None,
        seed: int | None,
        name: str,
    ):
        if isinstance(level, Rule):
            level = AdaptiveLevel(level)
        if isinstance(level, Noise):
            raise TypeError(f"level must be a number, a schedule, a callable or an AdaptiveLevel, got {level!r}")
        self.seed = seed
        self.name = check_name(name)
        if noise is not None:
            self.max_level = noise.max_level
        if isinstance(noise, Noise):
            self.severities, self.mixes_samples = noise.severities, noise.mixes_samples
            self.unit = _UNITS.get(relative, noise.unit)
            self.dimension = self._dimension(noise, relative)
        self.level: Any = level
        self.adaptive: Adaptation | None = None
        if isinstance(level, AdaptiveLevel):
            self.adaptive = Adaptation(level, self)
            # on the instance: for equal names, Lightning would refuse a class with these methods before our clearer error
            self.state_dict = self.adaptive.state_dict
            self.load_state_dict = self.adaptive.load_state_dict
        elif level is not None and (isinstance(level, type) or not callable(level)):
            self.level = check_level(level, self.max_level)  # type: ignore[arg-type]
        self.current_level = 0.0
        self._largest_level: float | None = None  # of the schedule in this run
        self._is_scheduled = False  # whether the schedule changes the level in this run
        self._clock = Clock()
        self._seed = 0  # of this run
        self._rank = 0  # among the ranks with data of their own
        self._takes_iterator: bool | None = None  # whether the training step fetches its batches; None before a training
        self._batch_idx = 0
        self._checked = False  # whether a batch of this fit was checked
        self._is_logged = False  # whether this batch is logged
        self._perturbations: list[Perturbation] = []  # of this step, which may fetch several batches
        self._effective: bool | None = None  # None until a step with noise
        Returning.enable()

    @classmethod
    def _advise(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if "noise" not in signature(cls.__init__).parameters:
            args = tuple(each for each in args if not isinstance(each, Noise))
        return super()._advise(args, kwargs)

    def perturbation(self, context: Context, batch: Any, level: float, key: Key) -> Perturbation:
        return Perturbation(partial(self._probe if context.is_probe else self.perturb, context, batch, level, key))

    def _probe(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        yield from self.perturb(context, batch, level, key, perturbation)
        if perturbation.effective is False:
            raise ValueError(self.describe_no_effect("the prediction"))

    @abstractmethod
    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        """Yields the noisy batch once, then restores other changes from copies.

        The level is above 0. The perturbation receives the statistics to log, and whether anything was changed.
        """

    @abstractmethod
    def check(self, pl_module: LightningModule, batch: Any) -> None:
        """Raises an error if the first batch of a fit cannot be perturbed."""

    def describe_no_effect(self, where: str) -> str:
        """Returns the error message if nothing was changed."""
        return f"{self.name!r} changed nothing in {where}"

    def start_batch(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        if not self._checked:
            if self._takes_iterator is None:
                raise ValueError(
                    f"{self.name!r} was added after the training had started; type Trainer(callbacks=[…]), with a schedule if "
                    "the noise must begin later"
                )
            self.check(trainer.lightning_module, batch)
            self._checked = True
        self._batch_idx = batch_idx
        # the extra epoch of weight averaging only recomputes the statistics of batch normalization
        if recomputes_statistics(trainer):
            self.current_level, self._is_logged = 0.0, False
        else:
            level = self.level  # which other callbacks may set
            is_checked = isinstance(level, float) and 0 <= level < math.inf and level <= self.max_level
            self.current_level = level if is_checked else self._level_of(trainer, batch_idx)
            self._is_logged = should_log(trainer)

    def training_perturbation(self, trainer: Trainer, batch: Any) -> Perturbation:
        key = Key((self._seed, self.name, trainer.current_epoch, self._batch_idx), rank=self._rank)
        context = Context(trainer, trainer.lightning_module, is_logged=self._is_logged)
        perturbation = self.perturbation(context, batch, self.current_level, key)
        self._perturbations.append(perturbation)
        return perturbation

    @property
    def last_perturbation(self) -> Perturbation | None:
        """The perturbation of the last batch of this training step."""
        return self._perturbations[-1] if self._perturbations else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if sum(callback.name == self.name for callback in perturbing(trainer)) > 1:
            raise ValueError(f"two noise callbacks are named {self.name!r}; type {type(self).__name__}(…, name='{self.name}2')")
        Returning.enable()
        self._clock = Clock()
        if stage == "fit" and self.level is None:
            level = self.severities[0] if self.severities else min(0.1, self.max_level)
            raise ValueError(
                f"{self.name!r} has no level to train with; type {type(self).__name__}(…, level={level}), "
                "or pass the callback to a monitor and not to the trainer"
            )
        if self.adaptive is not None:
            inputs, target = getattr(self, "inputs", None), getattr(self, "target", None)
            self.adaptive.prepare(stage, seed=self._choose_seed(trainer), inputs=inputs, target=target)
            if stage == "fit":
                say(trainer, self.adaptive.describe_cost())

    def logged_keys(self) -> dict[str, list[str]]:
        """Returns the keys that callbacks can follow; see :class:`~lightning_noise.loop.monitored.LogsKeys`."""
        followed = [] if self.adaptive is None else [self.adaptive.followed_key]
        return {noise_key(self.name, ""): [noise_key(self.name, "level"), *followed]}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        description.log_hyperparameters(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_followed_keys(trainer)
        if self.adaptive is not None:
            check_validation(trainer, "AdaptiveLevel")
            check_held_out_data(trainer, "AdaptiveLevel")
            self.adaptive.try_out(trainer, pl_module)
        self._clock.start(trainer)
        # a callable may read the state of the run, which is not known in advance
        outline = self._clock.outline(trainer) if isinstance(self.level, Schedule) else ()
        levels = {self._level_at(progress) for progress in outline}
        self._largest_level = max(levels, default=None)
        self._is_scheduled = len(levels) > 1
        if levels == {0.0} and (steps := self._clock.total_steps(trainer)) is not None:
            self._check_onset(trainer, steps)
        self._level_of(trainer, 0)
        self._checked, self._effective = False, None
        self._seed = self._choose_seed(trainer)
        self._rank, _ = data_share(trainer)
        self._takes_iterator = TrainingDispatcher.attach(trainer).takes_iterator
        description.log_configuration(trainer, self)
        if perturbing(trainer)[-1] is self:
            self._log_schedules(trainer)
        if self.adaptive is not None:
            self.adaptive.resume(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._clock.save(checkpoint)
        checkpoint.setdefault(KEY, {}).setdefault("levels", {})[self.name] = self.current_level
        if self.adaptive is not None and ends_batch(trainer):  # a callback may save before this one has seen the batch end
            self.adaptive.end_batch(trainer)
            checkpoint["callbacks"][self.state_key] = self.adaptive.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._clock.load(checkpoint)
        if trainer.state.fn == "fit":  # a validation may come before the next batch
            self.current_level = checkpoint.get(KEY, {}).get("levels", {}).get(self.name, 0.0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        description.show_hyperparameters(trainer, self)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._is_logged, self._perturbations = False, []
        if not self._takes_iterator:  # an iterator has not fetched the batch yet
            self.start_batch(trainer, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if pl_module.automatic_optimization:  # the perturbations have ended
            return
        # with a scaler, an update that is skipped would not resume the perturbations
        if getattr(trainer.precision_plugin, "scaler", None) is None and (dispatcher := TrainingDispatcher.of(trainer)):
            dispatcher.pause(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_logged:
            stats = self.last_perturbation.stats if self.last_perturbation else {}
            self._log(trainer, {"level": self.current_level, **stats})
        if self._perturbations and (not pl_module.automatic_optimization or outputs):  # a skipped step may not reach the noise
            self._note_effects()
        self._perturbations = []
        if trainer.is_last_batch:  # now, because a checkpoint may be saved before the end of the epoch
            self._end_epoch(trainer)
        if self.adaptive is not None:
            self.adaptive.end_batch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_stopped(trainer):
            self._end_epoch(trainer)
        if self.judged_by_epoch:
            self._check_effect("the training epoch")
            self._effective = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.adaptive is not None:
            self.adaptive.begin(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.adaptive is not None:  # now, because the validation step may write to the batch
            self.adaptive.observe(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.adaptive is not None:
            self.adaptive.decide(trainer, pl_module, logging_step(trainer))
        level = self.current_level if self.adaptive is None else self.adaptive.level
        is_shown = self.adaptive is not None
        # the value is the same on all ranks
        pl_module.log(noise_key(self.name, "level"), level, prog_bar=is_shown, sync_dist=True, rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.adaptive is not None:
            self.adaptive.conclude(trainer, logging_step(trainer))

    def results(self) -> Any:
        return self.current_level, self.adaptive and self.adaptive.state_dict()

    def take_results(self, results: Any) -> None:
        self.current_level, adapted = results
        if self.adaptive is not None:
            self.adaptive.continue_from(adapted)

    @cached_property  # Lightning asks before each hook
    def state_key(self) -> str:  # type: ignore[override]
        return self._generate_state_key(name=self.name)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        TrainingDispatcher.detach(trainer)
        self._checked, self._takes_iterator = False, None
        self._perturbations = []  # which cannot be pickled
        if self.adaptive is not None:
            self.adaptive.release(trainer)

    def _choose_seed(self, trainer: Trainer) -> int:
        # that of the first rank, because ranks may be seeded differently, and share gradients, sharded weights and probes
        return trainer.strategy.broadcast(run_seed() if self.seed is None else self.seed)

    def _dimension(self, noise: Noise, relative: str | None) -> str:
        if not noise.is_known:
            return ""
        if noise.max_level == 1 and all(part.max_level == 1 for part in parts_of(noise)):
            return "shares of elements"
        return f"{'units' if noise.additive and not relative else self.unit} of the {self.place}"

    def _note_effects(self) -> None:
        """Notes whether the perturbations of this step have changed anything, and raises an error if one should have."""
        for perturbation in self._perturbations:
            if perturbation.effective is not None:
                self._effective = bool(self._effective) or perturbation.effective
        if self._effective is False and not self.judged_by_epoch:
            self._check_effect("the training step")

    def _check_effect(self, where: str) -> None:
        if self._effective is False:
            raise ValueError(self.describe_no_effect(where))

    def _log(self, trainer: Trainer, measured: dict[str, float | Tensor]) -> None:
        metrics = {noise_key(self.name, key): float(value) for key, value in measured.items()}
        # the SNR of a batch without noise is infinite
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(finite, step=logging_step(trainer))

    def _level_of(self, trainer: Trainer, batch_idx: int) -> float:
        """Returns the level of a batch of this epoch."""
        if self.adaptive is not None:
            return self.adaptive.level
        if callable(self.level):
            return self._level_at(self._clock.progress(trainer, batch_idx))
        return check_level(self.level, self.max_level)

    def _log_schedules(self, trainer: Trainer) -> None:
        """Draws the schedules of all callbacks over the run, if its length is known."""
        callbacks = class_of_callbacks(trainer, NoiseCallback)
        levels = {callback.name: callback.level for callback in callbacks if callback._is_scheduled}
        if levels and (steps := self._clock.total_steps(trainer)) is not None:
            epochs = math.ceil(steps * trainer.accumulate_grad_batches / trainer.num_training_batches)
            draw = partial(plots.schedule_preview, levels, steps=steps, epochs=epochs)
            loggers.log_figure(trainer, "train_noise/schedules", draw, step=0)

    def _level_at(self, progress: Progress) -> float:
        try:
            level = self.level(progress)
        except TypeError as error:
            if progress.fraction is None and not isinstance(self.level, Schedule):
                raise ValueError(
                    f"the level of {self.name!r} raised TypeError: {error}. If it reads progress.fraction, {UNKNOWN_END}; or "
                    "read progress.step"
                ) from error
            raise
        return check_level(level, self.max_level)

    def _check_onset(self, trainer: Trainer, steps: int) -> None:
        """Warns if a schedule is above 0 only after the end of the run."""
        # at steps and epochs up to 2^39, with the fraction of the last step
        later = (self.level(Progress(2**i, 2**i, (steps - 1) / steps)) for i in range(40))
        if any(later) and not any(self.level(progress) for progress in self._clock.moments(trainer, range(steps))):
            rank_zero_warn(
                f"the level of {self.name!r} is 0 in all {steps} steps of this run, and above 0 only later: {self.level}; type "
                "times within the run, or in fractions of it"
            )

    def _end_epoch(self, trainer: Trainer) -> None:
        """Notes the length of the epoch, and warns if it changes the level."""
        is_first = self._clock.length is None
        dispatcher = TrainingDispatcher.of(trainer)
        fetched = -1 if dispatcher is None else dispatcher.fetched
        before, after = self._clock.end_epoch(trainer, max(self._batch_idx, fetched))
        if not (isinstance(self.level, Schedule) and is_first and None is not before.fraction != after.fraction):
            return
        level, true_level = self.level(before), self.level(after)
        if level != true_level:
            batches, said = self._clock.length, trainer.num_training_batches
            expected = f"{said} were expected" if said < math.inf else "their number was not known"
            rank_zero_warn(
                f"epoch {before.epoch} had {batches} batches, but {expected}: the level of {self.name!r} jumps from "
                f"{level:.3g} to {true_level:.3g}. The next epochs count {batches} batches. To prevent the jump, type "
                f"Trainer(limit_train_batches={batches})"
            )


class TargetCallback(NoiseCallback):
    """Base of the callbacks that change the targets of a batch.

    Args:
        target: Which leaf of the batch is the target.
        via: Where labels change: ``"loss"``, ``"batch"`` (probabilities) or ``"sample"`` (drawn labels in the batch).
    """

    can_probe: ClassVar[bool] = False

    def __init__(
        self,
        level: AnyLevel | None,
        *,
        noise: Noise | LabelNoise | None = None,
        target: Selector | None,
        via: Via | None,
        seed: int | None,
        name: str,
    ):
        super().__init__(level, noise=noise, seed=seed, name=name)
        if via not in (None, "loss", "batch", "sample"):
            raise ValueError(f"via must be 'loss', 'batch' or 'sample', got {via!r}")
        self.target: Any = target
        self.via = via
        self._has_warned = False  # in this fit, of a use of the target that is not followed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._has_warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        callbacks = perturbing(trainer)
        for later in callbacks[callbacks.index(self) + 1 :] if self._changes_loss else []:
            if isinstance(later, TargetCallback) and later.target == self.target and not later._changes_loss:
                raise ValueError(
                    f"{later.name!r} would change the target in the batch after {self.name!r} had read it; "
                    f"put {later.name!r} before {self.name!r} in the list of callbacks"
                )

    @property
    def _changes_loss(self) -> bool:
        """Whether class indices change at the loss, and not in the batch."""
        return self.via == "loss"

    def describe_no_effect(self, where: str) -> str:
        return (
            f"{where} computed no cross_entropy, nll_loss, binary_cross_entropy or binary_cross_entropy_with_logits of the "
            f"target, so {self.name!r} changed nothing. If the target is another leaf, type target=…. For another loss, type "
            f"{self._in_batch}via='batch') to change the target in the batch, or {self._in_batch}via='sample') to put drawn "
            "labels there. Class indices must be integers, and the target of a regression must be floating-point"
        )

    @property
    def _in_batch(self) -> str:
        """The beginning of what to type if the labels must change in the batch."""
        return f"{type(self).__name__}(…, "

    @contextmanager
    def _change_loss(self, modes: Sequence[LabelLoss], perturbation: Perturbation) -> Iterator[None]:
        """Enters the modes, and warns once if the loss uses the target in a way that no mode follows."""
        with ExitStack() as stack:
            for mode in modes:
                mode.searches = not self._has_warned
                stack.enter_context(mode)
            yield
        if modes:
            perturbation.effective = any(mode.applied for mode in modes)
        found = list(dict.fromkeys(use for mode in modes for use in mode.unfollowed))
        if found and perturbation.effective and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{self.name!r} changes the labels where cross_entropy and its like are computed, but the loss also needs "
                f"{', '.join(found[:3])}, which used the true labels of the batch. To change the labels there, too, type "
                f"{self._in_batch}via='sample'), or via='batch' if the loss takes probabilities"
            )


def check_parameters_are_whole(trainer: Trainer, name: str) -> None:
    """Raises a ValueError if the strategy flattens or partitions parameters."""
    for strategy in type(trainer.strategy).__mro__:
        if strategy.__name__ in ("FSDPStrategy", "DeepSpeedStrategy"):
            raise ValueError(
                f"{name!r} cannot work with {strategy.__name__}, which has no whole parameters outside the forward pass; "
                "use DDPStrategy, or ModelParallelStrategy with fully_shard"
            )
