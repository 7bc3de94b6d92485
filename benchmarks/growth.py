"""How the cost of the main parts grows with the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch

from benchmarks.models import Callbacks, batches_of, layers, perceptron
from benchmarks.monitors import FEATURES, validation_seconds
from benchmarks.report import end_seconds
from benchmarks.steps import Network, step_seconds
from benchmarks.tables import Table
from benchmarks.timing import Bench, ratios, spread
from benchmarks.weights import perturb
from lightning_noise import InputNoise, Key, LabelSmoothing, Mixup, ReplayMonitor, RobustnessMonitor, WeightNoise, noise

FACTORS = (1, 4, 16)
NOISES = [noise.Gaussian(), noise.Impulse(), noise.ColoredNoise(), noise.SwapNoise(), noise.Shot()]
CALLBACKS: dict[str, Callbacks] = {
    "InputNoise": lambda: [InputNoise(noise.Gaussian(), 0.1)],
    "LabelSmoothing": lambda: [LabelSmoothing(0.1)],
    "Mixup": lambda: [Mixup(1.0)],
    "WeightNoise": lambda: [WeightNoise(noise.Gaussian(), 0.01)],
}
MONITORS: dict[str, Callbacks] = {
    "RobustnessMonitor": lambda: [RobustnessMonitor(noise.Gaussian(), [0.1, 0.2])],
    "ReplayMonitor": lambda: [ReplayMonitor(noise.Gaussian(), [0.1, 0.2])],
}


def timers(bench: Bench) -> dict[tuple[str, str], Callable[[int], Callable[[], float]]]:
    """Returns a timer for each factor, by what is measured and what grows."""
    device, unit = bench.device, 16 if bench.quick else 256
    generator = torch.Generator(device)

    def of_noise(each: noise.Noise, factor: int) -> Callable[[], float]:
        x = torch.rand(factor * unit * (1 if bench.on_cpu else 16), 3, 256, device=device)
        return bench.timer(partial(each, x, 0.3, generator=generator))

    def of_rows(each: noise.Noise, factor: int) -> Callable[[], float]:
        x = torch.rand(factor * unit, FEATURES, device=device)
        return bench.timer(partial(Key((0,), positions=range(len(x))).apply, each, x, 0.3))

    def of_step(make: Callbacks, factor: int) -> Callable[[], float]:
        return partial(step_seconds, bench, Network(perceptron, torch.rand(64 * factor, 32), "", 30), make)

    def of_monitor(make: Callbacks, factor: int) -> Callable[[], float]:
        return partial(
            validation_seconds, bench, perceptron(FEATURES), batches_of(16 * factor * unit, 4 * unit, FEATURES), make
        )

    def of_layers(make: Callbacks, factor: int) -> Callable[[], float]:
        return partial(step_seconds, bench, Network(partial(layers, 4 * factor), torch.rand(64, 32), "", 30), make)

    return {
        **{(f"`{each}`", "rows of 3 x 256"): partial(of_noise, each) for each in NOISES},
        **{(f"`{each}` of held-out rows", f"rows of {FEATURES}"): partial(of_rows, each) for each in NOISES[:2]},
        ("noise in weights", "layers"): lambda factor: bench.timer(partial(perturb, layers(factor * unit // 16).to(device))),
        **{(f"step with `{kind}`", "rows of 32"): partial(of_step, make) for kind, make in CALLBACKS.items()},
        **{
            (f"step with `{kind}`", "layers"): partial(of_layers, CALLBACKS[kind]) for kind in ("LabelSmoothing", "WeightNoise")
        },
        **{(f"validation with `{kind}`", f"rows of {FEATURES}"): partial(of_monitor, make) for kind, make in MONITORS.items()},
        ("report at the end of a fit", "noises with 5 levels each"): lambda factor: partial(end_seconds, bench, factor),
    }


def tables(bench: Bench) -> Iterator[Table]:
    table = Table(
        "Growth with the data",
        "1 is the time of the smallest data. An exponent of 1 is proportional growth; below 1 the cost of calls counts, too.",
        ["", "what grows", *(f"{factor} x the data" for factor in FACTORS[1:]), "exponent"],
    )
    for (what, grows), make in timers(bench).items():
        times = bench.take_turns({str(factor): make(factor) for factor in FACTORS}, rounds=5)
        _, *larger = ratios(times).values()
        # the least-squares slope of three equidistant points is that of the outer two
        exponent = math.log(median(larger[-1])) / math.log(FACTORS[-1])
        table.rows.append([what, grows, *map(spread, larger), f"{exponent:.2f}"])
    yield table
