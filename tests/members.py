"""The members of each family, over which its laws are tested."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import N_CLASSES
from torch import Tensor

from lightning_noise import (
    ActivationNoise,
    CutMix,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    TargetNoise,
    WeightNoise,
    labels,
    noise,
    schedules,
)
from lightning_noise.metrics import (
    AdaptiveCalibrationError,
    BalancedAccuracy,
    BrierDecomposition,
    BrierScore,
    CalibrationBins,
    ClasswiseCalibrationError,
    CrossEntropy,
    ExpectedCalibrationError,
    FlipRate,
    MeanAbsoluteError,
    MeanSquaredError,
    NoiseDetection,
    PredictiveEntropy,
    R2Score,
    SelectiveClassification,
    TemperatureScaling,
    TopKAccuracy,
)
from lightning_noise.rules import Governor, SignedGap
from lightning_noise.tasks import Binary, Multiclass, Multilabel, Regression, Task

CALLBACKS = {
    "input": lambda level: InputNoise(noise.Gaussian(), level),
    "smoothing": LabelSmoothing,
    "flips": lambda level: TargetNoise(labels.FlipLabels(N_CLASSES), level),
    "mixup": Mixup,
    "cutmix": lambda level: CutMix(level, dim=(-1,)),
    "weight": lambda level: WeightNoise(noise.Gaussian(), level),
    "gradient": lambda level: GradientNoise(noise.Gaussian(), level),
    "activation": lambda level: ActivationNoise(noise.Gaussian(), level, "net.1"),
}
# the same with other arguments, held to the laws of draws and levels alone
VARIANTS = {
    "input, some samples": lambda level: InputNoise(noise.Uniform(), level, probability=0.5, per_sample=True, clip=(-2, 2)),
    "input, relative": lambda level: InputNoise(noise.Gaussian(), level, relative="std", seed=3),
    "flips at the loss": lambda level: TargetNoise(labels.FlipLabels(N_CLASSES), level, via="loss"),
    "mixup, sampled": lambda level: Mixup(level, via="sample", per_sample=True),
    "weight, reparametrized": lambda level: WeightNoise(noise.Gaussian(), level, relative="std", gradient="reparametrized"),
    "activation, relative": lambda level: ActivationNoise(noise.Uniform(), level, ["net.1", "net.4"], relative="std"),
}
every_callback = pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
every_variant = pytest.mark.parametrize("make", (CALLBACKS | VARIANTS).values(), ids=CALLBACKS | VARIANTS)


def brier_decomposition(n_groups: int = 1) -> BrierDecomposition:
    return BrierDecomposition(num_classes=5, n_groups=n_groups)


def balanced_accuracy(n_groups: int = 1) -> BalancedAccuracy:
    return BalancedAccuracy(num_classes=5, n_groups=n_groups)


def classwise_calibration_error(n_groups: int = 1) -> ClasswiseCalibrationError:
    return ClasswiseCalibrationError(num_classes=5, n_groups=n_groups)


def top_2_accuracy(n_groups: int = 1) -> TopKAccuracy:
    return TopKAccuracy(k=2, n_groups=n_groups)


# the metrics whose sums are whole numbers, for laws that all of them keep
EXACT_METRICS = [
    ExpectedCalibrationError,
    CalibrationBins,
    TemperatureScaling,
    CrossEntropy,
    BrierScore,
    brier_decomposition,
    PredictiveEntropy,
    SelectiveClassification,
    top_2_accuracy,
    balanced_accuracy,
    AdaptiveCalibrationError,
    classwise_calibration_error,
]


REGRESSION_METRICS = [MeanSquaredError, MeanAbsoluteError, R2Score]


# all metrics, with what some of them compare: predictions without noise
METRICS: list[Any] = [*EXACT_METRICS, FlipRate, NoiseDetection, *REGRESSION_METRICS]


def jitter(sample: Tensor, level: float) -> Tensor:
    """A transform that draws from all global streams, and writes to its sample."""
    drawn = torch.rand_like(sample) + float(np.random.rand()) + random.random()
    return sample.add_(level * (drawn - 1.5))


NOISES = [
    noise.Gaussian(),
    noise.Uniform(),
    noise.Speckle(),
    noise.Impulse(),
    noise.Impulse(low=0.0, high=1.0),
    noise.Shot(),
    noise.Shot(scale=4.0),
    noise.SNR(),
    noise.SNR(center=True),
    noise.ColoredNoise(),
    noise.ColoredNoise(exponent=-2.0),
    noise.ColoredNoise(dim=-2),
    noise.Drift(),
    noise.Drift(dim=-2),
    noise.Scaling(),
    noise.Scaling(dim=-2),
    noise.PatchGaussian(size=3),
    noise.Masking(),
    noise.Masking(dim=(-1,), value=0.5),
    noise.FeatureDropout(),
    noise.FeatureDropout(rescale=False),
    noise.DropConnect(),
    noise.SwapNoise(),
    noise.Transform(jitter, levels=(0.1, 0.2, 0.3, 0.4, 0.5)),
    noise.Rician(),
    noise.Quantization(),
    noise.Jitter(),
    noise.Recorded([torch.arange(5.0).sin(), torch.arange(40.0).cos()]),
    noise.AnalogWeights(time=3600.0),
    noise.OneOf(
        [noise.Compose([noise.Gaussian(), noise.Impulse(low=0.0, high=1.0)]), noise.Scaled(noise.Uniform(), 2.0)],
        weights=[3.0, 1.0],
    ),
]


RULES = {
    "governor": Governor(chance=0.1),
    "governor that asks the task": Governor(),
    "governor without patience": Governor(chance=0.1, warmup=0, average=0.0),
    "governor that retains half": Governor(chance=0.1, warmup=1, retain=0.5),
    "governor of an error": Governor(chance=1.0, best=0.0),
    "governor between bounds": Governor(chance=0.1, lo=0.2, hi=0.5),
    "signed gap": SignedGap(),
    "governor below the start of a law": Governor(chance=0.1, hi=0.2),
    "signed gap without patience": SignedGap(step=0.05, hi=0.25, average=0.0, z=0.0),
}


SCHEDULES = [
    schedules.Constant(0.3),
    schedules.Linear(0.0, 0.5),
    schedules.Linear(0.5, 0.1, begin=0.2, until=0.7),
    schedules.Linear(0.0, 1.0, begin=2, until=5, unit="epoch"),
    schedules.Cosine(0.1, 0.5),
    schedules.Cosine(1.0, 0.0, begin=10, until=30, unit="step"),
    schedules.Exponential(0.5, 0.01),
    schedules.Exponential(0.1, 1.0, begin=2, until=5, unit="epoch"),
    schedules.InverseTime(1.0),
    schedules.InverseTime(0.3, exponent=1.0, timescale=0.1, begin=0.25, unit="fraction"),
    schedules.Cyclic(0.1, 0.5, every=0.5),
    schedules.Cyclic(0.4, 0.0, every=7, begin=3, unit="step"),
    schedules.Window(0.3, begin=0.2, until=0.6),
    schedules.Window(schedules.Linear(0.0, 1.0), begin=2, unit="epoch"),
    schedules.Piecewise([0.1, schedules.Linear(0.1, 0.5), schedules.Cosine(0.5, 0.0)], [0.2, 0.5]),
    schedules.Piecewise([schedules.InverseTime(0.5), schedules.Cyclic(0.0, 0.2, every=4, unit="step")], [9], unit="step"),
    schedules.Every(0.3, every=3),
    schedules.Every(schedules.Linear(0.0, 1.0), every=5, length=2, begin=1, unit="step"),
    schedules.Product([schedules.Linear(0.0, 0.5), schedules.Every(1.0, every=2)]),
    schedules.from_snr_db(schedules.Linear(40.0, 0.0)),
]


def _numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=generator)


# outputs and a target of 64 samples
TASKS: dict[Task, Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]] = {
    Multiclass(): lambda g: (_numbers(g, 64, 5), torch.randint(0, 5, (64,), generator=g)),
    Binary(): lambda g: (_numbers(g, 64), (_numbers(g, 64) > 0).float()),
    Multilabel(): lambda g: (_numbers(g, 64, 3), (_numbers(g, 64, 3) > 0).float()),
    Regression(): lambda g: (_numbers(g, 64), _numbers(g, 64)),
}
