"""The end of a fit with a monitor of many conditions: its report, and with a logger its figures."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from functools import partial

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from benchmarks.models import Classifier, make_trainer, perceptron
from benchmarks.monitors import FEATURES, Batches, batches_of
from benchmarks.tables import Table
from benchmarks.timing import Bench, number, spread
from lightning_noise import RobustnessMonitor, noise

LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5]


class End(pl.Callback):
    """When the training ends and its report begins."""

    def __init__(self, bench: Bench):
        self.bench = bench

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = self.bench.now()


def end_seconds(bench: Bench, batches: Batches, n_noises: int, logs: bool = False) -> float:
    """Returns the seconds from the end of the training to the end of the fit."""
    end, noises = End(bench), {f"gaussian_{i}": noise.Gaussian() for i in range(n_noises)}
    with tempfile.TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder) if logs else False
        callbacks: list[pl.Callback] = [end, *([RobustnessMonitor(noises, LEVELS)] if noises else [])]
        trainer = make_trainer(
            bench.device, callbacks, max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0, logger=logger
        )
        loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        trainer.fit(Classifier(perceptron(FEATURES)), loader, loader)
        return bench.now() - end.began


def tables(bench: Bench) -> Iterator[Table]:
    batches = batches_of(2000, 500, (FEATURES,))
    n = 1 if bench.quick else 12
    timers = {
        "no monitor": partial(end_seconds, bench, batches, 0),
        "a monitor": partial(end_seconds, bench, batches, n),
        "a monitor, with TensorBoard": partial(end_seconds, bench, batches, n, logs=True),
    }
    table = Table(
        "The end of a fit",
        f"A monitor of {1 + 5 * n} conditions, from the end of the training to the end of the fit, in seconds. With "
        "TensorBoard, files and figures are written.",
        ["callback", "seconds", "milliseconds a condition"],
    )
    for kind, seconds in bench.take_turns(timers, rounds=5).items():
        each = 1e3 * statistics.median(seconds) / (1 + 5 * n)
        table.rows.append([kind, spread(seconds), "" if kind == "no monitor" else number(each)])
    yield table
