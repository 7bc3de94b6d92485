"""The cost of soft targets at the loss: a training step with a callback, and with the same loss written by hand.

Both kinds of step alternate in one run of a Trainer, on one thread. A step lasts from its start to its end and includes the
batch, the hooks and the optimizer. Between two steps the callback is removed from the trainer or put back, which is not timed.

Run: python benchmarks/losses.py
"""

from __future__ import annotations

import logging
import random
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_noise import LabelSmoothing, Mixup
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.loop.dispatch import TrainingDispatcher

CLASSES = 10
SMOOTHING = 0.1
ALPHA = 0.4
WARM_UP = 10
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        same = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet() -> nn.Module:
    """Builds a ResNet of fourteen layers for images of 32 x 32 pixels."""
    blocks = [
        ResidualBlock(channels_in, channels, stride)
        for channels_in, channels, stride in [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    ]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def transformer() -> nn.Module:
    """Builds a transformer that classifies each frame of a series."""
    layer = nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=128, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, num_layers=2), nn.Linear(64, CLASSES))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def cross_entropy(logits: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), **kwargs)


def hard(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(net(x), y)


def smoothed(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(net(x), y, label_smoothing=SMOOTHING)


def mixed(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    lam, partners = random.betavariate(ALPHA, ALPHA), torch.randperm(len(x))
    logits = net(lam * x + (1 - lam) * x[partners])
    return lam * cross_entropy(logits, y) + (1 - lam) * cross_entropy(logits, y[partners])


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.loss: Loss = hard

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.net, *batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Alternation(pl.Callback):
    """Alternates steps by hand and steps with the callback, if there is a callback. It must be the last callback."""

    def __init__(self, by_hand: Loss, callback: NoiseCallback | None):
        self.by_hand = by_hand
        self.callback = callback
        self.seconds: list[float] = []  # of a step by hand and of a step with the callback, alternately
        self.began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.prepare(trainer, with_callback=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self.prepare(trainer, with_callback=len(self.seconds) % 2 == 1)

    def prepare(self, trainer: pl.Trainer, with_callback: bool) -> None:
        noises = [] if self.callback is None else [self.callback]
        # a new list, because the trainer iterates over this one
        trainer.callbacks = [*noises, self] if with_callback else [self]  # type: ignore[attr-defined]
        if with_callback and noises:
            TrainingDispatcher.attach(trainer)
        else:
            TrainingDispatcher.detach(trainer)
        module = trainer.lightning_module
        assert isinstance(module, Classifier)
        module.loss = hard if with_callback and noises else self.by_hand
        self.began = time.perf_counter()


def time_pairs(net: nn.Module, batch: list[Tensor], n: int, by_hand: Loss, callback: NoiseCallback | None) -> list[list[float]]:
    """Returns the seconds of a step by hand and of the next step with the callback, n times."""
    turns = Alternation(by_hand, callback)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[turns] if callback is None else [callback, turns],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(net), DataLoader([batch] * 2 * (WARM_UP + n), batch_size=None))  # type: ignore[arg-type]
    return [turns.seconds[i : i + 2] for i in range(2 * WARM_UP, len(turns.seconds), 2)]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    labels = partial(torch.randint, 0, CLASSES)
    models = {
        "perceptron, (32, 32)": (perceptron, [torch.rand(32, 32), labels((32,))], 1000),
        "ResNet, (16, 3, 32, 32)": (resnet, [torch.rand(16, 3, 32, 32), labels((16,))], 100),
        "transformer, (16, 32, 64)": (transformer, [torch.rand(16, 32, 64), labels((16, 32))], 300),
    }
    kinds: dict[str, tuple[Loss, NoiseCallback | None]] = {
        "LabelSmoothing": (smoothed, LabelSmoothing(SMOOTHING)),
        "Mixup": (mixed, Mixup(ALPHA)),
        "by hand twice": (smoothed, None),
    }
    print("a training step on the CPU, medians: microseconds by hand, additional with the callback, ratio")
    for model, (net, batch, n) in models.items():
        for kind, (by_hand, callback) in kinds.items():
            steps = time_pairs(net(), batch, n, by_hand, callback)
            base = 1e6 * median(one for one, _ in steps)
            longer = 1e6 * median(two - one for one, two in steps)
            print(f"  {model:<28}{kind:<22}{base:8.0f}{longer:+8.0f}{median(two / one for one, two in steps):8.3f}")


if __name__ == "__main__":
    main()
