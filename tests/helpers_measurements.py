"""Models and runs for tests of what a monitor measures."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from helpers import N_CLASSES, N_FEATURES, Classifier, Rows, loader, make_trainer
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_noise import Key, RobustnessMonitor, noise
from lightning_noise.metrics import FlipRate
from lightning_noise.report import Report
from lightning_noise.tasks import Custom

LEVELS = (0.3, 1.0)
OF_BOTH = {"gaussian": LEVELS, "weight": LEVELS}
# of sums in float32 over other batches, and of values that are logged in float32
FLOAT32 = 2e-6


def classifier(seed: int = 0, features: int = N_FEATURES) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(features=features).eval()


def brighter(x: Tensor, level: float, *, generator: torch.Generator) -> Tensor:
    """The same for each sample wherever it stands."""
    return x + level


def validated(
    monitor: RobustnessMonitor, module: pl.LightningModule, data: Any, batch_size: int = 8, **kwargs: Any
) -> dict[str, float]:
    """What the monitor logs: ``<metric>_clean`` and the like, and ``<noise>/<level>/<metric>``."""
    trainer = make_trainer([monitor], **kwargs)
    trainer.validate(module, loader(data, batch_size=batch_size), verbose=False)
    return logged(trainer)


def logged(trainer: pl.Trainer, name: str = "robustness") -> dict[str, float]:
    found = {key: value.item() for key, value in trainer.callback_metrics.items()}
    groups = (f"{name}/", f"{name}_levels/")
    return {key.removeprefix(group): value for group in groups for key, value in found.items() if key.startswith(group)}


def reported(monitor: RobustnessMonitor, *args: Any, **kwargs: Any) -> Report:
    validated(monitor, *args, **kwargs)
    assert monitor.report is not None
    return monitor.report


def draws_of(data: Rows, level: float, n_draws: int = 1, tag: str = "soft", seed: int = 5) -> list[Tensor]:
    """The data under each draw of Gaussian noise, sample by sample."""
    keys = [Key((seed, "probe", tag, *([draw] if draw else [])), positions=range(len(data))) for draw in range(n_draws)]
    return [(key / "leaf" / "0").apply(noise.Gaussian(), data.x, level) for key in keys]


@torch.no_grad()
def predicted(module: nn.Module, x: Tensor) -> Tensor:
    return module.eval()(x)


def own_task() -> Custom:
    return Custom(own())


def own() -> MetricCollection:
    accuracy = MulticlassAccuracy(N_CLASSES, average="micro")
    return MetricCollection({"hits": accuracy, "f1": MulticlassF1Score(N_CLASSES), "flips": FlipRate()})
