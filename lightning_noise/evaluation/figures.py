"""The figures that a monitor of robustness logs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_noise import plots
from lightning_noise.batch import Selector, find_inputs, get
from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.evaluation.engine import Reading
from lightning_noise.loop import loggers
from lightning_noise.loop.internals import evaluation_loaders
from lightning_noise.loop.progress import logging_step
from lightning_noise.perturb.normalization import Normalization
from lightning_noise.report.model import Report
from lightning_noise.tasks import Task

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Figures"]

_SMALLEST_PICTURE = 32  # numbers
_N_SAMPLES = 4


class _Sample(NamedTuple):
    values: Tensor
    label: str | None
    prediction: str | None


class Figures:
    """Draws what a monitor of robustness finds, and logs the figures.

    The samples are spread evenly over the data that this rank evaluates, whatever the batch size.

    Args:
        task: The task of the monitor.
        levels: The levels of each noise.
        visible: The names of the noises that a sample shows. Noise in weights is not among them.
        inputs: Which leaf of the batch is the input.
        class_names: The names of the classes.
        normalization: The normalization of the data, which is undone before they are drawn.
    """

    def __init__(
        self,
        task: Task,
        levels: Mapping[str, Sequence[float]],
        *,
        visible: Sequence[str],
        inputs: Selector | None,
        class_names: Sequence[str] | None,
        normalization: Normalization | None,
    ):
        self.task = task
        self.levels = levels
        self.visible = visible
        self.inputs = inputs
        self.class_names = class_names
        self.normalization = normalization
        self.has_logged_samples = False  # in this run
        self.reset()

    def reset(self) -> None:
        """Forgets the samples of the last pass over the data."""
        self._samples: dict[Condition, list[_Sample]] = {}
        self._rows: set[int] | None = None  # of this rank, which are drawn
        self._n_seen = 0  # rows of this rank

    def keep_samples(
        self, trainer: Trainer, readings: Iterable[Reading], *, dataloader_idx: int, max_batches: int | None
    ) -> Iterator[Reading]:
        """Yields the readings of a batch, and keeps the samples that are drawn."""
        n = 0
        for reading in readings:
            n = len(reading.outputs)
            if self.visible and not reading.condition.draw and reading.condition.noise in (CLEAN.noise, *self.visible):
                with loggers.warn_on_failure(trainer, "the samples"):
                    if self._rows is None:
                        self._rows = _spread_rows(trainer, n, dataloader_idx, max_batches)
                    self._keep(reading, [row - self._n_seen for row in sorted(self._rows) if 0 <= row - self._n_seen < n])
            yield reading
        self._n_seen += n

    def _keep(self, reading: Reading, rows: list[int]) -> None:
        if not rows:
            return
        leaf = get(reading.batch, find_inputs(reading.batch, self.inputs)[0])
        # a list of samples of different sizes, a table, or volumes
        if not isinstance(leaf, Tensor) or leaf[:1].numel() < _SMALLEST_PICTURE or leaf.ndim > 4:
            return
        samples = leaf[rows].detach()
        if self.normalization is not None:
            samples = self.normalization.restore(samples)
        labels, predictions = self._classes(reading, rows)
        kept = map(_Sample, samples.to("cpu", copy=True), labels, predictions)  # the step may write to the batch
        self._samples.setdefault(reading.condition._replace(draw=None), []).extend(kept)

    def _classes(self, reading: Reading, rows: list[int]) -> tuple[list[str | None], list[str | None]]:
        """Returns the true and the predicted class of samples, ``None`` if there is no single class or label."""
        nothing: list[str | None] = [None] * len(rows)
        if not self.task.has_classes or reading.outputs.ndim != 2:
            return nothing, nothing
        predictions: list[str | None] = [self._name(index) for index in reading.outputs[rows].argmax(1).tolist()]
        if len(reading.target) != len(reading.outputs):  # labels that do not count were left out
            return nothing, predictions
        return [self._name(index) for index in reading.target[rows].tolist()], predictions

    def _name(self, index: int) -> str:
        return str(index) if self.class_names is None or index >= len(self.class_names) else self.class_names[index]

    def log_curve(self, trainer: Trainer, prefix: str, report: Report, baseline: Report | None) -> None:
        """Logs the main metric against the level."""
        draw = partial(plots.robustness_curve, report, baseline=baseline)
        loggers.log_figure(trainer, f"{prefix}_figures/curve", draw, logging_step(trainer))

    def log_reliability(self, trainer: Trainer, prefix: str, calibration: Mapping[Condition, Sequence[Tensor]]) -> None:
        """Logs reliability diagrams without noise and at the strongest level of each noise, if the task has confidences."""
        if calibration:
            strongest = [Condition(noise, max(levels)) for noise, levels in self.levels.items()]
            panels = {_title(place): calibration[place] for place in (CLEAN, *strongest)}
            draw = partial(plots.reliability_diagram, panels)
            loggers.log_figure(trainer, f"{prefix}_figures/reliability", draw, logging_step(trainer))

    def log_samples(self, trainer: Trainer, prefix: str) -> None:
        """Logs the samples without noise next to the samples under each noise that they show."""
        for noise in self.visible if self._samples else ():
            shown = {_title(place): kept for place, kept in self._samples.items() if place.noise in (CLEAN.noise, noise)}
            draw = partial(_draw_samples, shown)
            loggers.log_figure(trainer, f"{prefix}_figures/{noise}/samples", draw, logging_step(trainer))
        self.has_logged_samples = True


def _draw_samples(columns: Mapping[str, Sequence[_Sample]]) -> Figure | None:
    values = {title: [sample.values for sample in kept] for title, kept in columns.items()}
    captions = {title: [sample.prediction or "" for sample in kept] for title, kept in columns.items()}
    labels = [sample.label for sample in next(iter(columns.values()))]
    return plots.samples(
        values,
        captions=captions if any(map(any, captions.values())) else None,
        labels=[label or "" for label in labels] if all(labels) else None,
    )


def _spread_rows(trainer: Trainer, batch_size: int, dataloader_idx: int, max_batches: int | None) -> set[int]:
    """Returns rows that are spread evenly over those that this rank will evaluate, or the first if their number is unknown."""
    loaders = evaluation_loaders(trainer)
    loader = None if loaders is None else loaders[dataloader_idx]
    of_stage = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    n_batches = min(of_stage[dataloader_idx], math.inf if max_batches is None else max_batches)
    n = n_batches * batch_size
    if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
        with suppress(TypeError):  # of an iterable data set
            n = min(n, len(loader.sampler))  # type: ignore[arg-type]
    n = _N_SAMPLES if math.isinf(n) else int(n)
    return {i * n // _N_SAMPLES for i in range(_N_SAMPLES)}


def _title(condition: Condition) -> str:
    return condition.place.replace("/", " ")
