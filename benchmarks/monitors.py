"""Validations with monitors and with an adaptive level, in forward passes of the network over the validation data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.models import Classifier, make_trainer, perceptron, resnet_20
from benchmarks.tables import Table
from benchmarks.timing import Bench, number, spread
from lightning_noise import AdaptiveLevel, InputNoise, ReplayMonitor, RobustnessMonitor, noise, rules

LEVELS = [0.05, 0.1, 0.2, 0.4, 0.8]
FEATURES = 16  # of a row of the table
Batches = list[list[Tensor]]


class Stopwatch(pl.Callback):
    """The seconds of each validation of a fit, with what all callbacks do at its end."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.seconds: list[float] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = self.bench.now()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # the next hook
        self.seconds.append(self.bench.now() - self.began)


def validation_seconds(
    bench: Bench, net: nn.Module, batches: Batches, callbacks: Callable[[], list[pl.Callback]], n: int = 2
) -> float:
    """Returns the median of the validations of a fit after the first."""
    stopwatch = Stopwatch(bench)
    limits: dict[str, Any] = {"limit_train_batches": 1, "num_sanity_val_steps": 0, "max_epochs": n + 1}
    trainer = make_trainer(bench.device, [stopwatch, *callbacks()], **limits)
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(Classifier(net), loader, loader)
    return statistics.median(stopwatch.seconds[1:])


@torch.inference_mode()
def forward_passes(net: nn.Module, batches: Batches, device: torch.device) -> None:
    net.eval()
    for x, _ in batches:
        net(x.to(device))


def batches_of(n: int, size: int, shape: tuple[int, ...]) -> Batches:
    return [[torch.rand(size, *shape), torch.randint(10, (size,))] for _ in range(n // size)]


def monitors(n_levels: int) -> dict[str, tuple[int, Callable[[], list[pl.Callback]]]]:
    """Returns the callbacks, and the forward passes that their conditions need."""
    noises = [noise.Gaussian(), noise.Impulse()]
    levels, needed = {"gaussian": LEVELS[:n_levels], "impulse": LEVELS[:n_levels]}, 1 + 2 * n_levels
    return {
        "no callback": (1, list),
        f"`RobustnessMonitor`, {needed - 1} conditions": (needed, lambda: [RobustnessMonitor(noises, levels)]),
        f"`ReplayMonitor`, {needed - 1} conditions": (needed, lambda: [ReplayMonitor(noises, levels)]),
        "`AdaptiveLevel`": (2, lambda: [InputNoise(noises[0], AdaptiveLevel(rules.Governor(chance=0.1), 0.1))]),
    }


def tables(bench: Bench) -> Iterator[Table]:
    images = batches_of(16, 8, (3, 32, 32)) if bench.quick else batches_of(256 if bench.on_cpu else 4096, 64, (3, 32, 32))
    yield of_network(bench, f"ResNet-20, {64 * len(images)} images of 3 x 32 x 32", resnet_20(), images, monitors(4))
    rows = batches_of(200, 100, (FEATURES,)) if bench.quick else batches_of(50_000, 500, (FEATURES,))
    yield of_network(bench, f"a perceptron, 50,000 rows of {FEATURES} numbers", perceptron(FEATURES), rows, monitors(5))


def of_network(bench: Bench, name: str, net: nn.Module, batches: Batches, sides: dict[str, Any]) -> Table:
    net.to(bench.device)
    timers = {"pass": bench.timer(partial(forward_passes, net, batches, bench.device))}
    timers |= {kind: partial(validation_seconds, bench, net, batches, make) for kind, (_, make) in sides.items()}
    times = bench.take_turns(timers, rounds=5)
    table = Table(
        f"Validations of {name}",
        "In forward passes of the network alone over the same batches. A validation without a callback also has the work of "
        "Lightning and the loss.",
        ["callback", "passes that it needs", "passes that it takes", "seconds"],
    )
    for kind, (needed, _) in sides.items():
        passes = [seconds / one for seconds, one in zip(times[kind], times["pass"], strict=True)]
        table.rows.append([kind, str(needed), spread(passes), number(statistics.median(times[kind]))])
    return table
