"""Weights perturbed and restored, beside torch by hand and beside a peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

from torch import nn

from benchmarks import models, peers
from benchmarks.tables import Table
from benchmarks.timing import Bench, number, ratios, spread
from lightning_noise import Key, noise
from lightning_noise.perturb.weights import PerturbedParameters

UNITS = (None, "std", "max", "filter")


def of_resnet_50() -> nn.Module:
    """All convolutions and the head of a ResNet-50, in their shapes."""
    parts, before = [nn.Conv2d(3, 64, 7, bias=False)], 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for i in range(blocks):
            shapes = [(before, width, 1), (width, width, 3), (width, 4 * width, 1), *([] if i else [(before, 4 * width, 1)])]
            parts += [nn.Conv2d(*shape, bias=False) for shape in shapes]
            before = 4 * width
    return nn.Sequential(*parts, nn.Linear(before, 1000))


def by_hand(module: nn.Module) -> None:
    models.restore_weights(models.perturb_weights(module, 0.01))


def perturb(module: nn.Module, relative: Any = None) -> None:
    noisy = PerturbedParameters(module, None, noise.Gaussian(), 0.01, Key((0, "weight")), relative=relative)
    noisy.enter()
    noisy.exit()


def tables(bench: Bench) -> Iterator[Table]:
    n = 3 if bench.quick else 300
    networks = {f"{n} layers of 32 x 32": models.layers(n)} | ({} if bench.quick else {"ResNet-50": of_resnet_50()})
    table = Table(
        "Weights perturbed and restored",
        "1 is torch by hand: a copy, a draw and a sum for each tensor, and the copy back. noise-injection subtracts its noise, "
        "so the weights it leaves are rounded.",
        ["network", "by hand, ms", *(f'`relative="{unit}"`' if unit else "absolute" for unit in UNITS), "noise-injection"],
    )
    for name, module in networks.items():
        module.to(bench.device)
        sides: dict[str, Callable[[], object]] = {"by hand": partial(by_hand, module)}
        sides |= {str(unit): partial(perturb, module, unit) for unit in UNITS} | peers.of_weights(module)
        times = bench.compare(sides, rounds=7)
        found = {side: spread(values) for side, values in ratios(times).items()}
        cells = [found.get(side, "") for side in (*map(str, UNITS), "noise-injection")]
        table.rows.append([name, number(1e3 * median(times["by hand"])), *cells])
    table.text += f" Peers: {peers.describe()}."
    yield table
