"""The callbacks and monitors that each condition meets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
from helpers import N_CLASSES
from helpers_adaptive import Plan

from lightning_noise import (
    ActivationNoise,
    AdaptiveLevel,
    CutMix,
    EmbeddingNoise,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    RandomizedSmoothing,
    ReplayMonitor,
    RobustnessMonitor,
    TargetNoise,
    WeightNoise,
    labels,
    noise,
)

GAUSSIAN = noise.Gaussian()


def adaptive(level: float, name: str = "adaptive") -> InputNoise:
    return InputNoise(GAUSSIAN, AdaptiveLevel(Plan((level,)), start=level), name=name)


# by level; in the order that one trainer takes all of them
NOISES: dict[str, Callable[..., Any]] = {
    "InputNoise": partial(InputNoise, GAUSSIAN),
    "AdaptiveLevel": adaptive,
    "TargetNoise": partial(TargetNoise, labels.FlipLabels(N_CLASSES)),
    "Mixup": Mixup,
    "CutMix": partial(CutMix, dim=(-1,)),
    "LabelSmoothing": LabelSmoothing,
    "WeightNoise": partial(WeightNoise, GAUSSIAN),
    "ActivationNoise": partial(ActivationNoise, GAUSSIAN, modules="*.1"),
    "EmbeddingNoise": EmbeddingNoise,
    "GradientNoise": partial(GradientNoise, GAUSSIAN),
}
MONITORS: dict[str, Callable[..., Any]] = {
    "RobustnessMonitor": partial(RobustnessMonitor, GAUSSIAN, [0.5]),
    "ReplayMonitor": partial(ReplayMonitor, GAUSSIAN, [0.5]),
    "RandomizedSmoothing": partial(RandomizedSmoothing, 0.5, n0=2, n=10, max_batches=2),
}
COLUMNS = [*NOISES, *MONITORS]


def everything(level: float) -> list[pl.Callback]:
    return [*(make(level) for make in NOISES.values()), *(make() for make in MONITORS.values())]
