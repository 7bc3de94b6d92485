"""Validations with monitors and with an adaptive level, in forward passes of the network over the validation data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import nn

from benchmarks.models import Callbacks, Classifier, batches_of, fit, perceptron, resnet_20
from benchmarks.tables import Table
from benchmarks.timing import Bench, number, spread
from lightning_noise import AdaptiveLevel, InputNoise, ReplayMonitor, RobustnessMonitor, noise, rules

FEATURES = 16  # of a row of the table


def validation_seconds(bench: Bench, net: nn.Module, batches: list[Any], callbacks: Callbacks, n: int = 2) -> float:
    """Returns the median of the validations of a fit after the first, with what all callbacks do at their end."""
    times: list[float] = []

    def note(*_: object) -> None:
        times.append(bench.now())

    stopwatch = LambdaCallback(on_validation_start=note, on_train_epoch_end=note)  # the next hook
    fit(bench.device, Classifier(net), batches, [stopwatch, *callbacks()], limit_train_batches=1, max_epochs=n + 1)
    return median(end - begin for begin, end in zip(times[2::2], times[3::2], strict=True))


@torch.inference_mode()
def pass_seconds(bench: Bench, net: nn.Module, batches: list[Any]) -> float:
    """Returns the seconds of the network alone over the batches."""
    net.to(bench.device).eval()  # a fit leaves it on the CPU
    return bench.timer(lambda: [net(x.to(bench.device)) for x, _ in batches])()


def monitors(n_levels: int) -> dict[str, tuple[int, Callbacks]]:
    """Returns the forward passes that the conditions of callbacks need, and the callbacks."""
    noises, levels = [noise.Gaussian(), noise.Impulse()], [0.05, 0.1, 0.2, 0.4, 0.8][:n_levels]
    by_name, needed = {"gaussian": levels, "impulse": levels}, 1 + 2 * n_levels
    return {
        "no callback": (1, list),
        f"`RobustnessMonitor`, {needed - 1} conditions": (needed, lambda: [RobustnessMonitor(noises, by_name)]),
        f"`ReplayMonitor`, {needed - 1} conditions": (needed, lambda: [ReplayMonitor(noises, by_name)]),
        "`AdaptiveLevel`": (2, lambda: [InputNoise(noises[0], AdaptiveLevel(rules.Governor(chance=0.1), 0.1))]),
    }


def tables(bench: Bench) -> Iterator[Table]:
    n = 16 if bench.quick else 256 if bench.on_cpu else 1024
    yield of_network(bench, f"ResNet-20, {n} images of 3 x 32 x 32", resnet_20(), batches_of(n, min(n, 64), 3, 32, 32), 4)
    n = 200 if bench.quick else 50_000
    rows = batches_of(n, min(n, 500), FEATURES)
    yield of_network(bench, f"a perceptron, {n:,} rows of {FEATURES} numbers", perceptron(FEATURES), rows, 5)


def of_network(bench: Bench, name: str, net: nn.Module, batches: list[Any], n_levels: int) -> Table:
    sides = monitors(n_levels)
    timers = {"pass": partial(pass_seconds, bench, net, batches)}
    timers |= {kind: partial(validation_seconds, bench, net, batches, make) for kind, (_, make) in sides.items()}
    times = bench.take_turns(timers, rounds=3)
    table = Table(
        f"Validations of {name}",
        "In forward passes of the network alone over the same batches. A validation without a callback also has the work of "
        "Lightning and the loss.",
        ["callback", "passes that it needs", "passes that it takes", "seconds"],
    )
    for kind, (needed, _) in sides.items():
        passes = [seconds / one for seconds, one in zip(times[kind], times["pass"], strict=True)]
        table.rows.append([kind, str(needed), spread(passes), number(median(times[kind]))])
    return table
