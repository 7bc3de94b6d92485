"""What noise in each place costs on a network of the usual size for CIFAR, and the memory that noise in the weights takes.

Run: python benchmarks/steps.py
"""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_noise import ActivationNoise, GradientNoise, InputNoise, LabelSmoothing, Mixup, WeightNoise, noise

ROUNDS, STEPS, BATCH = 5, 8, 32
CALLBACKS: dict[str, Callable[[], list[pl.Callback]]] = {
    "none": list,
    "InputNoise(Gaussian())": lambda: [InputNoise(noise.Gaussian(), 0.1)],
    "LabelSmoothing": lambda: [LabelSmoothing(0.1)],
    "Mixup": lambda: [Mixup(1.0)],
    "WeightNoise(Gaussian())": lambda: [WeightNoise(noise.Gaussian(), 0.01)],
    "WeightNoise, relative to std": lambda: [WeightNoise(noise.Gaussian(), 0.1, relative="std")],
    "WeightNoise, reparametrized": lambda: [WeightNoise(noise.Gaussian(), 0.1, relative="std", gradient="reparametrized")],
    "ActivationNoise, after each block": lambda: [ActivationNoise(noise.Gaussian(), 0.1, "blocks.*.out")],
    "GradientNoise(Gaussian())": lambda: [GradientNoise(noise.Gaussian(), 0.001)],
}
WIDTH, LAYERS = 4000, 6  # 64 MB a layer in float32


class Block(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        stride = 2 if after > before else 1
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.out = nn.ReLU()
        self.pad = after - before

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.pad)) if self.pad else x
        return self.out(y + shortcut)


class ResNet20(pl.LightningModule):
    """The network of 20 layers for CIFAR of He et al. (2016), section 4.2."""

    def __init__(self):
        super().__init__()
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(before, after) for before, after in pairwise(widths)))
        self.head = nn.Linear(64, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.blocks(self.stem(x)).mean((2, 3))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Clock(pl.Callback):
    """The processor time of each step but the first, from batch start to batch end; what else runs does not count."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int) -> None:
        self.began = time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if batch_idx:
            self.seconds.append(time.process_time() - self.began)


class Wide(pl.LightningModule):
    """A network that is nearly all weights."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: pl.LightningModule, callbacks: list[pl.Callback], *tensors: Tensor) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*tensors), batch_size=BATCH))


def seconds_per_step() -> dict[str, float]:
    """The median over all steps of all rounds, in which the callbacks take turns."""
    x, y = torch.rand(BATCH * STEPS, 3, 32, 32), torch.randint(0, 10, (BATCH * STEPS,))
    seconds: dict[str, list[float]] = {name: [] for name in CALLBACKS}
    for _ in range(ROUNDS):
        for name, make in CALLBACKS.items():
            clock = Clock()
            fit(ResNet20(), [clock, *make()], x, y)
            seconds[name] += clock.seconds
    return {name: median(values) for name, values in seconds.items()}


def peak_bytes(name: str) -> int:
    """The largest memory of a process that trains the wide network for three steps."""
    command = [sys.executable, __file__, name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    times = seconds_per_step()
    print(f"ResNet-20, batches of {BATCH} x 3 x 32 x 32, one thread, processor seconds a step (and as a multiple of none)")
    for name, value in times.items():
        print(f"  {name:<38}{value:8.4f}{value / times['none']:8.3f}")
    weights = 4 * WIDTH**2 * LAYERS
    print(
        f"{LAYERS} layers of {WIDTH} x {WIDTH} weights, {weights / 2**20:.0f} MiB: peak memory above none as a multiple of it"
    )
    none = peak_bytes("none")
    for name in CALLBACKS:
        if name.startswith("WeightNoise"):
            print(f"  {name:<38}{(peak_bytes(name) - none) / weights:8.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for logger in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    if len(sys.argv) > 1:
        fit(Wide(), CALLBACKS[sys.argv[1]](), torch.rand(3 * BATCH, WIDTH))
        print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    else:
        main()
