"""Scheduled noise for any LightningModule, and monitors that show whether it works."""

from lightning_noise import figures, metrics, noise, schedules, testing
from lightning_noise.callbacks.inputs import InputNoise
from lightning_noise.callbacks.robustness import RobustnessMonitor
from lightning_noise.rng import Key

__version__ = "0.1.0"

__all__ = ["InputNoise", "Key", "RobustnessMonitor", "figures", "metrics", "noise", "schedules", "testing"]
