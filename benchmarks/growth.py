"""How the cost of the main parts grows with the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch

from benchmarks.models import perceptron
from benchmarks.monitors import FEATURES, batches_of, validation_seconds
from benchmarks.report import end_seconds
from benchmarks.steps import Network, step_seconds
from benchmarks.tables import Table
from benchmarks.timing import Bench, Times, ratios, spread
from benchmarks.weights import layers, perturb
from lightning_noise import InputNoise, Key, LabelSmoothing, Mixup, ReplayMonitor, RobustnessMonitor, WeightNoise, noise

FACTORS = (1, 4, 16)
NOISES = [noise.Gaussian(), noise.Impulse(), noise.ColoredNoise(), noise.SwapNoise(), noise.Shot()]
CALLBACKS = {
    "InputNoise": lambda: [InputNoise(noise.Gaussian(), 0.1)],
    "LabelSmoothing": lambda: [LabelSmoothing(0.1)],
    "Mixup": lambda: [Mixup(1.0)],
    "WeightNoise": lambda: [WeightNoise(noise.Gaussian(), 0.01)],
}
MONITORS = {
    "RobustnessMonitor": lambda: [RobustnessMonitor(noise.Gaussian(), [0.1, 0.2])],
    "ReplayMonitor": lambda: [ReplayMonitor(noise.Gaussian(), [0.1, 0.2])],
}


def exponent(times: Times) -> float:
    """Returns the least-squares slope of the logarithms, of three equidistant points that of the outer two."""
    first, *_, last = (median(values) for values in times.values())
    return math.log(last / first) / math.log(FACTORS[-1] / FACTORS[0])


def timers(bench: Bench) -> dict[tuple[str, str], Callable[[int], Callable[[], float]]]:
    """Returns a timer for each factor, by what is measured and what grows."""
    device, found = bench.device, {}
    of = (lambda n: n) if not bench.quick else (lambda n: max(2, n // 16))
    generator = torch.Generator(device)

    def of_noise(each: noise.Noise, factor: int) -> Callable[[], float]:
        x = torch.rand(factor * of(256 if bench.on_cpu else 4096), 3, 256, device=device)
        return bench.timer(partial(each, x, 0.3, generator=generator))

    def of_rows(each: noise.Noise, factor: int) -> Callable[[], float]:
        x = torch.rand(n := factor * of(256), FEATURES, device=device)
        return bench.timer(partial(Key((0,), positions=range(n)).apply, each, x, 0.3))

    def of_weights(factor: int) -> Callable[[], float]:
        return bench.timer(partial(perturb, layers(factor * of(16)).to(device)))

    def of_step(make: Callable[[], list], factor: int) -> Callable[[], float]:
        return partial(step_seconds, bench, Network(perceptron, torch.rand(64 * factor, 32), "", 30), make)

    def of_depth(factor: int) -> Callable[[], float]:
        network = Network(partial(layers, 4 * factor), torch.rand(64, 32), "", 30)
        return partial(step_seconds, bench, network, CALLBACKS["LabelSmoothing"])

    def of_monitor(make: Callable[[], list], factor: int) -> Callable[[], float]:
        batches = batches_of(factor * of(4000), of(4000) // 4, (FEATURES,))
        return partial(validation_seconds, bench, perceptron(FEATURES), batches, make)

    def of_report(factor: int) -> Callable[[], float]:
        return partial(end_seconds, bench, batches_of(1000, 500, (FEATURES,)), factor)

    found |= {(f"`{each}`", "rows of 3 x 256"): partial(of_noise, each) for each in NOISES}
    found |= {(f"`{each}` of held-out rows", f"rows of {FEATURES}"): partial(of_rows, each) for each in NOISES[:2]}
    found["noise in weights", "layers of 32 x 32"] = of_weights
    found |= {(f"step with `{kind}`", "rows of 32"): partial(of_step, make) for kind, make in CALLBACKS.items()}
    found["step with `LabelSmoothing`", "layers of the network"] = of_depth
    found |= {(f"validation with `{k}`", f"rows of {FEATURES}"): partial(of_monitor, make) for k, make in MONITORS.items()}
    found["report at the end of a fit", "noises with 5 levels each"] = of_report
    return found


def tables(bench: Bench) -> Iterator[Table]:
    table = Table(
        "Growth with the data",
        "1 is the time of the smallest data. An exponent of 1 is proportional growth; below 1 the cost of calls counts, too.",
        ["", "what grows", *(f"{factor} x the data" for factor in FACTORS[1:]), "exponent"],
    )
    for (what, grows), make in timers(bench).items():
        times = bench.take_turns({str(factor): make(factor) for factor in FACTORS}, rounds=7)
        _, *larger = map(spread, ratios(times).values())
        table.rows.append([what, grows, *larger, f"{exponent(times):.2f}"])
    yield table
