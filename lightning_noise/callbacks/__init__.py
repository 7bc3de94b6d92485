"""Noise callbacks and monitors."""

from lightning_noise.callbacks.activations import ActivationNoise
from lightning_noise.callbacks.adaptive import AdaptiveLevel
from lightning_noise.callbacks.certified import RandomizedSmoothing
from lightning_noise.callbacks.embeddings import EmbeddingNoise
from lightning_noise.callbacks.gradients import GradientNoise
from lightning_noise.callbacks.inputs import InputNoise
from lightning_noise.callbacks.mixing import CutMix, Mixup
from lightning_noise.callbacks.predictions import NoisyPrediction, NoisyPredictions
from lightning_noise.callbacks.replay import ReplayMonitor
from lightning_noise.callbacks.robustness import RobustnessMonitor
from lightning_noise.callbacks.suggest import suggest_level
from lightning_noise.callbacks.targets import LabelSmoothing, TargetNoise
from lightning_noise.callbacks.weights import WeightNoise

__all__ = [
    "ActivationNoise",
    "AdaptiveLevel",
    "CutMix",
    "EmbeddingNoise",
    "GradientNoise",
    "InputNoise",
    "LabelSmoothing",
    "Mixup",
    "NoisyPrediction",
    "NoisyPredictions",
    "RandomizedSmoothing",
    "ReplayMonitor",
    "RobustnessMonitor",
    "TargetNoise",
    "WeightNoise",
    "suggest_level",
]
