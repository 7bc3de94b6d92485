"""The model watched through noise on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_noise import figures
from lightning_noise.batch import Path, Selector, find_inputs, find_target, get
from lightning_noise.callbacks.base import Callback, NoiseCallback, logging_step
from lightning_noise.callbacks.held_out import CLEAN, Places, Probe, Probes
from lightning_noise.metrics.functional import robustness_summary
from lightning_noise.metrics.monitored import MonitorMetrics, as_classes, check_classes, monitor_metrics
from lightning_noise.noise import Noise
from lightning_noise.perturb import Clip, NoiseFunction

try:
    from pytorch_lightning.utilities.seed import isolate_rng
except ImportError:  # the other Lightning alone is installed
    from lightning.pytorch.utilities.seed import isolate_rng  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["RobustnessMonitor"]


class RobustnessMonitor(Callback):
    r"""Measures a classifier on held-out data under noise, beside the same data without.

    After each validation or test batch the module predicts the batch again, clean and under each noise and level, without
    gradients and with the precision of the trainer. This costs a forward pass of the batch and a draw for each of its samples,
    so two noises of five levels cost eleven times the forward passes of the validation; ``max_batches`` and ``every_n_epochs``
    bound it. Weights, the user's metrics and the global random streams are as without the monitor, unless the forward pass
    itself changes the module in evaluation, which is not undone.

    The noise of a sample is one draw that depends on its place in the order of the loader, so with a loader that does not
    shuffle and gives a row for each sample it is the same in each epoch and for any batch size and number of processes, and
    the levels of a noise share one draw: what changes in a curve is the model. Rows that a distributed sampler repeats to fill
    up the last batch are not counted.

    ============================================  ===================================================================
    key                                           what
    ============================================  ===================================================================
    ``robustness/clean/<metric>``                 ``accuracy``, ``loss`` (cross-entropy) and ``ece`` without noise
    ``robustness/<noise>/<level>/<metric>``       the same under noise
    ``robustness/<noise>/<metric>_drop``          clean minus noisy, averaged over the levels
    ``robustness/<noise>/accuracy_retention``     share of the skill above chance that is left, averaged over the levels
    ``robustness/<noise>/accuracy_area``          the mean of the accuracy over the level, from level 0, which is clean
    ``robustness/<metric>_mean``                  averaged over noises and levels
    ``robustness/score``                          half the clean and half the mean noisy accuracy
    ============================================  ===================================================================

    In ``trainer.test`` the keys begin with ``test/``. ModelCheckpoint and EarlyStopping can monitor them. With
    ``every_n_epochs`` a key keeps its old value in between, so give ModelCheckpoint the same interval, and EarlyStopping
    ``strict=False``, because there is no value before the first. TensorBoard also gets the curve of the
    accuracy over the level, and clean beside noisy samples where the input is an image or a signal.

    Args:
        noises: A noise, a list of noises, whose tags are their class names in lower case, or a mapping from tag to noise. A
            noise callback may stand for a noise.
        levels: The levels of all noises, or a mapping from tag to levels; left out, the ``severities`` of each noise.
        inputs: Which leaf of the batch is the input, as in :class:`~lightning_noise.InputNoise`.
        targets: Which leaf holds the class indices; left out, the second element of a sequence.
        predict: A callable from module and batch to logits of shape :math:`(B, K, *)`; left out, ``module(input)``.
        clip: Bounds of the noisy input, as in :class:`~lightning_noise.InputNoise`.
        relative: Levels are in units of the standard deviation of each sample.
        every_n_epochs: How often to measure during a fit.
        max_batches: How many batches to measure; left out, all.
        dataloader_idx: Which of several loaders.
        seed: The seed of the draws. It is not that of the run, so that runs are compared on the same noise.
        name: The first part of the keys, of which a trainer can have one.

    Raises:
        ValueError: A level, tag or path is wrong, the run has no validation, or the module does not return logits.

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
        targets: int | str | None = None,
        predict: Callable[[Any, Any], Any] | None = None,
        clip: Clip | None = None,
        relative: bool = False,
        every_n_epochs: int = 1,
        max_batches: int | None = None,
        dataloader_idx: int = 0,
        seed: int = 0,
        name: str = "robustness",
    ):
        if every_n_epochs < 1 or (max_batches is not None and max_batches < 1):
            raise ValueError(f"every_n_epochs and max_batches must be at least 1, got {every_n_epochs} and {max_batches}")
        self.probes = Probes(noises, levels, clip=clip, relative=relative, seed=seed)
        self.noises = self.probes.noises
        self.levels = self.probes.levels
        self.clip = self.probes.clip
        self.relative = relative
        self.seed = seed
        self.inputs = inputs
        self.targets = targets
        self.predict = predict
        self.every_n_epochs = every_n_epochs
        self.max_batches = max_batches
        self.dataloader_idx = dataloader_idx
        self.name = name
        self._pictured = False
        self._reset()

    # --- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, RobustnessMonitor)]  # type: ignore[attr-defined]
        if sum(monitor.name == self.name for monitor in monitors) > 1:
            raise ValueError(f"two monitors are named {self.name!r}, and their keys would mix; give one of them another name=…")
        self._pictured = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            raise ValueError(
                "RobustnessMonitor needs a validation: a val_dataloader, a validation_step and limit_val_batches above 0"
            )
        if 0 < (trainer.max_epochs or 0) < self.every_n_epochs and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(f"every_n_epochs={self.every_n_epochs} never comes in a run of {trainer.max_epochs} epochs")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking and dataloader_idx == self.dataloader_idx:
            self._try(trainer, pl_module, batch)  # what does not fit is said before the training
        if self._is_due(trainer):
            self._observe(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            self._report(trainer, pl_module, self.name)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._observe(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, f"test/{self.name}")

    # --- measuring

    def _reset(self) -> None:
        self._metrics: dict[tuple[str, float], MonitorMetrics] = {}
        self._clean = torch.empty(0)
        self._n_classes = 0
        self._places = Places()
        self._shown: dict[str, dict[str, Tensor]] = {}

    def _is_due(self, trainer: Trainer) -> bool:
        skipped = trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_epochs != 0
        return not trainer.sanity_checking and not skipped

    def _observe(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        if dataloader_idx != self.dataloader_idx or (self.max_batches is not None and batch_idx >= self.max_batches):
            return
        paths, target = self._located(batch)
        positions, counted = self._places.take(trainer, dataloader_idx, batch_idx, rows=len(get(batch, paths[0])))
        clean = (CLEAN, 0.0), nullcontext(batch)
        for (tag, level), perturbation in [clean, *self.probes.perturbations(trainer, pl_module, batch, paths, positions)]:
            noisy, logits = self._predicted(trainer, pl_module, perturbation, paths, target)
            if tag == CLEAN:
                self._clean, self._n_classes = logits, logits.shape[1]
                check_classes(target, self._n_classes)
            if (tag, level) not in self._metrics:
                # new ones for each validation: a fit cannot update the inference tensors that `trainer.validate` leaves
                self._metrics[tag, level] = monitor_metrics("multiclass", self._n_classes).to(logits.device)
            if counted:  # the last batch of a process may be all padding
                clean_preds = self._clean[:counted]
                self._metrics[tag, level].update(preds=logits[:counted], target=target[:counted], clean_preds=clean_preds)
            if batch_idx == 0 and not self._pictured and _boards(trainer):
                self._show(tag, level, get(noisy, paths[0]))

    def _located(self, batch: Any) -> tuple[list[Path], Tensor]:
        """The paths of the inputs, and the target."""
        paths = find_inputs(batch, self.inputs)
        self.probes.check(batch, paths)
        return paths, get(batch, find_target(batch, self.targets))

    def _try(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        paths, target = self._located(batch)
        positions = range(len(get(batch, paths[0])))
        for perturbation in self.probes.trials(trainer, pl_module, batch, paths, positions):
            self._predicted(trainer, pl_module, perturbation, paths, target)

    def _predicted(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        perturbation: AbstractContextManager[Any],
        paths: list[Path],
        target: Tensor,
    ) -> tuple[Any, Tensor]:
        """The batch within the perturbation, and the logits that the module makes of it there."""
        with perturbation as noisy, isolate_rng(), trainer.precision_plugin.forward_context():
            return noisy, as_classes(self._predict(pl_module, noisy, paths), target, "multiclass")[0]

    def _predict(self, pl_module: LightningModule, batch: Any, paths: list[Path]) -> Any:
        if self.predict is not None:
            return self.predict(pl_module, batch)
        if getattr(pl_module.forward, "__qualname__", "") == "LightningModule.forward":
            raise ValueError("the module has no forward; give predict=… to return its logits")
        return pl_module(*(get(batch, path) for path in paths))

    # --- what is reported

    def _report(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        if not self._metrics:
            raise ValueError(f"RobustnessMonitor saw no batch of dataloader_idx={self.dataloader_idx}")
        computed = {probe: metrics.estimates()[0] for probe, metrics in self._metrics.items()}
        values = {probe: {key: metrics[key] for key in ("accuracy", "loss", "ece")} for probe, metrics in computed.items()}
        clean = values.pop((CLEAN, 0.0))
        summary = {f"{CLEAN}/{key}": value for key, value in clean.items()}
        summary |= {f"{tag}/{level:g}/{key}": value for (tag, level), noisy in values.items() for key, value in noisy.items()}
        summary |= robustness_summary(clean, values, chance=1 / self._n_classes)
        # the values are those of all processes already; on each of them, so that callbacks can monitor them
        pl_module.log_dict({f"{prefix}/{key}": value for key, value in summary.items()}, sync_dist=True, rank_zero_only=True)
        if boards := _boards(trainer):
            self._draw(boards, prefix, clean["accuracy"], values, logging_step(trainer))
        self._reset()

    def _show(self, tag: str, level: float, x: Tensor) -> None:
        title = tag if tag == CLEAN else f"{tag} {level:g}"
        self._shown.setdefault(tag, {})[title] = x.detach()[:4].cpu()

    def _draw(
        self,
        boards: list[Any],
        prefix: str,
        clean: float,
        values: Mapping[tuple[str, float], Mapping[str, float]],
        step: int,
    ) -> None:
        curves = {
            tag: {0.0: clean} | {level: values[tag, level]["accuracy"] for level in levels}
            for tag, levels in self.levels.items()
        }
        drawn = {"curve": figures.robustness_curve(curves)}
        untouched = self._shown.pop(CLEAN, {})
        drawn |= {f"{tag}/samples": figures.samples(untouched | noisy) for tag, noisy in self._shown.items()}
        self._pictured = True  # the samples are the same in each epoch
        for board in boards:
            for key, figure in drawn.items():
                if figure is not None:
                    board.add_figure(f"{prefix}/{key}", figure, global_step=step)


def _boards(trainer: Trainer) -> list[Any]:
    """What draws figures, on the process that logs."""
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers] if trainer.is_global_zero else []
    return [experiment for experiment in experiments if hasattr(experiment, "add_figure")]
