"""Memory of monitors and of noise in weights, each in a process of its own; on the CPU of Linux only."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.models import Classifier, make_trainer, perceptron
from benchmarks.monitors import FEATURES, monitors
from benchmarks.tables import Table
from benchmarks.timing import Bench
from lightning_noise import WeightNoise, noise

BATCH, MIB = 1000, 2**20
WIDTH, LAYERS = 2000, 12  # 16 MB a layer in float32
VALIDATIONS = 8
SIDES = ["none", "RobustnessMonitor", "ReplayMonitor"]
WEIGHTS = {
    "none": list,
    "absolute": lambda: [WeightNoise(noise.Gaussian(), 0.01)],
    "relative": lambda: [WeightNoise(noise.Gaussian(), 0.1, relative="std")],
    "reparametrized": lambda: [WeightNoise(noise.Gaussian(), 0.1, relative="std", gradient="reparametrized")],
}


class Drawn(IterableDataset):
    """Batches that are made when they are asked for, so that the data take no memory."""

    def __init__(self, n: int):
        self.n = n

    def __iter__(self):
        return ([torch.rand(BATCH, FEATURES), torch.randint(10, (BATCH,))] for _ in range(self.n // BATCH))


class Resident(pl.Callback):
    """The memory of this process after each validation, without the garbage collector."""

    def __init__(self):
        self.bytes: list[int] = []
        gc.disable()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bytes.append(memory("RSS"))


class Wide(Classifier):
    """A network that is nearly all weights."""

    def __init__(self):
        super().__init__(nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))))


def of_side(name: str) -> list[pl.Callback]:
    return dict(zip(SIDES, monitors(5).values(), strict=False))[name][1]()


def memory(kind: str) -> int:
    """Returns the current (RSS) or the highest (HWM) memory of this process in bytes."""
    found = re.search(rf"Vm{kind}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def validate(name: str, n: int) -> None:
    loader = DataLoader(Drawn(n), batch_size=None)
    make_trainer(torch.device("cpu"), of_side(name)).validate(Classifier(perceptron(FEATURES)), loader, verbose=False)


def fit(name: str) -> None:
    batch = [torch.rand(32, WIDTH), torch.randint(10, (32,))]
    make_trainer(torch.device("cpu"), WEIGHTS[name](), max_epochs=1).fit(Wide(), DataLoader([batch] * 3, batch_size=None))  # type: ignore[arg-type]


def growth(name: str, n: int) -> float:
    """Returns the bytes by which each later validation of a fit grows the process."""
    resident, loader = Resident(), DataLoader(Drawn(n), batch_size=None)
    trainer = make_trainer(
        torch.device("cpu"), [resident, *of_side(name)], max_epochs=VALIDATIONS, limit_train_batches=1, num_sanity_val_steps=0
    )
    trainer.fit(Classifier(perceptron(FEATURES)), loader, loader)
    half = VALIDATIONS // 2
    return (resident.bytes[-1] - resident.bytes[half]) / (VALIDATIONS - 1 - half)


def peak(function: Callable[..., None], *args: object) -> float:
    """Returns the bytes by which a call raises the peak of the process."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("RSS")
    function(*args)
    return memory("HWM") - before


def elsewhere(function: Callable[..., float], *args: object) -> float:
    """Returns what a function returns in a copy of this process."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(function, *args).result()


def tables(bench: Bench) -> Iterator[Table]:
    if not bench.on_cpu:
        return
    sizes = (1000, 2000) if bench.quick else (10_000, 1_000_000)
    table = Table(
        "Memory of a validation",
        f"MiB above a validation without a monitor, of {sizes[0]:,} and of {sizes[1]:,} rows of {FEATURES} numbers, at their "
        "peak; and by how much each later validation of a fit grows the process if nothing collects garbage.",
        ["callback", f"{sizes[0]:,} rows", f"{sizes[1]:,} rows", "each validation"],
    )
    alone = [elsewhere(peak, validate, "none", n) for n in sizes]
    for side in SIDES:
        found = [elsewhere(peak, validate, side, n) - base for n, base in zip(sizes, alone, strict=True)]
        found.append(elsewhere(growth, side, sizes[0]))
        table.rows.append([side, *(f"{each / MIB:.1f}" for each in found)])
    yield table
    weights = 4 * WIDTH**2 * LAYERS
    table = Table(
        "Memory of noise in weights",
        f"The peak of a fit above that without noise, as a multiple of the {weights / MIB:.0f} MiB of weights.",
        ["`WeightNoise`", "multiple"],
    )
    base = elsewhere(peak, fit, "none")
    for name in list(WEIGHTS)[1:]:
        table.rows.append([name, f"{(elsewhere(peak, fit, name) - base) / weights:.2f}"])
    yield table
