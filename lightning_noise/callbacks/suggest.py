"""The range test that suggests a noise level for a trained model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_noise._checks import check_counts
from lightning_noise.batch import Selector
from lightning_noise.callbacks.base import Callback, NoiseCallback, check_parameters_are_whole
from lightning_noise.callbacks.inputs import as_probes, name_noises
from lightning_noise.evaluation.conditions import CLEAN, Conditions
from lightning_noise.evaluation.engine import Pass, Reading
from lightning_noise.evaluation.positions import are_copies, sum_over_ranks
from lightning_noise.evaluation.predictor import Predictor
from lightning_noise.evaluation.range_test import Criterion, RangeTest, default_levels
from lightning_noise.loop.internals import data_source, original_module, trainer_of
from lightning_noise.loop.perturbation import Context
from lightning_noise.loop.snapshot import restore_after
from lightning_noise.loop.terminal import follow_passes
from lightning_noise.masks import Mask
from lightning_noise.metrics.guess import ConstantGuess
from lightning_noise.noise import Noise, NoiseFunction, as_noise
from lightning_noise.perturb.inputs import Clip
from lightning_noise.perturb.normalization import Numbers
from lightning_noise.tasks import Multiclass, Task

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, LightningModule, Trainer

__all__ = ["suggest_level"]

_KEY = "suggest_level/"
# the step, the hooks around it, which may rely on outputs of the step, and the callbacks that the module would add
_SILENCED = (
    "validation_step",
    "configure_callbacks",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
)


def suggest_level(
    trainer: Trainer,
    module: LightningModule,
    noise: Noise | NoiseCallback | NoiseFunction,
    *,
    dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    levels: Sequence[float] | None = None,
    retention: float | None = None,
    flip_rate: float | None = None,
    task: Task = Multiclass(),
    inputs: Selector | None = None,
    target: int | str | None = None,
    predict: Callable[[Any, Any], Any] | None = None,
    clip: Clip | None = None,
    relative: Literal["std"] | None = None,
    mask: Mask | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    max_batches: int | None = None,
    dataloader_idx: int = 0,
    seed: int = 0,
) -> RangeTest:
    r"""Suggests a level of a noise for a trained classifier, from one pass over held-out data.

    With labels, the suggested level :math:`\ell` is the one at which the model retains nine tenths of its skill above chance,

    .. math:: \frac{A(\ell) - A_\text{chance}}{A(0) - A_\text{chance}} = 0.9.

    Chance is the accuracy of the best constant guess, the share of the most frequent class among the targets that count.
    With ``flip_rate``, the suggested level is the one at which that share of the predictions differ from those without noise,
    which needs no labels. Between two levels, the curve is a straight line over :math:`\log \ell`. If it reaches the
    value several times, the lowest level counts. If it does not reach the value, a warning says which levels to try, and the
    suggestion is NaN, which no callback accepts as a level.

    Each batch is predicted once without noise and once at each level, without gradients and with the precision of the trainer.
    Thirteen levels thus cost fourteen forward passes over the data. All levels share the draw of a sample, which is that of a
    :class:`~lightning_noise.RobustnessMonitor` with this ``seed``. So the result is the same for any batch size and number of
    ranks. Weight noise is one draw for all samples.

    The pass is a ``trainer.validate`` without loggers, the module's ``validation_step`` and its validation hooks. The progress
    bar is the only callback. Afterwards, the module, the trainer and the global random streams are as before: a
    ``trainer.fit`` that follows is bitwise the same. Only a generator of the data loader's own has advanced.

    Args:
        trainer: A trainer that is not running.
        module: A trained module.
        noise: A noise, or a noise callback, whose own level is ignored.
        dataloaders: The held-out data. With ``flip_rate``, the batches need no labels.
        datamodule: A data module with a ``val_dataloader``. Default, if ``dataloaders`` is not given either: the validation
            data of the trainer's last run, or the module's own.
        levels: The levels to try, above 0. Default: four per factor of ten, from 0.01 to 10 or the largest meaningful level.
        retention: The share of the skill to retain, in (0, 1). Default: 0.9.
        flip_rate: The share of the predictions that may change, in (0, 1), instead of ``retention``; 0.1 is usual.
        task: What the outputs of the module mean: ``tasks.Multiclass()``, ``tasks.Binary()`` or ``tasks.Multilabel()``.
        inputs: Which leaf of the batch is the input. This and the other arguments are those of
            :class:`~lightning_noise.RobustnessMonitor`.
        target: Which leaf of the batch is the target.
        predict: A callable from module and batch to logits.
        clip: Bounds of the noisy input.
        relative: With ``"std"``, levels are in units of the standard deviation of each sample.
        mask: Which positions of the input are valid.
        mean: The mean with which the input was normalized.
        std: The standard deviation with which the input was normalized.
        max_batches: How many batches each rank evaluates. Default: the trainer's ``limit_val_batches``.
        dataloader_idx: Which of several loaders to evaluate.
        seed: The seed of the draws.

    Returns:
        The ``level`` and the curve, as a :class:`~lightning_noise.evaluation.range_test.RangeTest`, which ``print`` shows as a
        table.

    Raises:
        TypeError: If ``noise`` is not a noise, or the input does not suit it.
        ValueError: If an argument is wrong, the trainer is running, there are no held-out data, the model is no better than
            chance, or the strategy flattens or partitions the parameters, as FSDPStrategy and DeepSpeedStrategy do.

    References:
        Cyclical Learning Rates for Training Neural Networks (Smith, 2017), section 3.3, for the range test of learning rates,
        https://arxiv.org/abs/1506.01186

    Example:
        >>> import pytorch_lightning as pl
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_noise import noise
        >>> class Signs(pl.LightningModule):
        ...     def forward(self, x):  # a positive number is of class 1
        ...         return torch.cat([-x, x], 1)
        >>> x = torch.tensor([1.0, -1.0]).repeat(2000)[:, None]
        >>> data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=500)
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        >>> found = suggest_level(trainer, Signs(), noise.Gaussian(), dataloaders=data, levels=[0.4, 0.5, 0.6, 0.7, 0.8])
        >>> round(found.level, 1)  # where 2 Phi(1 / level) - 1 = 0.9
        0.6
    """
    usage = "suggest_level(trainer, module, {}, dataloaders=val_loader)"
    if isinstance(trainer, nn.Module) or not isinstance(module, nn.Module):
        raise TypeError(
            f"expected a trainer and then a module, got {type(trainer).__name__} and {type(module).__name__}; type "
            f"{usage.format('noise.Gaussian()')}"
        )
    if not (callable(noise) or isinstance(noise, NoiseCallback)):
        raise TypeError(f"noise must be one noise or noise callback, got {noise!r}; type {usage.format('noise.Gaussian()')}")
    noise = noise if isinstance(noise, NoiseCallback) else as_noise(noise, usage)
    if not (isinstance(task, Task) and task.has_classes):
        raise ValueError(
            "suggest_level compares predicted classes: give task=tasks.Multiclass(), tasks.Binary() or tasks.Multilabel(), got "
            f"{task!r}"
        )
    check_counts(max_batches=max_batches)
    if retention is not None and flip_rate is not None:
        raise ValueError("give retention=…, which needs labels, or flip_rate=…, which needs no labels, and not both")
    if flip_rate is not None:
        criterion = Criterion("flip_rate", flip_rate)
    else:
        criterion = Criterion("retention", 0.9 if retention is None else retention)
    options = {"relative": relative, "clip": clip, "mask": mask, "mean": mean, "std": std}
    ((name, probe),) = as_probes(name_noises(noise), inputs=inputs, **options).items()
    conditions = Conditions({name: probe}, default_levels(probe.max_level) if levels is None else levels, seed=seed)
    tried = conditions.levels[name]
    if len(tried) < 2 or min(tried) == 0:
        raise ValueError(f"levels must be at least two, all above 0, got {tried}")
    module = original_module(module)
    _check_idle(trainer, module)
    check_parameters_are_whole(trainer, "suggest_level")
    dataloaders, datamodule = _find_data(trainer, module, dataloaders, datamodule)
    against_target = criterion.measured == "retention"
    # labels that do not count matter for both criteria
    has_labels = against_target or target is not None or getattr(task, "ignore_index", None) is not None
    predictor = Predictor(task, inputs, target, predict, labelled=has_labels)
    bars = [] if trainer.progress_bar_callback is None else [trainer.progress_bar_callback]
    with _silenced(trainer, module, datamodule, max_batches):
        trainer.callbacks = [*bars, _Count(conditions, predictor, dataloader_idx, against_target)]  # type: ignore[attr-defined]
        # the metrics carry the counts, also back from processes that were spawned
        metrics = trainer.validate(module, dataloaders, datamodule=datamodule, verbose=False)
    values = metrics[0] if metrics else {}
    *wrong, n = (round(values.get(f"{_KEY}{i}", 0)) for i in range(len(tried) + 2))
    if not n:
        raise ValueError(
            f"no batch of dataloader_idx={dataloader_idx} was seen: the data are empty, no target counts, or "
            "limit_val_batches is 0"
        )
    chance = round(n * values.get(f"{_KEY}chance", 0)) / n  # the log rounds it
    found = replace(criterion.evaluate(tried, wrong, n, chance), unit=probe.unit)
    if math.isnan(found.level) and trainer.is_global_zero:
        warnings.warn(found.explain(), stacklevel=2)
    return found


class _Count(Callback):
    """Counts wrong predictions in a validation, without noise and at each level.

    A prediction is wrong if it differs from the target or, unless ``against_target``, from the prediction without noise. The
    last count is the number of predictions.
    """

    def __init__(self, conditions: Conditions, predictor: Predictor, dataloader_idx: int, against_target: bool):
        self.conditions = conditions
        self.against_target = against_target
        self.held_out = Pass(predictor, dataloader_idx=dataloader_idx)
        self.counts = torch.zeros(len(list(conditions)) + 2, dtype=torch.long)
        self.task = predictor.task
        self.guess: ConstantGuess | None = None
        self.shape = torch.zeros(2, dtype=torch.long)  # of the outputs of a sample

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        context = Context(trainer, pl_module, is_probe=True)
        readings = self.held_out.read(context, batch, batch_idx, dataloader_idx, self.conditions.perturb)
        readings = follow_passes(trainer, readings, begin=batch_idx, step=1 / (1 + len(list(self.conditions))))
        counts = list(self._count(readings))
        if counts:
            self.counts = self.counts.to(counts[0].device) + torch.stack(counts)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = self.counts.to(pl_module.device)
        if not are_copies(trainer, [counts, self.held_out.samples], self.held_out.dataloader_idx):
            (counts,) = sum_over_ranks(trainer, [counts])
        values = {f"{_KEY}{i}": float(count) for i, count in enumerate(counts)}
        if self.against_target:
            # a rank that saw no batch counts as many classes as the others
            shape: Any = trainer.strategy.reduce(self.shape.to(pl_module.device), reduce_op="max")
            guess = self.guess or self.task.guess(torch.empty(0, *shape.tolist()))
            values[f"{_KEY}chance"] = guess.to(pl_module.device).totals()["chance"]  # type: ignore[union-attr]
        # the values are those of all ranks; the log rounds them to seven digits
        pl_module.log_dict(values, sync_dist=True, rank_zero_only=True)

    def _count(self, readings: Iterable[Reading]) -> Iterator[Tensor]:
        reference = preds = None
        for condition, _, outputs, preds, target, *_, classes in readings:
            label = preds.argmax(1)
            if condition == CLEAN:
                reference = target if self.against_target else label
                if self.against_target and classes is not None:
                    self.guess = self.guess or self.task.guess(outputs)
                    self.shape = torch.tensor([*outputs.shape[1:3], 1][:2])
                    self.guess.to(target.device).update(classes)  # type: ignore[union-attr]
            yield ((label != reference) | preds.isnan().any(1)).sum()  # argmax takes NaN for the largest
        if reference is not None and preds is not None:
            yield torch.tensor(reference.numel(), device=preds.device)


@contextmanager
def _silenced(trainer: Trainer, module: Any, datamodule: Any, max_batches: int | None) -> Iterator[None]:
    """Removes loggers from the trainer and the step and hooks from the module, and restores everything."""
    with restore_after(trainer, module, datamodule):
        trainer.loggers = []
        if max_batches is not None:
            trainer.limit_val_batches = max_batches
        for name in _SILENCED:
            setattr(module, name, _do_nothing)
        yield


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces a hook. A lambda could not be pickled for a process that is spawned."""


def _check_idle(trainer: Trainer, module: Any) -> None:
    """Raises a ValueError if a run is in progress, or the trainer has no metrics."""
    if trainer.barebones:
        raise ValueError("suggest_level needs the metrics of the trainer, which barebones=True disables; give barebones=False")
    if any(running is not None and running.state.stage is not None for running in (trainer, trainer_of(module))):
        raise ValueError(
            "suggest_level is a run of its own and cannot be called within another; call it before or after trainer.fit, "
            "and use a RobustnessMonitor within a fit"
        )


def _find_data(trainer: Trainer, module: Any, dataloaders: Any, datamodule: Any) -> tuple[Any, Any]:
    """Returns the given loaders and data module, or those of the last run. Both are ``None`` if the module has the loaders."""
    if dataloaders is not None and datamodule is not None:
        raise ValueError("give dataloaders=… or datamodule=…, not both")
    source = dataloaders if datamodule is None else datamodule
    if source is None:
        source = data_source(trainer)  # also after a fit
    if source is None or isinstance(source, nn.Module):
        source = module
    if not hasattr(source, "val_dataloader"):
        return source, None
    if getattr(source.val_dataloader, "__qualname__", "") == "DataHooks.val_dataloader":
        raise ValueError(
            "there are no held-out data: give dataloaders=… or datamodule=…, or define val_dataloader in "
            f"{type(source).__name__}"
        )
    return None, None if source is module else source
