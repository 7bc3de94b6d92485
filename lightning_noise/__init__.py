"""Scheduled noise for any LightningModule, and monitors that show whether it works."""

from lightning_noise import labels, metrics, noise, plots, report, rules, schedules, tasks, testing
from lightning_noise._version import __version__
from lightning_noise.callbacks.activations import ActivationNoise
from lightning_noise.callbacks.adaptive import AdaptiveLevel
from lightning_noise.callbacks.embeddings import EmbeddingNoise
from lightning_noise.callbacks.gradients import GradientNoise
from lightning_noise.callbacks.inputs import InputNoise
from lightning_noise.callbacks.mixing import CutMix, Mixup
from lightning_noise.callbacks.replay import ReplayMonitor
from lightning_noise.callbacks.robustness import RobustnessMonitor
from lightning_noise.callbacks.suggest import suggest_level
from lightning_noise.callbacks.targets import LabelSmoothing, TargetNoise
from lightning_noise.callbacks.weights import WeightNoise
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
    "ReplayMonitor",
    "RobustnessMonitor",
    "TargetNoise",
    "WeightNoise",
    "__version__",
    "labels",
    "metrics",
    "noise",
    "plots",
    "report",
    "rules",
    "schedules",
    "suggest_level",
    "tasks",
    "testing",
]
