"""Recipes: the callbacks that the second training has and the first has not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pytorch_lightning import Callback

from lightning_noise import (
    ActivationNoise,
    AdaptiveLevel,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    WeightNoise,
    noise,
    schedules,
)

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Callbacks at a level.

    Attributes:
        title: The name in the output.
        callbacks: A function from the level to the callbacks.
        level: The default level: a number or an adaptive level.
        meaning: What the level means.
        max_level: The largest level that has a meaning.
        footnote: How the recipe relates to the noises in the table.
        trained_noise: The noise in the table that the recipe trains with, if there is such a noise.
    """

    title: str
    callbacks: Callable[[Any], list[Callback]]
    level: float | AdaptiveLevel
    meaning: str
    max_level: float = 10
    footnote: str = "No noise was in the inputs of either training."
    trained_noise: str | None = None

    @property
    def help(self) -> str:
        """The meaning of the level, and its default."""
        default = "it tunes itself" if isinstance(self.level, AdaptiveLevel) else f"{self.level:g}"
        return f"{self.meaning} (default: {default})"


def _input(level: float | AdaptiveLevel) -> Callback:
    schedule = level if isinstance(level, AdaptiveLevel) else schedules.Linear(0.0, level, until=0.5)
    return InputNoise(noise.Gaussian(), schedule, per_sample=True)


def _smoothing(level: float) -> Callback:
    return LabelSmoothing(schedules.Linear(level, 0.0))


def _mixup(level: float) -> Callback:
    # the last epochs are clean, so that batch normalization ends with the statistics of images that are not mixed
    return Mixup(schedules.Window(level, until=0.8))


def _weights(level: float) -> Callback:
    schedule = schedules.Linear(0.0, level, until=0.5)
    return WeightNoise(noise.Gaussian(), schedule, relative="std", gradient="reparametrized")


def _activations(level: float) -> Callback:
    return ActivationNoise(noise.Gaussian(), level, ["net.2", "net.5"], relative="std")


def _gradients(level: float) -> Callback:
    return GradientNoise(noise.Gaussian(), schedules.InverseTime(level))


def _everywhere(level: float) -> list[Callback]:
    return [
        _input(0.5 * level),
        _smoothing(0.1 * level),
        _weights(0.3 * level),
        _activations(0.1 * level),
        _gradients(0.01 * level),
    ]


RECIPES = {
    "input": Recipe(
        "noise",
        lambda level: [_input(level)],
        level=AdaptiveLevel(),
        meaning="the standard deviation that the noise rises to, with pixels in [0, 1]",
        footnote="* the noise of the training; the others show what transfers.",
        trained_noise="gaussian",
    ),
    "targets": Recipe(
        "label smoothing",
        lambda level: [_smoothing(level)],
        level=0.2,
        meaning="the smoothing at the start, which decays to 0",
        max_level=1,
    ),
    "mixup": Recipe(
        "mixup",
        lambda level: [_mixup(level)],
        level=1.0,
        meaning="alpha, which is 0 in the last fifth",
    ),
    "weights": Recipe(
        "noise in the weights",
        lambda level: [_weights(level)],
        level=0.5,
        meaning="the noise that the weights end with, in standard deviations of each tensor",
        footnote="* the noise of the training; no noise was in the inputs of either training.",
        trained_noise="weight",
    ),
    "all": Recipe(
        "noise everywhere",
        _everywhere,
        level=1.0,
        meaning="factor of the noise in inputs, targets, weights, activations and gradients",
        footnote="Noise was in inputs, targets, weights, activations and gradients.",
    ),
}
