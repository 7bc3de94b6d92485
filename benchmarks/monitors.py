"""What monitors and an adaptive level cost beside a validation without, on a network of the usual size for CIFAR, and memory.

Run: python benchmarks/monitors.py
"""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from steps import ResNet20
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_noise import AdaptiveLevel, InputNoise, ReplayMonitor, RobustnessMonitor, noise, rules

ROUNDS, SAMPLES, BATCH = 3, 512, 64
NOISES = [noise.Gaussian(), noise.Impulse()]
LEVELS = {"gaussian": [0.05, 0.1, 0.2, 0.4], "impulse": [0.05, 0.1, 0.2, 0.4]}
N_PASSES = sum(map(len, LEVELS.values()))
FEW, MANY = 10_000, 1_000_000


class Classifier(ResNet20):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean())


class Linear(pl.LightningModule):
    """A network that is next to nothing, so that what grows with the data is what is kept of them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass


class Drawn(Dataset):
    """Samples that are made when they are asked for, so that the data take no memory."""

    def __init__(self, n: int, shape: tuple[int, ...]):
        self.n, self.shape = n, shape

    def __len__(self) -> int:
        return self.n

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(indices[0])
        x = torch.randn(len(indices), *self.shape, generator=generator)
        return list(zip(x, torch.tensor(indices) % 10, strict=True))


def validate(module: pl.LightningModule, data: Dataset, callbacks: list[pl.Callback], batch_size: int = BATCH) -> float:
    """Returns the processor seconds of a validation."""
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    began = time.process_time()
    trainer.validate(module, DataLoader(data, batch_size=batch_size), verbose=False)
    return time.process_time() - began


class Stopwatch(pl.Callback):
    """Takes the processor seconds of the validation of a fit."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = -time.process_time()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds += time.process_time()


def validate_in_fit(module: pl.LightningModule, data: Dataset, callbacks: list[pl.Callback]) -> float:
    """Returns the processor seconds of the validation of a fit, in which alone levels move."""
    stopwatch = Stopwatch()
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[stopwatch, *callbacks],
        max_epochs=1,
        limit_train_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data, batch_size=BATCH)
    trainer.fit(module, loader, loader)
    return stopwatch.seconds


def seconds() -> dict[str, float]:
    """The median over the rounds, in which the monitors take turns."""
    module, data = Classifier(), Drawn(SAMPLES, (3, 32, 32))
    monitors: dict[str, Callable[[], list[pl.Callback]]] = {
        "none": list,
        f"RobustnessMonitor, {N_PASSES} noises and levels": lambda: [RobustnessMonitor(NOISES, LEVELS)],
        f"ReplayMonitor, {N_PASSES} noises and levels": lambda: [ReplayMonitor(NOISES, LEVELS)],
    }
    found: dict[str, list[float]] = {name: [] for name in [*monitors, f"trainer.validate, {N_PASSES} times"]}
    for _ in range(ROUNDS):
        for name, build in monitors.items():
            found[name].append(validate(module, data, build()))
        found[f"trainer.validate, {N_PASSES} times"].append(sum(validate(module, data, []) for _ in range(N_PASSES)))
        for name, callbacks in {"none, in a fit": [], "AdaptiveLevel, in a fit": [governed()]}.items():
            found.setdefault(name, []).append(validate_in_fit(module, data, callbacks))
    return {name: median(values) for name, values in found.items()}


def governed() -> InputNoise:
    return InputNoise(noise.Gaussian(), AdaptiveLevel(rules.Governor(chance=0.1), 0.1))


def peak_bytes(samples: str, monitored: str) -> int:
    """The peak memory of a process of its own that validates so many samples."""
    command = [sys.executable, __file__, samples, monitored]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    # first, while this process is small: a child's peak is never below that of the process that starts it
    peaks = {n: [peak_bytes(str(n), monitored) / 2**20 for monitored in ("monitored", "alone")] for n in (FEW, MANY)}
    print(f"peak memory of a validation with {N_PASSES} noises and levels")
    for n, (with_, without) in peaks.items():
        print(f"{n:>9} samples: {with_:7.1f} MiB with the monitor, {without:7.1f} MiB without")
    found = seconds()
    print(f"\nResNet-20, {SAMPLES} images of 3 x 32 x 32 in batches of {BATCH}, processor seconds of a validation")
    for name, value in found.items():
        print(f"{name:45}{value:8.2f} s  {value / found['none']:6.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for logger in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    if len(sys.argv) > 1:
        monitors: list[pl.Callback] = [RobustnessMonitor(NOISES, LEVELS)] if sys.argv[2] == "monitored" else []
        validate(Linear(), Drawn(int(sys.argv[1]), (8,)), monitors, batch_size=1000)
        print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    else:
        main()
