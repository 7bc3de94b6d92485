"""The user's own validation under noise."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_noise._checks import check_counts
from lightning_noise.batch import Path, Selector, find_inputs, get, leaves
from lightning_noise.callbacks.base import Callback, NoiseCallback
from lightning_noise.evaluation.old_conditions import Probe, Probes
from lightning_noise.evaluation.positions import SamplePositions, check_name, check_validation, is_due
from lightning_noise.evaluation.results import CLEAN, Condition
from lightning_noise.loop import loggers
from lightning_noise.loop.dispatch import EvaluationDispatcher, Replaying
from lightning_noise.loop.internals import (
    current_hook,
    empty_results,
    evaluation_results,
    exchange_evaluation_results,
    logged_name,
    logged_so_far,
    reduce_logged,
    rng_states,
)
from lightning_noise.loop.snapshot import (
    Contents,
    Silent,
    State,
    copy_batch,
    restore_rng,
    restore_trainer,
    restore_weights,
)
from lightning_noise.noise import Noise, NoiseFunction
from lightning_noise.perturb.inputs import Clip

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["ReplayMonitor"]


class ReplayMonitor(Callback, Replaying):
    r"""Runs the user's own validation once more under each noise and level, and logs every metric that it logs.

    Before each validation or test batch the module's step is run on noisy copies of it, as are the hooks around it, with the
    weights, the precision and the random streams that the step itself is going to have, and at the end of the epoch the
    module's ``on_validation_epoch_end``. Metrics of torchmetrics, values of ``self.log`` with any reduction, lists that
    are filled for the end of the epoch: nothing has to be said of them. Each noise and level has a state of its own, which
    begins with what the module holds after ``on_validation_epoch_start``.

    ===========================================  =====================================================================
    key                                          what
    ===========================================  =====================================================================
    ``replay/clean/<key>``                       each key that the module logs for the epoch, from a replay without noise
    ``replay/<noise>/<level>/<key>``             the same under noise
    ===========================================  =====================================================================

    In ``trainer.test`` the keys begin with ``test/``. ModelCheckpoint and EarlyStopping can monitor them, with the advice on
    ``every_n_epochs`` of :class:`~lightning_noise.RobustnessMonitor`. They are those of all processes, whether or not the
    module says ``sync_dist``. Rows that a distributed sampler repeats count as they do in the module's own metrics. The noise
    of a sample is the same in each epoch, for any batch size and number of processes, as there.

    Two noises of five levels cost eleven validations, eleven copies of buffers and of what the metrics hold, and one of the
    weights at the end of the epoch; ``max_batches`` and ``every_n_epochs`` bound the time.

    The user's run is as without the monitor: attributes, containers, buffers, metrics and objects of the user's classes that
    the module holds, weights, gradients, random streams, learning rates, the trainer's attributes and metrics, and what the
    loggers write. Not undone is what leaves the process: files, what is printed, calls of a logger of the module's own.
    Not seen are slots of objects, iterators and generators, what closures and the globals of a module of Python hold, the
    datamodule, and other callbacks.

    Args:
        noises: A noise, a list of noises, whose tags are their class names in lower case, or a mapping from tag to noise. A
            noise callback may stand for a noise.
        levels: The levels of all noises, or a mapping from tag to levels; left out, the ``severities`` of each noise.
        inputs: Which leaf of the batch is the input, as in :class:`~lightning_noise.InputNoise`.
        clip: Bounds of the noisy input, as in :class:`~lightning_noise.InputNoise`.
        relative: Levels are in units of the standard deviation of each sample.
        every_n_epochs: How often to replay during a fit.
        max_batches: How many batches of each loader to replay; left out, all.
        seed: The seed of the draws. It is not that of the run, so that runs are compared on the same noise.
        name: The first part of the keys, of which a trainer can have one.

    Raises:
        RuntimeError: The step updates the weights, with an optimizer of the trainer or of its own.
        ValueError: A level, tag or path is wrong, the run has no validation, the step takes an iterator instead of a batch, or
            the processes log different keys.

    Example:
        >>> from lightning_noise import noise
        >>> monitor = ReplayMonitor([noise.Gaussian(), noise.Impulse()], levels=[0.1, 0.2])
        >>> monitor.levels
        {'gaussian': (0.1, 0.2), 'impulse': (0.1, 0.2)}
    """

    def __init__(
        self,
        noises: Noise | NoiseCallback | Sequence[Probe] | Mapping[str, Probe] | NoiseFunction,
        levels: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
        *,
        inputs: Selector | None = None,
        clip: Clip | None = None,
        relative: Literal["std"] | None = None,
        every_n_epochs: int = 1,
        max_batches: int | None = None,
        seed: int = 0,
        name: str = "replay",
    ):
        check_counts(every_n_epochs=every_n_epochs, max_batches=max_batches)
        self.probes = Probes(noises, levels, clip=clip, relative=relative, seed=seed)
        self.noises = self.probes.noises
        self.levels = self.probes.levels
        self.inputs = inputs
        self.clip = self.probes.clip
        self.relative: Literal["std"] | None = relative
        self.every_n_epochs = every_n_epochs
        self.max_batches = max_batches
        self.seed = seed
        self.name = name
        self._keys: list[str] = []  # that the module logs
        self._end()

    # --- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_name(trainer, self)
        self._laid_out = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_validation(trainer, "ReplayMonitor", self.every_n_epochs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loggers.log_text(trainer, f"{self.name}/configuration", loggers.describe_arguments(self))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._start_batch(trainer, batch_idx, dataloader_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._start_batch(trainer, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, self.name)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and not self._laid_out:
            self._laid_out = loggers.log_layout(trainer, self)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, f"test/{self.name}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()
        EvaluationDispatcher.detach(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()
        EvaluationDispatcher.detach(trainer)

    def charts(self) -> dict[str, list[str]]:
        """The tags that TensorBoard draws into one chart: clean and noisy values of a key of the module."""
        return {
            f"{key} under {tag}": [f"{re.escape(self.name)}/({CLEAN}|{re.escape(tag)}/[^/]*)/{re.escape(key)}$"]
            for key in self._keys
            for tag in self.levels
        }

    # --- replaying

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()
        step = f"{_stage(trainer)}_step"
        if "dataloader_iter" in inspect.signature(getattr(pl_module, step)).parameters:
            raise ValueError(f"ReplayMonitor cannot replay a {step}(dataloader_iter), which fetches each batch only once")
        EvaluationDispatcher.attach(trainer, step)

    def _end(self) -> None:
        self._replays: dict[Condition, _Replay] = {}
        self._positions: dict[int, SamplePositions] = {}
        self._batch_idx = self._dataloader_idx = 0
        self._streams: dict[str, Any] = {}  # that the module's hook before the step will find

    def _start_batch(self, trainer: Trainer, batch_idx: int, dataloader_idx: int) -> None:
        self._batch_idx, self._dataloader_idx = batch_idx, dataloader_idx
        if not self._replays and (trainer.sanity_checking or is_due(trainer, self.every_n_epochs)):
            # at the first batch and before the module's own hook: all begin with what the module holds now
            self._replays = {condition: _Replay(trainer) for condition in [Condition(CLEAN), *self._probed(trainer)]}
        if self._replays:
            self._streams = rng_states()

    def _probed(self, trainer: Trainer) -> list[Condition]:
        if trainer.sanity_checking:  # what does not fit is said before the training
            return [
                Condition(tag, max(self.levels[tag])) for tag, probe in self.noises.items() if isinstance(probe, NoiseCallback)
            ]
        return [Condition(tag, level) for tag, levels in self.levels.items() for level in levels]

    def replay(self, trainer: Trainer, step: Callable[..., Any], batch: Any, *indices: int) -> None:
        if not self._replays or (self.max_batches is not None and self._batch_idx >= self.max_batches):
            return
        loader = evaluation_results(trainer).dataloader_idx  # None if there is one loader
        before = self._replays[Condition(CLEAN)].state.held()
        for condition, perturbation in self._perturbations(trainer, batch):
            replay = self._replays[condition]
            with replay.entered(before), perturbation as noisy:
                replay.run(step, copy_batch(noisy), indices, self._batch_idx, loader, self._streams)

    def _perturbations(self, trainer: Trainer, batch: Any) -> Iterator[tuple[Condition, AbstractContextManager[Any]]]:
        paths, rows = self._locate(batch)
        sample_positions = self._positions.setdefault(self._dataloader_idx, SamplePositions())
        positions, _ = sample_positions.take(trainer, self._dataloader_idx, self._batch_idx, rows)
        yield Condition(CLEAN), nullcontext(batch)
        arguments = trainer, trainer.lightning_module, batch, paths, positions
        if trainer.sanity_checking:
            # the trials first, because there are some of noises that yield nothing
            for perturbation, condition in zip(self.probes.trials(*arguments), self._probed(trainer), strict=False):
                yield condition, perturbation
        else:
            yield from self.probes.perturbations(*arguments)

    def _locate(self, batch: Any) -> tuple[list[Path], int]:
        """The paths of the inputs, and the number of rows of the batch."""
        if self.inputs is None and all(isinstance(probe, NoiseCallback) for probe in self.noises.values()):
            return [], next((len(leaf) for _, leaf in leaves(batch) if leaf.ndim), 0)  # they know their inputs themselves
        paths = find_inputs(batch, self.inputs, absent=True)
        self.probes.check(batch, paths)
        return paths, len(get(batch, paths[0])) if paths else 0

    def _report(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        EvaluationDispatcher.detach(trainer)
        # a module may exchange its weights at the end of an epoch, as for those of an average
        kept = [(parameter, parameter.data, parameter.data.clone()) for parameter in pl_module.parameters() if self._replays]
        values: dict[Condition, dict[str, Tensor]] = {}
        before = self._replays[Condition(CLEAN)].state.held() if self._replays else []
        for condition, replay in self._replays.items():
            with restore_weights(kept):
                values[condition] = replay.finished(before)
        self._end()
        if not trainer.sanity_checking:
            results = evaluation_results(trainer)
            self._keys = list(values.get(Condition(CLEAN), self._keys))
            for condition, found in values.items():
                for key, value in found.items():
                    # not `self.log`, which refuses the suffixes of loaders; the values are those of all processes already, and
                    # are given to each of them, so that callbacks can monitor them
                    results.log(prefix, f"{prefix}/{condition.place}/{key}", value, sync_dist=True)


class _Replay:
    """A validation at one noise and level, in a state of its own.

    What the module logs is taken by another of Lightning's own collections of results, so that reductions, batch sizes and the
    suffixes of several loaders are those of the user's metrics.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.state = State(trainer)
        self.results = empty_results(trainer)
        # what `trainer.callback_metrics` and the like have read so far
        self._read = logged_so_far(trainer)
        self._collected: set[str] = set()
        self._values: dict[str, Tensor] = {}

    @contextmanager
    def entered(self, before: Contents) -> Iterator[None]:
        """Puts state, results and silent loggers in the place of the user's, whose state is ``before``, within."""
        trainer = self.trainer
        with restore_trainer(trainer), self.state.entered(before):
            trainer.loggers = [Silent(logger) for logger in trainer.loggers]  # type: ignore[assignment, misc]
            exchange_evaluation_results(trainer, self.results, self._read)
            yield

    def run(
        self,
        step: Callable[..., Any],
        batch: Any,
        indices: tuple[int, ...],
        batch_idx: int,
        loader: int | None,
        begin: dict[str, Any],
    ) -> None:
        """Runs the step on the batch, and the module's hooks before and after it; to be entered.

        ``begin`` are the random streams that the hook before the step begins with.
        """
        if loader != self.results.dataloader_idx:
            self._collect()  # as Lightning does between two loaders, which may share a metric
        self.results.dataloader_idx, self.results.batch, self.results.batch_size = loader, batch, None
        arguments = (batch, batch_idx) if loader is None else (batch, batch_idx, loader)
        with restore_rng(begin):  # the step is to find what the user's step will
            self._call("batch_start", *arguments)
        self._call("batch_end", step(batch, *indices), *arguments)

    def finished(self, before: Contents) -> dict[str, Tensor]:
        """Ends the epoch of the module in this state, and returns what it logged for the epoch."""
        with self.entered(before):
            self._collect()
            self.results.dataloader_idx = self.results.batch = self.results.batch_size = None
            self._call("epoch_end")
            self._collect()
        return self._values

    def _call(self, event: str, *arguments: Any) -> None:
        """Calls a hook of the module, in which it may log."""
        module = self.trainer.lightning_module
        name = f"on_{_stage(self.trainer)}_{event}"
        with current_hook(module, name):
            getattr(module, name)(*arguments)

    def _collect(self) -> None:
        """Computes, over all processes, what was logged since it was called last."""
        new = {key: metric for key, metric in self.results.valid_items() if key not in self._collected and metric.meta.on_epoch}
        if self.trainer.world_size > 1:  # what one process alone logs has no value on the others
            new = {key: metric for key, metric in new.items() if not metric.meta.sync.rank_zero_only}
        strategy = self.trainer.strategy
        if not strategy.reduce_boolean_decision(strategy.broadcast([*new]) == [*new]):
            raise ValueError(f"the processes log different keys, so that they cannot be reduced; this one logs {[*new]}")
        for metric in new.values():
            reduce_logged(metric, strategy.reduce)
        read = self.results.metrics(on_step=False)["callback"]
        self._read["_callback_metrics"].update(read)
        names = [logged_name(self.results, metric) for metric in new.values()]
        self._values |= {name: read[name].squeeze().to(torch.promote_types(read[name].dtype, torch.float32)) for name in names}
        self._collected |= new.keys()


def _stage(trainer: Trainer) -> str:
    return "test" if trainer.testing else "validation"
