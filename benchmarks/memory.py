"""Memory of monitors and of noise in weights, each in a copy of the process; on the CPU of Linux only."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch.utils.data import IterableDataset

from benchmarks.models import Classifier, batches_of, fit, layers, perceptron
from benchmarks.monitors import FEATURES, monitors
from benchmarks.tables import Table
from benchmarks.timing import Bench
from lightning_noise import WeightNoise, noise

CPU, MIB = torch.device("cpu"), 2**20
_M_MMAP_THRESHOLD = -3  # of malloc.h
WIDTH, VALIDATIONS, BATCH = 2000, 6, 1000
WEIGHTS = {
    "none": list,
    "absolute": lambda: [WeightNoise(noise.Gaussian(), 0.01)],
    '`relative="std"`': lambda: [WeightNoise(noise.Gaussian(), 0.1, relative="std")],
    "reparametrized": lambda: [WeightNoise(noise.Gaussian(), 0.1, relative="std", gradient="reparametrized")],
}


class Drawn(IterableDataset):
    """Batches that are made when they are asked for, so that the data take no memory."""

    def __init__(self, n: int):
        self.n = n

    def __iter__(self):
        return (batches_of(BATCH, BATCH, FEATURES)[0] for _ in range(self.n // BATCH))


def memory(kind: str) -> int:
    """Returns the current (RSS) or the highest (HWM) memory of this process in bytes."""
    return 1024 * int(re.findall(rf"Vm{kind}:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])


def elsewhere(function: Callable[..., list[int]], *args: object) -> tuple[int, float]:
    """Returns the peak of a function in a copy of this process, and the mean growth between the sizes that it returns."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(_measure, function, *args).result()


def _measure(function: Callable[..., list[int]], *args: object) -> tuple[int, float]:
    gc.disable()
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MIB)  # else the C library keeps large tensors that are freed, at times
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, sizes = memory("RSS"), function(*args)
    return memory("HWM") - before, (sizes[-1] - sizes[0]) / max(1, len(sizes) - 1)


def validate(kind: str, n: int) -> list[int]:
    sizes: list[int] = []
    callbacks = [LambdaCallback(on_train_epoch_end=lambda *_: sizes.append(memory("RSS"))), *monitors(5)[kind][1]()]
    fit(CPU, Classifier(perceptron(FEATURES)), Drawn(n), callbacks, limit_train_batches=1, max_epochs=VALIDATIONS)
    return sizes[2:]


def train(kind: str, n_layers: int) -> list[int]:
    batches = [[torch.rand(32, WIDTH), torch.randint(10, (32,))]] * 3
    fit(CPU, Classifier(layers(n_layers, WIDTH)), batches, WEIGHTS[kind](), limit_val_batches=0)
    return [0]


def tables(bench: Bench) -> Iterator[Table]:
    if bench.on_cpu and Path("/proc/self/clear_refs").exists():
        yield of_validations((1000, 2000) if bench.quick else (10_000, 40_000))
        yield of_weights(1 if bench.quick else 12)


def of_validations(sizes: tuple[int, int]) -> Table:
    table = Table(
        "Memory of validations",
        f"The peak of {VALIDATIONS} validations above that without a callback, and by how much each grows the process, in MiB. "
        "Nothing collects garbage.",
        ["callback", *(f"{n:,} rows" for n in sizes), *(f"growth with {n:,} rows" for n in sizes)],
    )
    base = [elsewhere(validate, "no callback", n)[0] for n in sizes]
    for kind in list(monitors(5))[:3]:
        found = [elsewhere(validate, kind, n) for n in sizes]
        peaks = [peak - alone for (peak, _), alone in zip(found, base, strict=True)]
        table.rows.append([kind, *(f"{each / MIB:.1f}" for each in (*peaks, *(growth for _, growth in found)))])
    return table


def of_weights(n_layers: int) -> Table:
    weights = sum(4 * w.numel() for w in layers(n_layers, WIDTH).parameters())
    text = f"The peak of a fit above that without noise, as a multiple of the {weights / MIB:.0f} MiB of weights."
    table = Table("Memory of noise in weights", text, ["`WeightNoise`", "multiple"])
    base, *peaks = (elsewhere(train, kind, n_layers)[0] for kind in WEIGHTS)
    table.rows += [[kind, f"{(peak - base) / weights:.2f}"] for kind, peak in zip(list(WEIGHTS)[1:], peaks, strict=True)]
    return table
