"""How much noise a model bears: the range test of levels, as there is one of learning rates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_noise import plots
from lightning_noise._checks import check_counts
from lightning_noise.batch import Path, Selector
from lightning_noise.callbacks.base import Callback, NoiseCallback, check_parameters_are_whole
from lightning_noise.evaluation.old_conditions import CLEAN, Condition, Probe, Probes
from lightning_noise.evaluation.old_predictor import Predictor
from lightning_noise.evaluation.positions import SamplePositions
from lightning_noise.loop.internals import data_source, original_module, trainer_of
from lightning_noise.loop.snapshot import restore_after
from lightning_noise.metrics.functional import retention as retention_of
from lightning_noise.noise import Noise, NoiseFunction
from lightning_noise.perturb.inputs import Clip

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, LightningModule, Trainer

__all__ = ["RangeTest", "suggest_level"]

Classes = Literal["multiclass", "binary", "multilabel"]

_LOWEST, _HIGHEST, _IN_A_DECADE = 0.01, 10.0, 4
_RETENTION = 0.9
_KEY = "suggest_level/"
# the step, the hooks around it, which may count on outputs of the step, and the callbacks that the module would bring along
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


@dataclass(frozen=True)
class RangeTest:
    """What :func:`suggest_level` found.

    Attributes:
        level: The suggested level; NaN where the curve does not come to what was wanted.
        curve: At each level the retention or the flip rate.
        wanted: The retention or the flip rate at the suggested level.
        measured: Which of the two it is.
        accuracies: The accuracy at each level, where 0 is without noise; empty without labels.
        n: The number of predictions that were compared at each level.

    Example:
        >>> found = RangeTest(0.1, {0.01: 1.0, 0.1: 0.9, 1.0: 0.2}, 0.9, "retention", {}, 1000)
        >>> found.figure().axes[0].get_ylabel()
        'retention'
    """

    level: float
    curve: dict[float, float]
    wanted: float
    measured: Literal["retention", "flip_rate"]
    accuracies: dict[float, float]
    n: int

    def figure(self) -> Figure:
        """Returns the curve over the level, with the suggested one marked; see :func:`~lightning_noise.plots.range_test`."""
        return plots.range_test(self.curve, self.level, self.wanted, ylabel=self.measured.replace("_", " "))


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
    inputs: Selector | None = None,
    target: int | str | None = None,
    predict: Callable[[Any, Any], Any] | None = None,
    metrics: Classes = "multiclass",
    clip: Clip | None = None,
    relative: Literal["std"] | None = None,
    max_batches: int | None = None,
    dataloader_idx: int = 0,
    seed: int = 0,
) -> RangeTest:
    r"""Finds the level of a noise that a trained model bears, in one pass over held-out data.

    With labels it is the level :math:`\ell` at which the model keeps nine tenths of its skill above chance,

    .. math:: \frac{A(\ell) - A_\text{chance}}{A(0) - A_\text{chance}} = 0.9,

    and with ``flip_rate`` the one at which that share of the predictions are not those without noise, which needs no labels.
    Between two levels the curve is taken as straight over :math:`\log \ell`, and where it comes to that value several times,
    the lowest level counts. Where it does not come to it within the levels, there is a warning that says which ones to try, and
    the suggestion is NaN, which no callback takes for a level.

    Each batch is predicted once without noise and once at each level, without gradients and with the precision of the trainer:
    with thirteen levels it costs fourteen forward passes over the data, and a draw for each sample and level. The levels share
    the draw of a sample, which is that of a :class:`~lightning_noise.RobustnessMonitor` with this ``seed``, so the result is
    the same for any batch size and number of processes. Noise in weights is one draw for all samples.

    The pass is a ``trainer.validate`` without callbacks, loggers and the module's own ``validation_step`` and validation hooks.
    Afterwards module, trainer and global random streams are as before it: a ``trainer.fit`` that follows is bit for bit what it
    would have been. A loader that draws from a generator of its own goes on with it.

    Args:
        trainer: A trainer that is not running.
        module: A module that has learnt something.
        noise: A noise, or a noise callback, whose own level does not matter.
        dataloaders: The held-out data; with ``flip_rate`` the batches need no labels.
        datamodule: A data module that has them as its ``val_dataloader``. If neither is given, the validation data of the
            trainer's last run, or the module's own.
        levels: The levels to try, above 0; left out, four for each factor of ten from 0.01 to 10, or to the largest level that
            has a meaning.
        retention: The share of the skill to keep, in (0, 1); left out, 0.9.
        flip_rate: The share of the predictions that may change, in (0, 1), instead; 0.1 is usual. Labels are not read.
        inputs: Which leaf of the batch is the input, as in :class:`~lightning_noise.InputNoise`.
        target: Which leaf holds the target; left out, the second element of a sequence.
        predict: A callable from module and batch to logits; left out, ``module(input)``.
        metrics: How predictions and target are read: ``"multiclass"``, ``"binary"`` or ``"multilabel"``, as by the monitor.
        clip: Bounds of the noisy input, as in :class:`~lightning_noise.InputNoise`.
        relative: Levels are in units of the standard deviation of each sample.
        max_batches: How many batches of each process to use; left out, as the trainer's ``limit_val_batches`` says.
        dataloader_idx: Which of several loaders.
        seed: The seed of the draws.

    Raises:
        TypeError: The noise is none, or the input cannot take it.
        ValueError: An argument is wrong, the trainer is running, there are no held-out data, the model is no better than
            chance, or the strategy has no whole parameters, as FSDPStrategy and DeepSpeedStrategy.

    References:
        Cyclical Learning Rates for Training Neural Networks (Smith, 2017), section 3.3, for the range test of learning rates,
        https://arxiv.org/abs/1506.01186

    Example:
        >>> import pytorch_lightning as pl
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_noise import noise
        >>> class Signs(pl.LightningModule):
        ...     def forward(self, x):  # a number is of class 1 where it is positive
        ...         return torch.cat([-x, x], 1)
        >>> x = torch.tensor([1.0, -1.0]).repeat(2000)[:, None]
        >>> data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=500)
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> found = suggest_level(trainer, Signs(), noise.Gaussian(), dataloaders=data, levels=[0.4, 0.5, 0.6, 0.7, 0.8])
        >>> round(found.level, 1)  # where 2 Phi(1 / level) - 1 = 0.9
        0.6
    """
    if not (callable(noise) or isinstance(noise, NoiseCallback)):
        raise TypeError(f"noise must be one noise or noise callback, got {noise!r}")
    check_counts(max_batches=max_batches)
    measured, wanted = _criterion(retention, flip_rate)
    if metrics not in get_args(Classes):
        raise ValueError(f"metrics must be one of {list(get_args(Classes))}, whose predictions are classes, got {metrics!r}")
    probes = Probes(noise, _grid(noise) if levels is None else levels, clip=clip, relative=relative, seed=seed)
    tried = _checked_levels(probes)
    module = original_module(module)
    _check_idle(trainer, module)
    check_parameters_are_whole(trainer, "suggest_level")
    dataloaders, datamodule = _source(trainer, module, dataloaders, datamodule)
    predictor = Predictor(inputs, target, predict, metrics, labelled=measured == "retention")
    with _silenced(trainer, module, datamodule, max_batches):
        count = _Count(probes, predictor, dataloader_idx)
        trainer.callbacks = [count]  # type: ignore[attr-defined]
        # what a process that was started for it has counted comes back in the metrics
        found = trainer.validate(module, dataloaders, datamodule=datamodule, verbose=False)
    counts = [round(found[0].get(f"{_KEY}{i}", 0)) for i in range(len(tried) + 3)] if found else [0]
    if not counts[-1]:
        raise ValueError(f"no batch of dataloader_idx={dataloader_idx} was seen: the data are empty, or limit_val_batches is 0")
    return _concluded(trainer, tried, counts, measured, wanted)


class _Count(Callback):
    """Counts in a validation, without noise and at each level, the predictions that are not the target or not the clean ones.

    The last two counts are those of all predictions, and of all times the number of classes.
    """

    def __init__(self, probes: Probes, predictor: Predictor, dataloader_idx: int):
        self.probes = probes
        self.predictor = predictor
        self.dataloader_idx = dataloader_idx
        self.sample_positions = SamplePositions()
        (levels,) = probes.levels.values()
        self.counts = torch.zeros(len(levels) + 3, dtype=torch.long)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == self.dataloader_idx:
            paths, target = self._locate(batch)
            positions, counted = self.sample_positions.take(trainer, dataloader_idx, batch_idx, rows=len(target))
            found = list(self._counted(trainer, pl_module, batch, paths, target, positions, counted))
            self.counts = self.counts.to(target.device) + torch.stack(found)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = trainer.strategy.reduce(self.counts.to(pl_module.device), reduce_op="sum")
        # on each process, as those of all; beyond 2^24 they are rounded, to seven digits
        values = {f"{_KEY}{i}": float(count) for i, count in enumerate(counts)}  # type: ignore[arg-type]
        pl_module.log_dict(values, sync_dist=True, rank_zero_only=True)

    def _locate(self, batch: Any) -> tuple[list[Path], Tensor]:
        noisy_inputs = not all(isinstance(probe, NoiseCallback) for probe in self.probes.noises.values())
        paths, target = self.predictor.locate(batch, noisy_inputs=noisy_inputs)
        self.probes.check(batch, paths)
        return paths, target

    def _counted(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        paths: list[Path],
        target: Tensor,
        positions: range,
        counted: int,
    ) -> Iterator[Tensor]:
        reference = preds = target
        perturbations = self.probes.perturbations(trainer, pl_module, batch, paths, positions)
        for condition, perturbation in chain([(Condition(CLEAN), nullcontext(batch))], perturbations):
            _, preds, labels = self.predictor.read(trainer, pl_module, perturbation, paths, target)
            if condition.noise == CLEAN:
                self.predictor.check(labels, preds)
                reference = labels if self.predictor.labelled else preds.argmax(1)
            wrong = (preds.argmax(1) != reference) | preds.isnan().any(1)  # of NaN the largest is the first
            yield wrong[:counted].sum()
        n = torch.tensor(reference[:counted].numel(), device=preds.device)
        yield from (n * preds.shape[1], n)


@contextmanager
def _silenced(trainer: Trainer, module: Any, datamodule: Any, max_batches: int | None) -> Iterator[None]:
    """Takes callbacks and loggers out of the trainer and steps and hooks out of the module, and puts everything back."""
    with restore_after(trainer, module, datamodule):
        trainer.loggers = []
        if max_batches is not None:
            trainer.limit_val_batches = max_batches
        for name in _SILENCED:
            setattr(module, name, _nothing)
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Does nothing; not a lambda, so that it can be handed to another process."""


def _criterion(retention: float | None, flip_rate: float | None) -> tuple[Literal["retention", "flip_rate"], float]:
    if retention is not None and flip_rate is not None:
        raise ValueError("give retention=…, which needs labels, or flip_rate=…, which needs none, and not both")
    measured, wanted = ("retention", retention) if flip_rate is None else ("flip_rate", flip_rate)
    wanted = _RETENTION if wanted is None else wanted
    if not 0 < wanted < 1:
        raise ValueError(f"{measured} must be in (0, 1), got {wanted}")
    return measured, wanted


def _grid(noise: Probe) -> list[float]:
    """Levels in equal ratios."""
    highest = getattr(noise, "max_level", math.inf)
    highest = _HIGHEST if highest == math.inf else highest
    n = round(_IN_A_DECADE * math.log10(highest / _LOWEST))
    return [float(f"{_LOWEST * (highest / _LOWEST) ** (i / n):.3g}") for i in range(n + 1)]


def _checked_levels(probes: Probes) -> tuple[float, ...]:
    (levels,) = probes.levels.values()
    if len(levels) < 2 or min(levels) == 0:
        raise ValueError(f"levels must be at least two, all above 0, got {levels}")
    return levels


def _check_idle(trainer: Trainer, module: Any) -> None:
    """Raises a ValueError where the trainer has no metrics, or a run is on, of which this one would be a part."""
    if trainer.barebones:
        raise ValueError("suggest_level hands its counts over in the metrics of the trainer, of which barebones=True has none")
    if any(running is not None and running.state.stage is not None for running in (trainer, trainer_of(module))):
        raise ValueError(
            "suggest_level is a run of its own and cannot be called within another; call it before or after trainer.fit, "
            "and look at a RobustnessMonitor within"
        )


def _source(trainer: Trainer, module: Any, dataloaders: Any, datamodule: Any) -> tuple[Any, Any]:
    """The loaders or the data module: what was given, or else what the last run had, or else none, for the module's own."""
    if dataloaders is not None and datamodule is not None:
        raise ValueError("give dataloaders=… or datamodule=…, not both")
    source = dataloaders if datamodule is None else datamodule
    if source is None:
        source = data_source(trainer)  # also of a fit
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


def _concluded(
    trainer: Trainer,
    levels: Sequence[float],
    counts: Sequence[int],
    measured: Literal["retention", "flip_rate"],
    wanted: float,
) -> RangeTest:
    *differing, n_times_classes, n = counts
    accuracies: dict[float, float] = {}
    if measured == "flip_rate":
        curve = {level: count / n for level, count in zip(levels, differing[1:], strict=True)}
    else:
        accuracies = {level: (n - count) / n for level, count in zip((0.0, *levels), differing, strict=True)}
        clean, chance = accuracies[0.0], n / n_times_classes
        if clean <= chance:
            raise ValueError(
                f"the accuracy without noise, {clean:.3g}, is not above that of a guess, {chance:.3g}, so there is no skill to "
                "keep: train the module first, or give flip_rate=0.1, which compares with the predictions without noise"
            )
        curve = {level: retention_of(accuracies[level], clean, chance) for level in levels}
    curve = dict(sorted(curve.items()))
    level = _crossing(curve, wanted) if measured == "retention" else _crossing(_negated(curve), -wanted)
    if math.isnan(level) and trainer.is_global_zero:
        _warn(curve, measured, wanted)
    return RangeTest(level, curve, wanted, measured, accuracies, n)


def _negated(curve: Mapping[float, float]) -> dict[float, float]:
    return {level: -value for level, value in curve.items()}


def _crossing(curve: Mapping[float, float], wanted: float) -> float:
    """The first level at which a curve that falls comes to a value; NaN where it never does."""
    if next(iter(curve.values())) < wanted:  # it has come to it before
        return math.nan
    for (low, above), (high, below) in pairwise(curve.items()):
        if above >= wanted >= below and above > below:
            return low * (high / low) ** ((above - wanted) / (above - below))
    return math.nan


def _warn(curve: Mapping[float, float], measured: str, wanted: float) -> None:
    (lowest, first), *_, (highest, last) = curve.items()
    too_low = first > wanted if measured == "retention" else first < wanted
    way_out = f"above {highest:g}, if they have a meaning" if too_low else f"below {lowest:g}"
    warnings.warn(
        f"no level is suggested: the {measured.replace('_', ' ')} goes from {first:.3g} at {lowest:g} to {last:.3g} at "
        f"{highest:g} and does not come to {wanted:g}; give levels {way_out}",
        stacklevel=4,
    )
