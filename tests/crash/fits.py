"""A fit with every callback, and what an uninterrupted run gives."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, N_FEATURES, Rows, keys_of, loader, make_trainer, weights
from helpers_adaptive import governor, history
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from lightning_noise import (
    ActivationNoise,
    AdaptiveLevel,
    CutMix,
    EmbeddingNoise,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    ReplayMonitor,
    RobustnessMonitor,
    TargetNoise,
    WeightNoise,
    labels,
    noise,
    schedules,
)
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.loop.internals import class_of_callbacks
from lightning_noise.rules import SignedGap

N_EPOCHS = 2
BATCHES = 4  # in an epoch
RAMP = schedules.Linear(0.05, 0.3)


class Tokens(pl.LightningModule):
    """Has an embedding, running statistics, and a schedule of its learning rate."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.net = nn.Sequential(nn.Linear(3 * N_FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, N_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.bucketize(x, torch.tensor([-0.7, 0.0, 0.7]))
        return self.net(torch.cat([x, self.embed(tokens).flatten(1)], 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def callbacks() -> list[pl.Callback]:
    """Every callback, three of them with levels that tune themselves."""
    return [
        InputNoise(noise.Gaussian(), RAMP),
        InputNoise(noise.Speckle(), AdaptiveLevel(governor(step=2.0)), name="tuned"),
        TargetNoise(labels.FlipLabels(N_CLASSES), RAMP),
        Mixup(RAMP),
        CutMix(RAMP, dim=(-1,)),
        LabelSmoothing(AdaptiveLevel(SignedGap())),
        WeightNoise(noise.Gaussian(), RAMP, relative="std", gradient="reparametrized"),
        WeightNoise(noise.Speckle(), AdaptiveLevel(governor(step=0.5)), name="tuned weights"),
        ActivationNoise(noise.Gaussian(), RAMP, "net.0"),
        EmbeddingNoise(RAMP),
        GradientNoise(noise.Gaussian(), RAMP),
        RobustnessMonitor(
            {"image": noise.Gaussian(), "weights": WeightNoise(noise.Gaussian(), name="probe")},
            {"image": [0.1, 0.5], "weights": [0.1]},
        ),
        ReplayMonitor([noise.Gaussian()], [0.3]),
    ]


class FromPosition:
    """Continues with the first batch of the epoch that the trainer has not completed, wherever the run was interrupted."""

    def __init__(self, trainer: pl.Trainer):
        self.trainer, self.rows = trainer, Rows(8 * BATCHES)

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(self.trainer.fit_loop.epoch_loop.batch_progress.current.completed, BATCHES):
            yield self.rows.x[8 * i : 8 * i + 8], self.rows.y[8 * i : 8 * i + 8]


class Values(pl.Callback):
    """Keeps what is logged after each batch and each validation, in order. A logger would have figures, too."""

    def __init__(self):
        self.rows: list[tuple[int, dict[str, float]]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        levels = {callback.name: callback.current_level for callback in class_of_callbacks(trainer, NoiseCallback)}
        self.rows.append((trainer.global_step, levels | {"loss": trainer.callback_metrics["train_loss"].item()}))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.rows.append((trainer.global_step, keys_of(trainer)))


class Outcome(NamedTuple):
    """What a run ends with: the weights, what it logged, and how the levels moved."""

    weights: list[Tensor]
    logged: list[tuple[int, dict[str, float]]]
    moves: list[list[Any]]

    def completes(self, whole: Outcome) -> str:
        """Returns how a resumed run differs from the end of the whole run, or an empty string."""
        wrong = [] if all(map(torch.equal, self.weights, whole.weights)) else ["weights"]
        wrong += [] if repr(self.moves) == repr(whole.moves) else ["moves"]  # NaN equals NaN
        for (step, mine), (_, other) in zip(self.logged[::-1], whole.logged[::-1], strict=False):
            keys = (key for key in mine if repr(mine[key]) != repr(other.get(key)))  # the other keeps old keys
            wrong += [f"{key} after step {step}: {mine.get(key)} and not {other.get(key)}" for key in keys]
        return ", ".join(wrong)


def run(folder: Path, ckpt_path: Path | None = None) -> Outcome:
    """Fits with every callback, and saves a checkpoint after each batch, after each validation, and on an exception."""
    pl.seed_everything(0, verbose=False)
    noises = callbacks()
    savers = [
        ModelCheckpoint(folder, "batch-{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
        ModelCheckpoint(folder, "validation-{step}", every_n_epochs=1, save_top_k=-1, auto_insert_metric_name=False),
        OnExceptionCheckpoint(folder, "exception"),
    ]
    if ckpt_path is not None:
        savers = []
    values = Values()
    trainer = make_trainer(
        [*noises, values, *savers],
        max_epochs=N_EPOCHS,
        val_check_interval=2,
        enable_checkpointing=bool(savers),
    )
    module = Tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, FromPosition(trainer), loader(Rows(26, seed=1), batch_size=13), ckpt_path=ckpt_path)
    moved = [callback for callback in noises if isinstance(callback, NoiseCallback) and callback.adaptive is not None]
    # Lightning counts a batch twice on the x axis of the logs if SIGTERM ended the run after this batch
    moves = [[decision._replace(step=0) for decision in history(callback)] for callback in moved]
    return Outcome(weights(module), values.rows, moves)
