"""Noise of held-out rows, which depends on the position of each row alone, beside noise of the batch at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch

from benchmarks.tables import Table
from benchmarks.timing import Bench, number, ratios, spread
from lightning_noise import Key, noise

RANKS = 8


def tables(bench: Bench) -> Iterator[Table]:
    images = (256, 3, 64, 64) if bench.on_cpu else (256, 3, 224, 224)
    shapes = [(8, 3, 8, 8), (16, 20)] if bench.quick else [images, (256, 3, 32, 32), (1024, 20)]
    table = Table(
        "Rows of held-out data",
        f"1 is a draw for the batch at once. Of {RANKS} ranks, each has every {RANKS}th position.",
        ["rows", "noise", "by position", f"on one of {RANKS} ranks", "microseconds a row"],
    )
    for shape in shapes:
        for each in (noise.Gaussian(), noise.Impulse(), noise.Shot()):
            x, key = torch.rand(shape, device=bench.device), Key((0, "probe"))
            n = len(x)
            keys = [key, *(Key(key.coordinates, positions=range(0, n * step, step)) for step in (1, RANKS))]
            names = ["whole", "position", "ranks"]
            times = bench.compare({name: partial(key.apply, each, x, 0.3) for name, key in zip(names, keys, strict=True)})
            found = ratios(times)
            row = [str(shape), f"`{each}`", spread(found["position"]), spread(found["ranks"])]
            table.rows.append([*row, number(1e6 * median(times["position"]) / n)])
    yield table
