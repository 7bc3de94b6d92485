"""Times of sides that take turns in one process, and their ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

TURN = 0.005  # seconds; a shorter side is repeated
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Bench:
    """The machine of a run.

    Attributes:
        device: What is measured.
        threads: Of torch on the CPU.
        quick: Whether to measure each side once on little data, as a test of the benchmarks.
    """

    device: torch.device
    threads: int = 1
    quick: bool = False

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def now(self) -> float:
        """Returns the processor time on one thread, so that other programs do not count, and else the synchronized time."""
        if not self.on_cpu:
            torch.accelerator.synchronize(self.device)
        return time.process_time() if self.on_cpu and self.threads == 1 else time.perf_counter()

    def seconds(self, side: Callable[[], object], n: int = 1) -> float:
        began = self.now()
        for _ in range(n):
            side()
        return (self.now() - began) / n

    def timer(self, side: Callable[[], object]) -> Callable[[], float]:
        """Returns a function that returns the seconds of the side, after a warm-up."""
        side()
        n = 1 if self.quick else max(1, int(TURN / self.seconds(side)))
        return lambda: self.seconds(side, n)

    def take_turns(self, timers: Mapping[str, Callable[[], float]], rounds: int) -> Times:
        """Returns the seconds of each side in each round."""
        found: Times = {name: [] for name in timers}
        for _ in range(1 if self.quick else rounds):
            for name, timer in timers.items():
                found[name].append(timer())
        return found

    def compare(self, sides: Mapping[str, Callable[[], object]], rounds: int = 9) -> Times:
        return self.take_turns({name: self.timer(side) for name, side in sides.items()}, rounds)


def ratios(times: Times) -> dict[str, list[float]]:
    """Returns the time of each side as a multiple of the first side in the same round."""
    base = next(iter(times.values()))
    return {name: [each / one for each, one in zip(values, base, strict=True)] for name, values in times.items()}


def spread(values: Sequence[float], form: str | None = None) -> str:
    """Returns the median and the quartiles as text."""
    low, _, high = quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
    middle, low, high = (number(value, form) for value in (median(values), low, high))
    return f"{middle} ({low} to {high})"


def number(value: float, form: str | None = None) -> str:
    return format(value, form or (".0f" if value >= 100 else "#.3g"))
