"""A monitor that repeats the user's own validation under noise."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_noise.batch import Selector, find_inputs, get, leaves
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.callbacks.inputs import InputNoise
from lightning_noise.callbacks.monitor import Monitor, Noises
from lightning_noise.evaluation.conditions import CLEAN, NOISY, Condition, Conditions, Levels
from lightning_noise.evaluation.positions import SamplePositions, check_ranks
from lightning_noise.loop import loggers
from lightning_noise.loop.comparisons import Comparisons
from lightning_noise.loop.dispatch import EvaluationDispatcher, Replaying
from lightning_noise.loop.internals import (
    evaluation_loaders,
    evaluation_results,
    launches_copies,
    n_evaluation_loaders,
    rng_states,
    show_to_callbacks,
)
from lightning_noise.loop.perturbation import Context
from lightning_noise.loop.replay import Replay, stage_of
from lightning_noise.loop.snapshot import Change, Contents, copy_batch, restore_trainer
from lightning_noise.loop.trial import held_out_batches
from lightning_noise.loop.watch import Watch
from lightning_noise.masks import Mask
from lightning_noise.perturb.inputs import Clip
from lightning_noise.perturb.normalization import Numbers

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["ReplayMonitor"]


class ReplayMonitor(Monitor, Replaying):
    r"""Repeats the user's own validation under noise, and logs its metrics.

    Before each validation or test batch, the module's step and the hooks around it run on noisy copies of the batch. Weights,
    precision and random streams are those of the user's step. At the end of the epoch the module's ``on_validation_epoch_end``
    runs for each noise and level. Metrics of torchmetrics, values of ``self.log`` with any reduction, and lists that are filled
    for the end of the epoch need no configuration. Each noise and level has its own state, which begins with what the module
    holds after ``on_validation_epoch_start``. What transfer hooks and other callbacks set on the module for a batch is part of
    each state; these hooks see the batch without noise, but a tensor of the batch that they keep is noisy in the step.

    ===========================================  ==============================================================
    key                                          value
    ===========================================  ==============================================================
    ``replay/clean/<key>``                       each key that the module logs for the epoch, from a replay without noise
    ``replay/<noise>/<level>/<key>``             the same key under noise
    ``replay/noisy/<key>``                       the mean over all noises and levels
    ===========================================  ==============================================================

    In ``trainer.test``, the keys begin with ``test/``. The tables of ``trainer.validate`` and ``trainer.test`` show the clean
    metric and the mean under noise. ``trainer.callback_metrics`` holds all of them.

    Two noises with five levels each cost eleven validations, eleven copies of the buffers and metric states, and one copy of
    the weights at the end of the epoch. ``max_batches`` and ``every_n_epochs`` bound the time.

    The monitor does not change the run. It restores all attributes, containers, buffers, metrics and objects of the user's
    classes that the module holds; weights, gradients, random streams and learning rates; the attributes and metrics of the
    trainer. The loggers write what they would write without the monitor. It does not restore objects that closures and Python
    globals hold, the datamodule, or other callbacks. It cannot undo what leaves the process: files, printed text, and calls of
    a logger that the module made itself.

    If the input is also the target, as in an autoencoder whose batch is one tensor, the target is noisy, too. To keep the
    target clean, let the data set return the tensor twice. A warning says so if the target of a loss of torch is noisy, or if
    the step takes the size of its difference to another tensor, as by ``square``, and uses no other tensor of the batch.
    To find out, the first noisy batch is replayed once more.

    The arguments are those of :class:`~lightning_noise.RobustnessMonitor`.

    Args:
        noises: The noises. Default: Gaussian and impulse noise.
        levels: The levels of all noises if they have one unit, or a mapping from name to levels.
        inputs: Which leaf of the batch is the input.
        clip: Bounds of the noisy input.
        relative: With ``"std"``, levels are in units of the standard deviation of each sample.
        mask: Which positions of the input are valid, as in :class:`~lightning_noise.InputNoise`.
        mean: The mean with which the input was normalized, as in :class:`~lightning_noise.InputNoise`.
        std: The standard deviation with which the input was normalized.
        every_n_epochs: How often to replay during a fit.
        max_batches: How many batches of each loader to replay. Default: all.
        seed: The seed of the draws.
        name: The first part of the keys.

    Raises:
        RuntimeError: If the step updates the weights, with an optimizer of the trainer or of its own, or fetches from an
            iterator that the module holds.
        ValueError: If a level, name or path is wrong, the run has no validation, the step takes an iterator instead of a batch,
            or the ranks log different keys.

    Example:
        >>> from lightning_noise import noise
        >>> levels = {"gaussian": [0.1, 0.2], "impulse": [0.05, 0.1]}
        >>> monitor = ReplayMonitor([noise.Gaussian(), noise.Impulse()], levels)
        >>> monitor.levels
        {'gaussian': (0.1, 0.2), 'impulse': (0.05, 0.1)}
    """

    pass_name = "more validation steps"

    def __init__(
        self,
        noises: Noises | None = None,
        levels: Levels | None = None,
        *,
        inputs: Selector | None = None,
        clip: Clip | None = None,
        relative: Literal["std"] | None = None,
        mask: Mask | None = None,
        mean: Numbers | None = None,
        std: Numbers | None = None,
        every_n_epochs: int = 1,
        max_batches: int | None = None,
        seed: int = 0,
        name: str = "replay",
    ):
        super().__init__(
            noises,
            levels,
            inputs=inputs,
            clip=clip,
            relative=relative,
            mask=mask,
            mean=mean,
            std=std,
            every_n_epochs=every_n_epochs,
            max_batches=max_batches,
            seed=seed,
            name=name,
        )
        self._keys: list[str] = []  # that the module logs
        self._hidden: list[str] = []  # keys of the last validation or test that no table shows
        self._end_epoch()

    # --- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._keys = []
        super().setup(trainer, pl_module, stage)
        self._is_tried = self._has_looked = self._has_warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self._is_tried:  # without a sanity check
            with held_out_batches(trainer, 0) as batches:
                for batch in batches:
                    self._try_noise(Context(trainer, pl_module, is_probe=True), batch)
                    if launches_copies(trainer):
                        self._keys = self._try_step(trainer, batch)
            self._check_pipe(trainer, n_others=len(self._keys))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_epoch()
        step = f"{stage_of(trainer)}_step"
        if "dataloader_iter" in inspect.signature(getattr(pl_module, step)).parameters:
            raise ValueError(
                f"ReplayMonitor needs a {step}(batch, batch_idx) and cannot replay a {step}(dataloader_iter), "
                "which fetches each batch only once"
            )
        EvaluationDispatcher.attach(trainer, step)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._is_tried = self._is_tried or trainer.sanity_checking
        self._batch_idx, self._dataloader_idx = batch_idx, dataloader_idx

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        EvaluationDispatcher.detach(trainer)
        values = self._finish_replays(trainer) if trainer.sanity_checking or self._is_due(trainer) else {}
        self._end_epoch()
        if values and not trainer.sanity_checking:
            self._log(trainer, values)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "validate":
            loggers.log_details(trainer, self._hidden)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start
    on_test_epoch_end = on_validation_epoch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._end_epoch()
        EvaluationDispatcher.detach(trainer)

    def charts(self) -> dict[str, loggers.Chart]:
        charts: dict[str, loggers.Chart] = {}
        strongest = [Condition(noise, max(levels)) for noise, levels in self.levels.items()]
        for key in self._keys:
            clean, *noisy = (f"{self.name}/{condition.place}/{key}" for condition in (CLEAN, *strongest))
            charts[f"{self.name}: {key}"] = "Multiline", [f"{re.escape(tag)}$" for tag in (clean, *noisy)]
            for condition, tag in zip(strongest, noisy, strict=True):
                charts[f"{self.name}: {key}, clean to {condition.noise} {condition.level:g}"] = loggers.band(tag, clean)
        return charts

    def logged_keys(self) -> dict[str, list[str]]:
        # what the module will log is not known, not even after a sanity check
        return {f"{self.name}/": [f"{self.name}/{condition.place}/" for condition in (CLEAN, NOISY, *self.conditions)]}

    def count_keys(self) -> int:
        return (1 + self._n_passes) * max(1, len(self._keys))  # the mean is a key, too

    def _log(self, trainer: Trainer, values: dict[Condition, dict[str, Tensor]]) -> None:
        prefix = f"test/{self.name}" if trainer.testing else self.name
        clean, *noisy = values.values()
        keys = dict.fromkeys(key for logged in noisy for key in logged)
        means = {key: torch.stack([logged[key] for logged in noisy if key in logged]).mean() for key in keys}
        found = {
            f"{prefix}/{condition.place}/{key}": value
            for condition, logged in {**values, NOISY: means}.items()
            for key, value in logged.items()
        }
        summary = [f"{prefix}/{CLEAN.place}/{key}" for key in clean] + [f"{prefix}/{NOISY.place}/{key}" for key in keys]
        if trainer.state.fn != "fit":  # Lightning prints a table of what is logged
            self._hidden = [key for key in found if key not in summary]
            show_to_callbacks(trainer, {key: found.pop(key) for key in self._hidden})
        for key, value in found.items():
            # not `self.log`, which refuses the suffixes of loaders; every rank logs the reduced value, for its callbacks
            evaluation_results(trainer).log(prefix, key, value, sync_dist=True)

    # --- replaying

    def _try_noise(self, context: Context, batch: Any) -> None:
        """Adds noise to the inputs of a batch, and checks other probes. The step itself is left to the validation."""
        for probe in self.conditions.probes.values():
            if isinstance(probe, NoiseCallback) and not isinstance(probe, InputNoise):
                probe.check(context.module, batch)
        inputs = {name: probe for name, probe in self.conditions.probes.items() if isinstance(probe, InputNoise)}
        levels = {name: [max(self.levels[name])] for name in inputs}
        rows = range(self._count_rows(batch))
        for _, perturbation in Conditions(inputs, levels).perturb(context, batch, rows) if inputs else ():
            with perturbation:
                pass

    def _try_step(self, trainer: Trainer, batch: Any) -> list[str]:
        """Returns the keys that the module logs in a step, or none: the step may need what another callback sets."""
        replay, n = Replay(trainer), n_evaluation_loaders(trainer)
        index = None if n == 1 else 0
        indices = (0,) if index is None else (0, index)
        rng = dict.fromkeys(("rng_of_hook", "rng"), rng_states())
        with suppress(Exception), restore_trainer(trainer), replay.entered(replay.state.current()):
            step = trainer.strategy.validation_step
            replay.run_step(step, copy_batch(batch), indices, batch_idx=0, dataloader_idx=index, **rng)
        return n * replay.keys

    def before_transfer(self, trainer: Trainer) -> None:
        if not self._replays and (trainer.sanity_checking or self._is_due(trainer)):
            self._replays = {condition: Replay(trainer) for condition in (CLEAN, *self._current_conditions(trainer))}
        if self._replays:
            self._watch.begin(trainer.lightning_module)

    def after_callbacks(self, trainer: Trainer) -> None:
        if self._replays:
            self._changes = self._watch.end(trainer.lightning_module)
            self._rng = rng_states()

    def replay(self, trainer: Trainer, step: Callable[..., Any], batch: Any, *indices: int) -> None:
        if not self._replays or (self.max_batches is not None and self._batch_idx >= self.max_batches):
            return
        self._end_loaders(trainer, until=self._dataloader_idx)
        dataloader_idx = evaluation_results(trainer).dataloader_idx  # None if there is one loader
        before = self._replays[CLEAN].state.current()
        sample_positions = self._positions.setdefault(self._dataloader_idx, SamplePositions())
        positions, _ = sample_positions.take(trainer, self._dataloader_idx, self._batch_idx, self._count_rows(batch))
        context = Context(trainer, trainer.lightning_module, is_probe=True, positions=sample_positions.of_input)
        noisy = self._current_conditions(trainer).perturb(context, batch, positions)
        conditions, rng = chain([(CLEAN, nullcontext(batch))], noisy), rng_states()
        run = partial(
            self._run,
            before,
            batch,
            step=step,
            indices=indices,
            batch_idx=self._batch_idx,
            dataloader_idx=dataloader_idx,
            rng_of_hook=self._rng,
            rng=rng,
        )
        for condition, perturbation in self._follow(trainer, self._batch_idx, conditions):
            with restore_trainer(trainer, rng), perturbation as perturbed:
                if self._looks_at(condition):
                    with restore_trainer(trainer, rng):
                        self._look_at_targets(trainer, batch, perturbed, run)
                run(self._replays[condition], copy_batch(perturbed))

    def _run(self, before: Contents, batch: Any, replay: Replay, own: Any, watch: Any = None, **options: Any) -> None:
        """Runs the step of a replay on its own copy of a batch."""
        replay.state.take_over(self._changes, _pair_leaves(batch, own))
        with replay.entered(before), watch or nullcontext():
            replay.run_step(batch=own, **options)

    def _looks_at(self, condition: Condition) -> bool:
        """Returns whether to look at the targets, which all ranks do at once, because their steps may wait for each other."""
        if self._has_looked or not condition.level:
            return False
        return isinstance(self.conditions.probes[condition.noise], InputNoise)

    def _look_at_targets(self, trainer: Trainer, batch: Any, perturbed: Any, run: Callable[..., None]) -> None:
        """Warns if the step compares with a noisy input.

        The step is run once more, because layers such as a ``TransformerEncoder`` compute otherwise if they are watched.
        """
        self._has_looked = True
        own = copy_batch(perturbed)
        triples = [
            (leaf, seen, copied)
            for (_, leaf), (_, seen), (_, copied) in zip(leaves(batch), leaves(perturbed), leaves(own), strict=True)
        ]
        noisy = [(copied, leaf) for leaf, seen, copied in triples if seen is not leaf]
        comparisons = Comparisons(noisy, [copied for leaf, seen, copied in triples if seen is leaf])
        with torch.compiler.set_stance("force_eager"):  # a mode would become part of compiled code
            run(Replay(trainer), own, comparisons)
        if comparisons.found:
            rank_zero_warn(
                f"{self.name!r}: the input is also the target of the loss, so the target is noisy, too, and a module that "
                "reproduces the noise has no loss; for a clean target, let the data set return the tensor twice, compare with "
                "the second, and type inputs=0"
            )

    def _end_loaders(self, trainer: Trainer, until: int) -> None:
        """Computes the metrics of all earlier loaders on all ranks, also on ranks without a batch."""
        for index in range(self._n_ended, until):
            saw_batch = index in self._positions
            if trainer.strategy.reduce_boolean_decision(saw_batch, all=False):
                check_ranks(trainer, type(self).__name__, saw_batch)
                before = self._replays[CLEAN].state.current()
                for replay in self._replays.values():
                    replay.end_loader(before)
        self._n_ended = until

    def _current_conditions(self, trainer: Trainer) -> Conditions:
        return self.conditions.trials() if trainer.sanity_checking else self.conditions

    def _count_rows(self, batch: Any) -> int:
        """Returns the number of rows of the noisy input, or of the first tensor if no noise is in the input."""
        selectors = [probe.inputs for probe in self.conditions.probes.values() if isinstance(probe, InputNoise)]
        if selectors:
            paths = find_inputs(batch, selectors[0], absent=True)
            return len(get(batch, paths[0])) if paths else 0
        return next((len(leaf) for _, leaf in leaves(batch) if leaf.ndim), 0)

    def _finish_replays(self, trainer: Trainer) -> dict[Condition, dict[str, Tensor]]:
        self._end_loaders(trainer, until=1 if evaluation_loaders(trainer) is None else n_evaluation_loaders(trainer))
        if not self._replays:
            raise ValueError(f"{type(self).__name__} saw no batch")
        values: dict[Condition, dict[str, Tensor]] = {}
        # a module may exchange its weights for an average at the end of an epoch: their values or their tensors
        parameters = trainer.lightning_module.parameters()
        weights = [(parameter, parameter.data, parameter.data.clone()) for parameter in parameters]
        before = self._replays[CLEAN].state.current()
        for condition, replay in self._replays.items():
            try:
                values[condition] = replay.finish(before)
            finally:
                for parameter, data, copied in weights:
                    data.copy_(copied)
                    parameter.data = data
        self._keys = list(values[CLEAN])
        if not any(values.values()) and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{self.name!r}: the {stage_of(trainer)} steps of the module have logged nothing for the epoch, so there is "
                "nothing to repeat; type self.log('loss', loss) in the step, because values that callbacks log are not repeated"
            )
        return values

    def _end_epoch(self) -> None:
        self._replays: dict[Condition, Replay] = {}
        self._positions: dict[int, SamplePositions] = {}
        self._batch_idx = self._dataloader_idx = self._n_ended = 0
        self._watch, self._changes = Watch(), list[Change]()  # what is set for a batch before the step
        self._rng: dict[str, Any] = {}  # with which the module's hook before the step begins


def _pair_leaves(batch: Any, own: Any) -> dict[int, Tensor]:
    """Returns the leaves of a copied batch by the ``id`` of the leaf that each stands for."""
    return {id(leaf): copied for (_, leaf), (_, copied) in zip(leaves(batch), leaves(own), strict=True)}
