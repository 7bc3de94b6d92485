"""Scheduled noise for any LightningModule, and monitors that show whether it works."""

from lightning_noise import corruptions, labels, masks, metrics, noise, plots, report, rules, schedules, tasks, testing
from lightning_noise._version import __version__
from lightning_noise.callbacks import (
    ActivationNoise,
    AdaptiveLevel,
    CutMix,
    EmbeddingNoise,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    NoisyPrediction,
    NoisyPredictions,
    RandomizedSmoothing,
    ReplayMonitor,
    RobustnessMonitor,
    TargetNoise,
    WeightNoise,
    suggest_level,
)
from lightning_noise.evaluation.smoothing import smooth
from lightning_noise.rng import Key

__all__ = [
    "ActivationNoise",
    "AdaptiveLevel",
    "CutMix",
    "EmbeddingNoise",
    "GradientNoise",
    "InputNoise",
    "Key",
    "LabelSmoothing",
    "Mixup",
    "NoisyPrediction",
    "NoisyPredictions",
    "RandomizedSmoothing",
    "ReplayMonitor",
    "RobustnessMonitor",
    "TargetNoise",
    "WeightNoise",
    "__version__",
    "corruptions",
    "labels",
    "masks",
    "metrics",
    "noise",
    "plots",
    "report",
    "rules",
    "schedules",
    "smooth",
    "suggest_level",
    "tasks",
    "testing",
]
