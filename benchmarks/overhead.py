"""What noise costs: each figure is a ratio of two things timed in turn in one run, on one thread.

Run: python benchmarks/overhead.py
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_noise import InputNoise, noise

ROUNDS = 50
LEVEL = 0.25


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def ratio(action: Callable[[], object], base: Callable[[], object]) -> float:
    """The median over rounds of the time of the action divided by that of the base, timed in turn."""
    for warm_up in (action, base):
        warm_up()
    return median(timed(action) / timed(base) for _ in range(ROUNDS))


def of_noises() -> dict[str, float]:
    x = torch.rand(128, 3, 64, 64)
    generator = torch.Generator().manual_seed(0)

    def normals(*shape: int) -> Callable[[], Tensor]:
        return lambda: torch.empty(shape).normal_(generator=generator)

    def uniforms(*shape: int) -> Callable[[], Tensor]:
        return lambda: torch.empty(shape).uniform_(generator=generator)

    draws = {
        noise.Gaussian(): normals(*x.shape),
        noise.Uniform(): uniforms(*x.shape),
        noise.Speckle(): normals(*x.shape),
        noise.Impulse(): uniforms(*x.shape),
        noise.Impulse(low=0.0, high=1.0): uniforms(*x.shape),
        noise.Shot(): lambda: torch.poisson(x / LEVEL, generator=generator),
        noise.SNR(): normals(*x.shape),
        noise.SNR(center=True): normals(*x.shape),
        noise.ColoredNoise(): normals(*x.shape[:-1], 63),
        noise.Drift(): normals(*x.shape),
        noise.FeatureDropout(): uniforms(*x.shape),
        noise.SwapNoise(): uniforms(*x.shape),
        # these draw so little that the copy of the tensor is what they cost
        noise.Scaling(): x.clone,
        noise.PatchGaussian(32): x.clone,
        noise.Masking(): x.clone,
    }
    return {repr(member): ratio(partial(member, x, LEVEL, generator=generator), draw) for member, draw in draws.items()}


class Perceptron(pl.LightningModule):
    """Small enough for the loop itself to take most of the time."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def seconds_per_step(callbacks: list[pl.Callback], steps: int = 300) -> float:
    rows = TensorDataset(torch.rand(32 * steps, 32), torch.randint(0, 10, (32 * steps,)))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Perceptron()
    return timed(lambda: trainer.fit(module, DataLoader(rows, batch_size=32))) / steps


def of_the_loop() -> dict[str, float]:
    """Microseconds that a step takes longer than without callbacks, the median of differences taken in turn."""
    kinds = {"dispatcher alone (level 0)": 0.0, "InputNoise(Gaussian())": 0.1}
    differences: dict[str, list[float]] = {kind: [] for kind in kinds}
    base = []
    for _ in range(9):
        base.append(seconds_per_step([]))
        for kind, level in kinds.items():
            differences[kind].append(seconds_per_step([InputNoise(noise.Gaussian(), level)]) - base[-1])
    figures = {kind: 1e6 * median(values) for kind, values in differences.items()}
    return {"a step without": 1e6 * median(base)} | figures


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(
        "(128, 3, 64, 64) float32 on the CPU, time as a ratio to its own random draw, of the last three to a copy of the tensor"
    )
    for name, value in of_noises().items():
        print(f"  {name:<45}{value:6.2f}")
    print("a training step of a small perceptron, microseconds (additional)")
    for name, microseconds in of_the_loop().items():
        print(f"  {name:<45}{microseconds:6.0f}")


if __name__ == "__main__":
    main()
