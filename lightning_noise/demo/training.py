"""One training of the demonstration, and its scores on the test data under each noise and level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_noise import RobustnessMonitor, WeightNoise, noise
from lightning_noise.demo.model import DigitClassifier, ProgressLine
from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.report.model import Report

__all__ = ["IMAGE_LEVELS", "WEIGHT_LEVELS", "Score", "Scores", "train"]

IMAGE_LEVELS = {"gaussian": (0.1, 0.2, 0.3, 0.4), "speckle": (0.3, 0.6, 0.9), "impulse": (0.05, 0.1, 0.2)}
WEIGHT_LEVELS = {"weight": (0.2, 0.4, 0.6)}  # in standard deviations of each tensor


class Score(NamedTuple):
    """Accuracy and expected calibration error."""

    accuracy: float
    ece: float


Scores = dict[Condition, Score]
"""The score without noise, and under each noise at each level in rising order."""


def train(
    title: str, callbacks: Sequence[pl.Callback], loaders: dict[str, DataLoader], *, epochs: int, seed: int, root_dir: str
) -> Scores:
    """Trains a classifier with the callbacks and returns its scores on the test data.

    Args:
        title: The name of the training.
        callbacks: The callbacks.
        loaders: The loaders of the splits.
        epochs: The number of epochs.
        seed: The seed of the weights, of the order of the data and of the noise.
        root_dir: The folder of the logs.
    """
    pl.seed_everything(seed)
    monitors = _make_monitors()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(root_dir, name=title.replace(" ", "_")),
        callbacks=[*callbacks, *monitors, ProgressLine(title)],
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = DigitClassifier()
    trainer.fit(module, loaders["train"], loaders["validation"])
    trainer.test(module, loaders["test"], verbose=False)
    return {condition: score for monitor in monitors for condition, score in _read_scores(monitor).items()}


def _make_monitors() -> list[RobustnessMonitor]:
    in_weights = WeightNoise(noise.Gaussian(), relative="std", name="probe")
    return [
        RobustnessMonitor([noise.Gaussian(), noise.Speckle(), noise.Impulse(low=0.0, high=1.0)], IMAGE_LEVELS),
        RobustnessMonitor({"weight": in_weights}, WEIGHT_LEVELS, name="weights"),
    ]


def _read_scores(monitor: RobustnessMonitor) -> Scores:
    values = cast(Report, monitor.report).values  # each test makes a report
    conditions = [CLEAN, *(Condition(name, level) for name, levels in monitor.levels.items() for level in levels)]
    return {condition: Score(values[condition, "accuracy"], values[condition, "ece"]) for condition in conditions}
