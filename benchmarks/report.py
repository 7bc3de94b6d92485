"""The end of a fit with a monitor of many conditions: its report, and with a logger its figures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from statistics import median

from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.loggers import TensorBoardLogger

from benchmarks.models import Classifier, batches_of, fit, perceptron
from benchmarks.monitors import FEATURES
from benchmarks.tables import Table
from benchmarks.timing import Bench, number, spread
from lightning_noise import RobustnessMonitor, noise


def end_seconds(bench: Bench, n_noises: int, logs: bool = False) -> float:
    """Returns the seconds from the end of the training to the end of the fit."""
    times: list[float] = []
    callbacks = [LambdaCallback(on_train_end=lambda *_: times.append(bench.now()))]
    if n_noises:
        noises = {f"gaussian_{i}": noise.Gaussian() for i in range(n_noises)}
        callbacks.append(RobustnessMonitor(noises, [0.1, 0.2, 0.3, 0.4, 0.5]))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder) if logs else False
        module, batches = Classifier(perceptron(FEATURES)), batches_of(2000, 500, FEATURES)
        fit(bench.device, module, batches, callbacks, limit_train_batches=1, logger=logger)
        return bench.now() - times[0]


def tables(bench: Bench) -> Iterator[Table]:
    n = 1 if bench.quick else 12
    timers = {
        "no monitor": partial(end_seconds, bench, 0),
        "a monitor": partial(end_seconds, bench, n),
        "a monitor, with TensorBoard": partial(end_seconds, bench, n, logs=True),
    }
    table = Table(
        "The end of a fit",
        f"A monitor of {1 + 5 * n} conditions, from the end of the training to the end of the fit, in seconds. With "
        "TensorBoard, files and figures are written.",
        ["callback", "seconds", "milliseconds a condition"],
    )
    for kind, seconds in bench.take_turns(timers, rounds=3).items():
        table.rows.append([kind, spread(seconds), number(1e3 * median(seconds) / (1 + 5 * n))])
    yield table
