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

BOTTLENECKS = [(64, 3), (128, 4), (256, 6), (512, 3)]  # of a ResNet-50: channels and blocks
UNITS = (None, "std", "max", "filter")


def of_resnet_50() -> nn.Module:
    """All convolutions and the head of a ResNet-50, in their shapes."""
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False)]
    before = 64
    for width, blocks in BOTTLENECKS:
        for i in range(blocks):
            parts += [nn.Conv2d(before, width, 1, bias=False), nn.Conv2d(width, width, 3, bias=False)]
            parts += [nn.Conv2d(width, 4 * width, 1, bias=False)]
            parts += [] if i else [nn.Conv2d(before, 4 * width, 1, bias=False)]
            before = 4 * width
    return nn.Sequential(*parts, nn.Linear(before, 1000))


def layers(n: int, width: int = 32) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(n)))


def by_hand(module: nn.Module) -> None:
    clean = models.perturb_weights(module, 0.01)
    models.restore_weights(clean)


def perturb(module: nn.Module, relative: Any = None) -> None:
    noisy = PerturbedParameters(module, None, noise.Gaussian(), 0.01, Key((0, "weight")), relative=relative)
    noisy.enter()
    noisy.exit()


def of_peer(module: nn.Module) -> dict[str, Callable[[], object]]:
    def make(package: Any) -> Callable[[], None]:
        draw, chosen = package.generators.gaussian(0.01), package.selectors.by_name("weight")

        def side() -> None:
            package.remove_noise(module, package.inject_noise(module, draw, chosen, seed=0, store_tensors=True))

        return side

    return peers.of("noise-injection", make)


def tables(bench: Bench) -> Iterator[Table]:
    networks: dict[str, Callable[[], nn.Module]] = {"ResNet-50": of_resnet_50, "300 layers of 32 x 32": partial(layers, 300)}
    if bench.quick:
        networks = {"3 layers of 32 x 32": partial(layers, 3)}
    table = Table(
        "Weights perturbed and restored",
        "1 is torch by hand: a copy, a draw and a sum for each tensor, and the copy back. noise-injection subtracts its noise, "
        "so the weights it leaves are rounded.",
        ["network", "by hand, ms", *(f'`relative="{unit}"`' if unit else "absolute" for unit in UNITS), "noise-injection"],
    )
    for name, make in networks.items():
        module = make().to(bench.device)
        sides: dict[str, Callable[[], object]] = {"by hand": partial(by_hand, module)}
        sides |= {str(unit): partial(perturb, module, unit) for unit in UNITS} | of_peer(module)
        times = bench.compare(sides, rounds=9)
        found = {side: spread(values) for side, values in ratios(times).items()}
        cells = [found.get(side, "") for side in (*map(str, UNITS), "noise-injection")]
        table.rows.append([name, number(1e3 * median(times["by hand"])), *cells])
    yield table
