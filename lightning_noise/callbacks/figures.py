"""The figures that a monitor of robustness logs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_noise import plots
from lightning_noise.batch import Selector, find_inputs, get
from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.evaluation.engine import Reading
from lightning_noise.evaluation.results import Values
from lightning_noise.loop import loggers
from lightning_noise.loop.progress import logging_step
from lightning_noise.tasks import Task

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Figures"]

_SMALLEST_PICTURE = 32  # numbers


class Figures:
    """Draws what a monitor of robustness finds, and logs the figures.

    Args:
        task: The task of the monitor.
        levels: The levels of each noise.
        inputs: Which leaf of the batch is the input.
        shows_samples: Whether that leaf is known.
    """

    def __init__(self, task: Task, levels: Mapping[str, Sequence[float]], *, inputs: Selector | None, shows_samples: bool):
        self.task = task
        self.levels = levels
        self.inputs = inputs
        self.shows_samples = shows_samples
        self.has_logged_samples = False  # in this run
        self.reset()

    def reset(self) -> None:
        """Forgets the samples of the last pass over the data."""
        self._samples: dict[Condition, tuple[Tensor, list[str]]] = {}  # the first samples, and their classes

    def keep_samples(self, trainer: Trainer, readings: Iterable[Reading]) -> Iterator[Reading]:
        """Yields the readings, and keeps the first samples of each condition."""
        for reading in readings:
            if self.shows_samples and not reading.condition.draw:
                with loggers.warn_on_failure(trainer, "the samples"):
                    self._keep(reading)
            yield reading

    def _keep(self, reading: Reading) -> None:
        leaf = get(reading.batch, find_inputs(reading.batch, self.inputs)[0])
        # a list of samples of different sizes, or a table
        if not isinstance(leaf, Tensor) or leaf[:1].numel() < _SMALLEST_PICTURE:
            return
        samples = leaf[:4].detach().to("cpu", copy=True)  # the step may write to the batch
        has_classes = self.task.has_classes and reading.outputs.ndim == 2
        classes = reading.outputs[:4].argmax(1).tolist() if has_classes else []
        self._samples[reading.condition._replace(draw=None)] = samples, list(map(str, classes))

    def log_curve(self, trainer: Trainer, prefix: str, values: Values) -> None:
        """Logs the main metric against the level."""
        metric = self.task.logged[0]
        curves = {
            noise: {0.0: values[CLEAN, metric]} | {level: values[Condition(noise, level), metric] for level in levels}
            for noise, levels in self.levels.items()
        }
        draw = partial(plots.robustness_curve, curves, ylabel=metric)
        loggers.log_figure(trainer, f"{prefix}/curve", draw, logging_step(trainer))

    def log_reliability(self, trainer: Trainer, prefix: str, calibration: Mapping[Condition, Sequence[Tensor]]) -> None:
        """Logs reliability diagrams of each noise, if the task has confidences."""
        for noise in self.levels if calibration else ():
            panels = {_title(place): bins for place, bins in calibration.items() if place.noise in (CLEAN.noise, noise)}
            draw = partial(plots.reliability_diagram, panels)
            loggers.log_figure(trainer, f"{prefix}_figures/{noise}/reliability", draw, logging_step(trainer))

    def log_samples(self, trainer: Trainer, prefix: str) -> None:
        """Logs the samples without noise next to the samples under each noise."""
        for noise in self.levels:
            shown = {_title(place): shot for place, shot in self._samples.items() if place.noise in (CLEAN.noise, noise)}
            inputs = {title: samples for title, (samples, _) in shown.items()}
            captions = {title: classes for title, (_, classes) in shown.items()}
            if shown:
                draw = partial(plots.samples, inputs, captions=captions)
                loggers.log_figure(trainer, f"{prefix}_figures/{noise}/samples", draw, logging_step(trainer))
        self.has_logged_samples = True


def _title(condition: Condition) -> str:
    return condition.place.replace("/", " ")
