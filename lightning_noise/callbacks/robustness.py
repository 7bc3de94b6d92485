"""The model watched through noise on held-out data."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_noise import plots, report
from lightning_noise._checks import check_counts
from lightning_noise.batch import Path, Selector, get
from lightning_noise.callbacks.base import Callback, NoiseCallback
from lightning_noise.evaluation.old_conditions import Probe, Probes
from lightning_noise.evaluation.old_predictor import Predictor
from lightning_noise.evaluation.old_tasks import LOGGED, Task, monitor_metrics
from lightning_noise.evaluation.positions import (
    N_GROUPS,
    SamplePositions,
    check_name,
    check_pipe,
    check_validation,
    groups_of,
    is_due,
    seen_by_all,
)
from lightning_noise.evaluation.results import CLEAN, Condition, Measurement
from lightning_noise.loop import loggers
from lightning_noise.loop.internals import class_of_callbacks, n_evaluation_loaders
from lightning_noise.loop.progress import logging_step
from lightning_noise.noise import Noise, NoiseFunction
from lightning_noise.perturb.inputs import Clip

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["RobustnessMonitor"]

_CHARTED = ("accuracy", "loss", "ece")


class RobustnessMonitor(Callback):
    r"""Measures a model on held-out data under noise, beside the same data without.

    Before each validation or test step the module predicts the batch, clean and under each noise and level, without
    gradients and with the precision of the trainer. This costs a forward pass of the batch and a draw for each of its samples,
    so two noises of five levels cost eleven times the forward passes of the validation; ``max_batches`` and ``every_n_epochs``
    bound it. Memory does not grow with the data. Weights, the user's metrics and the global random streams are as without the
    monitor, unless the forward pass itself changes the module in evaluation, which is not undone. For the user's own metrics
    under noise there is :class:`~lightning_noise.ReplayMonitor`.

    The noise of a sample is one draw that depends on its place in the order of the loader, so with a loader that does not
    shuffle and gives a row for each sample it is the same in each epoch and for any batch size and number of processes, and
    the levels of a noise share one draw: what changes in a curve is the model. Noise in weights is one draw for all samples.
    Rows that a distributed sampler repeats to fill up the last batch are not counted.

    ============================================  ===================================================================
    key                                           what
    ============================================  ===================================================================
    ``robustness/clean/<metric>``                 a metric without noise
    ``robustness/<noise>/<level>/<metric>``       the same under noise; ``…_se`` its standard error over several draws
    ``robustness/<noise>/accuracy_drop``          clean minus noisy, averaged over the levels; ``loss_drop`` too
    ``robustness/<noise>/accuracy_retention``     share of the skill above chance that is left, averaged over the levels
    ``robustness/<noise>/accuracy_area``          area under the accuracy over the level, from clean on, over its width
    ``robustness/<noise>/sensitivity``            the rise of the loss under noise in weights, averaged over the levels
    ``robustness/<metric>_mean``                  averaged over noises and levels
    ``robustness/score``                          half the clean and half the mean noisy accuracy
    ``robustness/<noise>/corruption_error``       errors for each of the baseline's; ``robustness/mce`` is their mean
    ============================================  ===================================================================

    The metrics of a classifier are ``accuracy``, ``loss`` (cross-entropy), ``brier``, ``ece`` beside ``ece_floor``, what a
    perfectly calibrated model would show, ``signed_gap`` (confidence minus accuracy), ``flip_rate`` (predictions that differ
    from the clean ones), ``entropy`` and ``failure_auroc``; see :mod:`lightning_noise.metrics`. Binary and multi-label
    predictions count as predictions of two classes for each label, so a Brier score is the sum over both. The metric of a
    regression is ``loss``, the mean squared error. NaN is logged as NaN and does not stop the run.

    In ``trainer.test`` the keys begin with ``test/``. ModelCheckpoint and EarlyStopping can monitor them. With
    ``every_n_epochs`` a key keeps its old value in between, so give ModelCheckpoint the same interval, and EarlyStopping
    ``strict=False``, because there is no value before the first.

    TensorBoard also gets the curve over the level and histograms of the entropy in each validation, a chart of clean and noisy
    values for each metric under *Custom scalars*, and clean beside noisy samples with their predicted classes where the input
    is an image or a signal; at the end of a fit, a validation or a test also reliability diagrams. A logger of Weights & Biases
    gets the figures as images, and beside the logs of others they are PNG files. At the end ``report.json`` and ``report.md``
    are written beside the logs of the first logger, with a 95 % interval of each figure and of each difference to the baseline:
    of a fit in ``robustness``, else in ``validate/robustness`` or ``test/robustness``. The report is also the attribute
    ``report``, in the process that measured.

    Args:
        noises: A noise, a list of noises, whose tags are their class names in lower case, or a mapping from tag to noise. A
            noise callback may stand for a noise.
        levels: The levels of all noises, or a mapping from tag to levels; left out, the ``severities`` of each noise.
        inputs: Which leaf of the batch is the input, as in :class:`~lightning_noise.InputNoise`.
        target: Which leaf holds the target; left out, the second element of a sequence.
        predict: A callable from module and batch to predictions; left out, ``module(input)``.
        metrics: ``"multiclass"`` for logits of shape :math:`(B, K, *)` with class indices of shape :math:`(B, *)`, a class for
            each pixel included; ``"binary"`` and ``"multilabel"`` for a logit for each target of 0 or 1; ``"regression"`` for
            predictions of the shape of the target; or a ``MetricCollection`` of one's own, which is given what the module
            returns, ``clean_preds=`` where a metric takes them, and the target. Of one's own there are drops and
            means, of an ``accuracy`` area and score as well, and no intervals.
        n_draws: How many draws of each noise are measured; the values are their means.
        clip: Bounds of the noisy input, as in :class:`~lightning_noise.InputNoise`.
        relative: Levels are in units of the standard deviation of each sample.
        every_n_epochs: How often to measure during a fit.
        max_batches: How many batches of each process to measure; left out, all.
        dataloader_idx: Which of several loaders.
        baseline: The ``report.json`` of an earlier run, or its folder, to be compared with. Differences are paired where both
            measured the same samples.
        seed: The seed of the draws. It is not that of the run, so that runs are compared on the same noise.
        name: The first part of the keys, of which a trainer can have one.

    Raises:
        ValueError: A level, tag or path is wrong, the run has no validation, the module does not return predictions of the
            target, or there is no such report.

    Example:
        >>> from lightning_noise import noise
        >>> monitor = RobustnessMonitor([noise.Gaussian(), noise.Impulse()], levels=[0.1, 0.2])
        >>> monitor.levels
        {'gaussian': (0.1, 0.2), 'impulse': (0.1, 0.2)}
    """

    def __init__(
        self,
        noises: Noise | NoiseCallback | Sequence[Probe] | Mapping[str, Probe] | NoiseFunction,
        levels: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
        *,
        inputs: Selector | None = None,
        target: int | str | None = None,
        predict: Callable[[Any, Any], Any] | None = None,
        metrics: Task | MetricCollection = "multiclass",
        n_draws: int = 1,
        clip: Clip | None = None,
        relative: Literal["std"] | None = None,
        every_n_epochs: int = 1,
        max_batches: int | None = None,
        dataloader_idx: int = 0,
        baseline: str | os.PathLike[str] | None = None,
        seed: int = 0,
        name: str = "robustness",
    ):
        check_counts(n_draws=n_draws, every_n_epochs=every_n_epochs, max_batches=max_batches)
        if not isinstance(metrics, MetricCollection) and metrics not in get_args(Task):
            raise ValueError(f"metrics must be one of {list(get_args(Task))} or a MetricCollection, got {metrics!r}")
        self.probes = Probes(noises, levels, clip=clip, relative=relative, seed=seed, n_draws=n_draws)
        self.noises = self.probes.noises
        self.levels = self.probes.levels
        self.inputs = inputs
        self.target = target
        self.predict = predict
        self.metrics: Task | MetricCollection = metrics
        self.n_draws = n_draws
        self.clip = self.probes.clip
        self.relative: Literal["std"] | None = relative
        self.every_n_epochs = every_n_epochs
        self.max_batches = max_batches
        self.dataloader_idx = dataloader_idx
        self.baseline = baseline
        self.seed = seed
        self.name = name
        self.report: dict[str, Any] | None = None
        self._predictor = Predictor(inputs, target, predict, metrics)
        self._reset()

    # --- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_name(trainer, self)
        monitors = class_of_callbacks(trainer, RobustnessMonitor)
        check_pipe(trainer, sum(monitor._n_keys for monitor in monitors))
        self._baseline = None if self.baseline is None else self._comparable(report.read(os.fspath(self.baseline)))
        self._pictured = self._laid_out = False
        self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_validation(trainer, "RobustnessMonitor", self.every_n_epochs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loggers.log_text(trainer, f"{self.name}/configuration", loggers.describe_arguments(self))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            self._reset()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # before the step, which may write to the batch
        if trainer.sanity_checking and dataloader_idx == self.dataloader_idx:
            self._try(trainer, pl_module, batch)  # what does not fit is said before the training
        if self._is_due(trainer):
            self._observe(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_loader(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            self._log(trainer, pl_module, self.name)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._conclude(trainer, self.name, f"validate/{self.name}")
        elif not trainer.sanity_checking and not self._laid_out:
            self._laid_out = loggers.log_layout(trainer, self)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._conclude(trainer, self.name, self.name)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._observe(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, f"test/{self.name}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._conclude(trainer, f"test/{self.name}", f"test/{self.name}")

    @property
    def _n_keys(self) -> int:
        """How many keys are logged."""
        own = isinstance(self.metrics, MetricCollection)
        n_metrics = len(self.metrics) if own else len(LOGGED)
        n_levels = sum(map(len, self.levels.values())) * min(self.n_draws, 2)
        return n_metrics * (2 + n_levels) + (n_metrics if own else 5) * len(self.levels) + 1

    def charts(self) -> dict[str, list[str]]:
        """The tags that TensorBoard draws into one chart: clean and noisy values of a metric."""
        own = isinstance(self.metrics, MetricCollection)
        charted = [metric for metric in self._measured if own or metric in _CHARTED]
        return {
            f"{metric} under {tag}": [f"{re.escape(self.name)}/({CLEAN}|{re.escape(tag)}/[^/]*)/{re.escape(metric)}$"]
            for metric in charted
            for tag in self.levels
        }

    # --- measuring

    def _reset(self) -> None:
        self._measurement: Measurement | None = None
        self._positions = SamplePositions()
        self._shown: dict[Condition, _Shown] = {}
        self._measured: list[str] = []  # the names of the metrics

    def _is_due(self, trainer: Trainer) -> bool:
        return is_due(trainer, self.every_n_epochs)

    def _observe(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        if dataloader_idx != self.dataloader_idx or (self.max_batches is not None and batch_idx >= self.max_batches):
            return
        paths, target = self._locate(batch)
        positions, counted = self._positions.take(trainer, dataloader_idx, batch_idx, rows=len(target))
        groups = groups_of(positions, target.device)
        clean: Any = None
        perturbations = self.probes.perturbations(trainer, pl_module, batch, paths, positions)
        for condition, perturbation in chain([(Condition(CLEAN), nullcontext(batch))], perturbations):
            noisy, preds, labels = self._predictor.read(trainer, pl_module, perturbation, paths, target)
            if condition.noise == CLEAN:
                self._predictor.check(target, preds)
            if self._measurement is None:
                # a new one for each validation: a fit cannot update the inference tensors that `trainer.validate` leaves
                self._measurement = self._begun(preds)
            preds = preds[:counted]  # the last batch of a process may be all padding
            if condition.noise == CLEAN:
                clean = self._measurement.read(preds)
            self._measurement.update(condition, preds, labels[:counted], clean, groups[:counted])
            if batch_idx == 0 and paths and condition.draw == 0 and loggers.takes_figures(trainer):
                self._shown[condition] = _Shown.of(get(noisy, paths[0]), preds, named=self._of_classes)

    def _begun(self, preds: Tensor) -> Measurement:
        metrics = self.metrics
        if isinstance(metrics, MetricCollection):
            return Measurement(metrics.clone, N_GROUPS)
        n_classes = preds.shape[1] if self._of_classes else 0
        return Measurement(
            partial(monitor_metrics, metrics, n_classes, N_GROUPS),
            N_GROUPS,
            logged=LOGGED,
            chance=1 / n_classes if n_classes else None,
            weights=[tag for tag, probe in self.noises.items() if getattr(probe, "one_draw_per_batch", False)],
        )

    @property
    def _of_classes(self) -> bool:
        return isinstance(self.metrics, str) and self.metrics != "regression"

    def _locate(self, batch: Any) -> tuple[list[Path], Tensor]:
        noisy_inputs = not all(isinstance(probe, NoiseCallback) for probe in self.noises.values())
        paths, target = self._predictor.locate(batch, noisy_inputs=noisy_inputs)
        self.probes.check(batch, paths)
        return paths, target

    def _try(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        paths, target = self._locate(batch)
        trials = self.probes.trials(trainer, pl_module, batch, paths, range(len(target)))
        for perturbation in chain([nullcontext(batch)], trials):
            _, preds, _ = self._predictor.read(trainer, pl_module, perturbation, paths, target)
            self._predictor.check(target, preds)

    def _check_loader(self, trainer: Trainer) -> None:
        if self.dataloader_idx >= n_evaluation_loaders(trainer):
            raise ValueError(f"RobustnessMonitor saw no batch of dataloader_idx={self.dataloader_idx}")

    def _comparable(self, baseline: dict[str, Any]) -> dict[str, Any]:
        """The baseline, or a ValueError where it has nothing to compare with."""
        if baseline["task"] != self._task:
            raise ValueError(f"the baseline {self.baseline} is of metrics={baseline['task']!r}, not {self._task!r}")
        noises = self.probes.describe()
        own = {tag: {"noise": noises[tag], "levels": list(levels)} for tag, levels in self.levels.items()}
        # the noises that are the same in both
        self._shared = {tag: self.levels[tag] for tag, noise in own.items() if baseline["noises"].get(tag) == noise}
        if not self._shared:
            raise ValueError(f"the baseline {self.baseline} has none of the noises {own}, but {baseline['noises']}")
        return baseline

    @property
    def _task(self) -> str:
        return self.metrics if isinstance(self.metrics, str) else "own metrics"

    # --- what is reported

    def _log(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        self._check_loader(trainer)
        measurement = seen_by_all(trainer, self._measurement, "RobustnessMonitor")
        found = measurement.figures()
        if self._baseline is not None:
            found |= report.corruption_errors(found, report.values_of(self._baseline), self._shared)
        self._measured = [key.removeprefix(f"{CLEAN}/") for key in found if key.startswith(f"{CLEAN}/")]
        # the values are those of all processes already; on each of them, so that callbacks can monitor them
        pl_module.log_dict({f"{prefix}/{key}": value for key, value in found.items()}, sync_dist=True, rank_zero_only=True)
        step, entropies = logging_step(trainer), measurement.entropies()
        if loggers.takes_figures(trainer):
            for condition, (edges, counts) in entropies.items():
                loggers.log_histogram(trainer, f"{prefix}/{condition.place}/entropies", edges, counts, step)
            if "accuracy" in self._measured or "loss" in self._measured:
                loggers.log_figure(trainer, f"{prefix}/curve", self._curve(found), step)
            if not self._pictured:  # the noise is the same in each epoch
                self._show_samples(trainer, prefix)

    def _conclude(self, trainer: Trainer, prefix: str, folder: str) -> None:
        """Writes the report into a folder beside the logs, and shows what is looked at once."""
        if self._measurement is None:  # the fit has ended before it was due
            return
        calibration = self._measurement.calibration()
        self.report = self._reported(trainer, self._measurement)
        if not loggers.takes_figures(trainer):
            return
        with loggers.warn_on_failure("the report"):
            report.write(loggers.log_dir(trainer) / folder, self.report, self._baseline)
        step = logging_step(trainer)
        for tag in self.levels if calibration else ():
            panels = {_title(condition): bins for condition, bins in calibration.items() if condition.noise in (CLEAN, tag)}
            loggers.log_figure(trainer, f"{prefix}/{tag}/reliability", plots.reliability_diagram(panels), step)
        self._show_samples(trainer, prefix)

    def _reported(self, trainer: Trainer, measurement: Measurement) -> dict[str, Any]:
        estimates = measurement.estimates()
        sizes = trainer.strategy.reduce(measurement.sizes.clone(), reduce_op="sum").tolist()  # it writes to what it is given
        return report.make(
            estimates.values,
            estimates.without,
            sizes if estimates.without else [],
            n=sum(sizes),
            noises=self.probes.describe(),
            levels=self.levels,
            spread=_of_shared_draws(estimates.spread, measurement.weights),
            weights=measurement.weights,
            draws=self.n_draws,
            task=self._task,
            seed=self.seed,
        )

    def _curve(self, found: Mapping[str, float]) -> Figure:
        metric = "accuracy" if "accuracy" in self._measured else "loss"
        curves = {
            tag: {0.0: found[f"{CLEAN}/{metric}"]} | {level: found[f"{tag}/{level:g}/{metric}"] for level in levels}
            for tag, levels in self.levels.items()
        }
        return plots.robustness_curve(curves, ylabel=metric)

    def _show_samples(self, trainer: Trainer, prefix: str) -> None:
        for tag in self.levels:
            columns = {_title(condition): shown for condition, shown in self._shown.items() if condition.noise in (CLEAN, tag)}
            inputs = {title: shown.inputs for title, shown in columns.items()}
            captions = {title: shown.captions for title, shown in columns.items()}
            if columns and (figure := plots.samples(inputs, captions=captions)) is not None:
                loggers.log_figure(trainer, f"{prefix}/{tag}/samples", figure, logging_step(trainer))
        self._pictured = True


class _Shown(NamedTuple):
    """The first samples of the first batch as the module saw them, and what it took them for."""

    inputs: Tensor
    captions: list[str]

    @classmethod
    def of(cls, inputs: Tensor, preds: Tensor, *, named: bool) -> _Shown:
        classes = preds[:4].argmax(1).tolist() if named and preds.ndim == 2 else []
        return cls(inputs[:4].detach().cpu(), [str(label) for label in classes])


def _of_shared_draws(spread: Mapping[str, float], weights: Collection[str]) -> dict[str, float]:
    """The errors over draws of what the scatter of the samples does not show, because they share the draws."""
    return {key: error for key, error in spread.items() if weights and key.partition("/")[0] in {*weights, key}}


def _title(condition: Condition) -> str:
    return condition.place.replace("/", " ")
